"""Statements compiled once, and sent by the driver itself.

SQLAlchemy's own execution of a statement that is compiled already costs more than SQLite's work for it, and half as
much as a round trip to PostgreSQL (`scripts/bench --only 'first call'`). It is left to it on an engine of the user's,
who may listen to its events.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from sqlalchemy import Connection, Dialect, Executable
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import ClauseElement
from sqlalchemy.types import TypeEngine

from idem_tasks.stores.sql_statements import AnyRow

BY_DRIVER = "idem_tasks_by_driver"
"""The execution option of the engines whose statements go past SQLAlchemy."""

A = TypeVar("A")

Convert = Callable[[Any], Any]


def fetch(connection: Connection, statement: Executable, values: Mapping[str, Any]) -> AnyRow | None:
    """Execute a statement that has one row at most; None where it has none, or returns no rows at all."""
    if BY_DRIVER in connection.get_execution_options():
        return _send(connection, statement, values, Prepared.row)
    result = connection.execute(statement, values)
    return result.one_or_none() if result.returns_rows else None


def write(connection: Connection, statement: Executable, values: Mapping[str, Any]) -> bool:
    """Execute a statement that changes one record at most, and tell whether it did."""
    if BY_DRIVER in connection.get_execution_options():
        return _send(connection, statement, values, Prepared.has_written)
    return connection.execute(statement, values).rowcount == 1


def _send(connection: Connection, statement: Any, values: Mapping[str, Any], answer: Callable[[Prepared, Any], A]) -> A:
    dialect = connection.dialect
    prepared = prepare(statement, dialect)
    try:
        cursor = _cursor(connection)
        prepared.execute(cursor, values)
        return answer(prepared, cursor)
    except dialect.loaded_dbapi.Error as error:
        unusable = connection.info.pop(_CURSOR, None)
        if isinstance(error, dialect.loaded_dbapi.NotSupportedError):
            # PostgreSQL: a plan that no longer fits a table which was changed, and never will on this connection.
            connection.invalidate(error)
        # As SQLAlchemy raises it, which throws a broken connection away; it has no public name for that.
        connection._handle_dbapi_exception(error, prepared.text, None, unusable, None)  # noqa: SLF001
    except BaseException:
        # What strikes from outside goes on as itself, and its connection is thrown away. A cursor that lived on in the
        # traceback would keep an SQLite file locked.
        unusable = connection.info.pop(_CURSOR, None)
        if unusable is not None and dialect.driver == "pysqlite":
            unusable.close()
        raise


def _cursor(connection: Connection) -> Any:
    """Return the cursor of this connection of the driver's, always the same one.

    psycopg's learns the types of a connection: a new one costs a tenth of a round trip.
    """
    cursors = connection.info
    if _CURSOR not in cursors:
        cursors[_CURSOR] = connection.connection.cursor()
    return cursors[_CURSOR]


_CURSOR = "idem_tasks_cursor"


@lru_cache(maxsize=500)  # some twenty statements, for each engine
def prepare(statement: ClauseElement, dialect: Dialect) -> Prepared:
    """Return the statement as this dialect writes it, always the same one."""
    return Prepared(statement, dialect)


class Prepared:
    """A statement as one dialect writes it; its parameters and rows are converted as SQLAlchemy would."""

    def __init__(self, statement: ClauseElement, dialect: Dialect) -> None:
        compiled = statement.compile(dialect=dialect)
        assert isinstance(compiled, SQLCompiler)
        assert not compiled.post_compile_params, "its text depends on its parameters"
        self.text = str(compiled)
        self._dialect = dialect
        self._order = compiled.positiontup
        self._constants: dict[str, Any] = {}
        self._computed: dict[str, Callable[[], Any]] = {}
        self._given: dict[str, Convert | None] = {}
        for parameter, name in compiled.bind_names.items():
            convert = parameter.type.dialect_impl(dialect).bind_processor(dialect)
            if parameter.callable is not None:
                self._computed[name] = parameter.callable
            elif parameter.required:
                self._given[name] = convert
            else:
                self._constants[name] = parameter.value if convert is None else convert(parameter.value)
        columns = compiled._result_columns  # noqa: SLF001 - it has no public name
        self._types: list[TypeEngine[Any]] = [column.type for column in columns]
        names = [column.keyname for column in columns]
        self._make_row: Callable[[Any], AnyRow] = namedtuple("Row", names)._make  # type: ignore[attr-defined] # noqa: PYI024
        self._conversions: list[tuple[int, Convert]] | None = None
        """By column; known once the driver has told the types of the first row."""

    def execute(self, cursor: Any, values: Mapping[str, Any]) -> None:
        """Execute it with those of the values that it has parameters for."""
        bound = self._constants.copy()
        for name, compute in self._computed.items():
            bound[name] = compute()
        for name, convert in self._given.items():
            value = values[name]
            bound[name] = value if convert is None else convert(value)
        order = self._order
        cursor.execute(self.text, bound if order is None else [bound[name] for name in order])

    def has_written(self, cursor: Any) -> bool:
        """Tell whether it changed its one row."""
        return bool(cursor.rowcount == 1)

    def row(self, cursor: Any) -> AnyRow | None:
        """Return its one row, if there is one."""
        values = cursor.fetchone() if self._types else None
        if values is None:
            return None
        if self._conversions is None:
            self._conversions = self._conversions_of(cursor.description)
        values = list(values)
        for index, convert in self._conversions:
            values[index] = convert(values[index])
        return self._make_row(values)

    def _conversions_of(self, description: Sequence[Sequence[Any]]) -> list[tuple[int, Convert]]:
        dialect = self._dialect
        found = (
            (index, kind.dialect_impl(dialect).result_processor(dialect, column[1]))
            for index, (kind, column) in enumerate(zip(self._types, description, strict=True))
        )
        return [(index, convert) for index, convert in found if convert is not None]
