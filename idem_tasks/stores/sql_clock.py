"""The database's clock, as SQL expressions that read the same on every database.

A worker's clock decides nothing. PostgreSQL's `now()` would be the start of the transaction, so it is
`clock_timestamp()` (F48); MariaDB's and MySQL's `UTC_TIMESTAMP(6)` is the start of the statement, and unlike `NOW()`
and `UNIX_TIMESTAMP()` free of the session's time zone. SQLite counts milliseconds.
"""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import (
    BigInteger,
    Dialect,
    Float,
    Interval,
    Text,
    bindparam,
    cast,
    extract,
    func,
    literal_column,
    types,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.sql.functions import FunctionElement

from idem_tasks.stores.schema import Instant

_MICROSECOND: ColumnElement[Any] = literal_column("MICROSECOND")
_SQLITE_FORMAT: ColumnElement[Any] = literal_column("'%Y-%m-%d %H:%M:%f'")
_SQLITE_NOW: ColumnElement[Any] = literal_column("'now'")
_SQLITE_EPOCH: ColumnElement[Any] = literal_column("2440587.5")
"""1970-01-01 as a Julian day."""


class Seconds(types.TypeDecorator[float]):
    """A duration bound in seconds, as each database adds it to a time."""

    impl = Float
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> types.TypeEngine[Any]:
        """PostgreSQL multiplies an interval, MariaDB and MySQL add microseconds, SQLite takes a modifier."""
        if dialect.name == "postgresql":
            return dialect.type_descriptor(Float())
        return dialect.type_descriptor(Text() if dialect.name == "sqlite" else BigInteger())

    def process_bind_param(self, value: float | None, dialect: Dialect) -> Any:
        """Convert it."""
        if value is None or dialect.name == "postgresql":
            return value
        return f"{value:+.3f} seconds" if dialect.name == "sqlite" else round(value * 1_000_000)


class now(FunctionElement[Any]):  # noqa: N801 (reads as the SQL function it is)
    """The time now."""

    type = Instant()
    inherit_cache = True


class after(FunctionElement[Any]):  # noqa: N801
    """The time in so many `Seconds` from now."""

    type = Instant()
    inherit_cache = True


class seconds_until(FunctionElement[float]):  # noqa: N801
    """The seconds from now until an instant; negative once it is over."""

    type = Float()
    inherit_cache = True


class clock_microseconds(FunctionElement[int]):  # noqa: N801
    """Microseconds since 1970: where fencing tokens begin, so that they rise even when a row was lost (F10)."""

    type = BigInteger()
    inherit_cache = True


class later_of(FunctionElement[Any]):  # noqa: N801
    """The later of two instants."""

    type = Instant()
    inherit_cache = True


def after_seconds(name: str) -> after:
    """Return the time in so many seconds from now as the parameter `name` says."""
    return after(bindparam(name, type_=Seconds()))


_Element = FunctionElement[Any]
_mysql_family = ("mysql", "mariadb")


def _compiled(compiler: SQLCompiler, expression: ColumnElement[Any], **options: Any) -> str:
    return compiler.process(expression, **options)


def _arguments(element: _Element) -> list[ColumnElement[Any]]:
    return list(element.clauses)


@compiles(now, "postgresql")
def _(_element: _Element, compiler: SQLCompiler, **options: Any) -> str:
    return _compiled(compiler, func.clock_timestamp(), **options)


@compiles(now, *_mysql_family)
def _(_element: _Element, compiler: SQLCompiler, **options: Any) -> str:
    return _compiled(compiler, _utc_timestamp, **options)


@compiles(now, "sqlite")
def _(_element: _Element, compiler: SQLCompiler, **options: Any) -> str:
    return _compiled(compiler, func.strftime(_SQLITE_FORMAT, _SQLITE_NOW), **options)


@compiles(after, "postgresql")
def _(element: _Element, compiler: SQLCompiler, **options: Any) -> str:
    [seconds] = _arguments(element)
    second = literal_column("interval '1 second'", Interval())
    return _compiled(compiler, func.clock_timestamp() + seconds * second, **options)


@compiles(after, *_mysql_family)
def _(element: _Element, compiler: SQLCompiler, **options: Any) -> str:
    [microseconds] = _arguments(element)
    return _compiled(compiler, func.timestampadd(_MICROSECOND, microseconds, _utc_timestamp), **options)


@compiles(after, "sqlite")
def _(element: _Element, compiler: SQLCompiler, **options: Any) -> str:
    [modifier] = _arguments(element)
    return _compiled(compiler, func.strftime(_SQLITE_FORMAT, _SQLITE_NOW, modifier), **options)


@compiles(seconds_until, "postgresql")
def _(element: _Element, compiler: SQLCompiler, **options: Any) -> str:
    [instant] = _arguments(element)
    return _compiled(compiler, cast(extract("epoch", instant - func.clock_timestamp()), Float), **options)


@compiles(seconds_until, *_mysql_family)
def _(element: _Element, compiler: SQLCompiler, **options: Any) -> str:
    [instant] = _arguments(element)
    microseconds = func.timestampdiff(_MICROSECOND, _utc_timestamp, instant)
    return _compiled(compiler, microseconds * literal_column("1e-6"), **options)


@compiles(seconds_until, "sqlite")
def _(element: _Element, compiler: SQLCompiler, **options: Any) -> str:
    [instant] = _arguments(element)
    days = func.julianday(instant) - func.julianday(_SQLITE_NOW)
    return _compiled(compiler, days * literal_column("86400.0"), **options)


@compiles(clock_microseconds, "postgresql")
def _(_element: _Element, compiler: SQLCompiler, **options: Any) -> str:
    seconds = extract("epoch", func.clock_timestamp())
    return _compiled(compiler, cast(seconds * literal_column("1000000"), BigInteger), **options)


@compiles(clock_microseconds, *_mysql_family)
def _(_element: _Element, compiler: SQLCompiler, **options: Any) -> str:
    epoch: ColumnElement[Any] = literal_column("'1970-01-01'")
    return _compiled(compiler, func.timestampdiff(_MICROSECOND, epoch, _utc_timestamp), **options)


@compiles(clock_microseconds, "sqlite")
def _(_element: _Element, compiler: SQLCompiler, **options: Any) -> str:
    days = func.julianday(_SQLITE_NOW) - _SQLITE_EPOCH
    # A Julian day as a float is a little off, so its milliseconds are rounded. They are too few for two claims of a key
    # that was forgotten in between; this process's clock, which is the same one, tells them apart.
    milliseconds = cast(func.round(days * literal_column("86400000.0")), BigInteger)
    microseconds = bindparam("clock_microseconds", callable_=_wall_clock, type_=BigInteger())
    return _compiled(compiler, func.max(milliseconds * literal_column("1000"), microseconds), **options)


def _wall_clock() -> int:
    return time.time_ns() // 1000


@compiles(later_of)
def _(element: _Element, compiler: SQLCompiler, **options: Any) -> str:
    return _compiled(compiler, func.greatest(*_arguments(element)), **options)


@compiles(later_of, "sqlite")
def _(element: _Element, compiler: SQLCompiler, **options: Any) -> str:
    return _compiled(compiler, func.max(*_arguments(element)), **options)


_utc_timestamp = func.utc_timestamp(literal_column("6"))
