"""A finish through a connection of the user's own, of a driver or of Django, within his own transaction."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.engine.default import DefaultDialect

from idem_tasks.claims import EncodedOutcome, Lease
from idem_tasks.errors import ConfigurationError
from idem_tasks.stores.sql_claims import finishing
from idem_tasks.stores.sql_execution import Prepared
from idem_tasks.stores.sql_relay import batches_of
from idem_tasks.stores.sql_statements import Kind, statements_for

_DRIVERS: dict[str, Kind] = {
    "psycopg": "postgresql",
    "psycopg2": "postgresql",
    "pymysql": "mariadb",
    "MySQLdb": "mariadb",
    "sqlite3": "sqlite",
}
_VENDORS: dict[str, Kind] = {"postgresql": "postgresql", "mysql": "mariadb", "sqlite": "sqlite"}
"""What Django calls them. The finish is the same on MySQL as on MariaDB."""

_DIALECTS: dict[Kind, Callable[..., DefaultDialect]] = {
    "postgresql": postgresql.psycopg.dialect,
    "mariadb": mysql.pymysql.dialect,
    "sqlite": sqlite.pysqlite.dialect,
}
_MYSQL_IN_TRANSACTION = 1
"""SERVER_STATUS_IN_TRANS of the protocol."""


def write_finish_in(connection: Any, schema: str | None, prefix: str, lease: Lease, outcome: EncodedOutcome) -> bool:
    """Write the outcome and its messages within the connection's transaction; False if the fence missed.

    Raises `ConfigurationError` for a connection that is of no known kind or in no transaction, and what it raises.
    """
    kind, is_django = _kind_of(connection)
    if not _is_in_transaction(connection, kind, is_django):
        raise ConfigurationError(
            "finish_in was given a connection in autocommit, where the outcome would be committed apart from what else "
            "is written: call it within a transaction, such as Django's atomic()"
        )
    style = "qmark" if kind == "sqlite" and not is_django else "format"
    place = (kind, schema, prefix, style)
    with contextlib.closing(connection.cursor()) as cursor:
        _finish(*place).execute(cursor, finishing(lease, outcome))
        if cursor.rowcount != 1:
            return False
        for batch, values in batches_of(outcome.messages):
            _insert(*place, len(batch)).execute(cursor, values)
        return True


@cache
def _finish(kind: Kind, schema: str | None, prefix: str, style: str) -> Prepared:
    return Prepared(statements_for(kind, schema, prefix).finish, _DIALECTS[kind](paramstyle=style))


@cache
def _insert(kind: Kind, schema: str | None, prefix: str, style: str, number: int) -> Prepared:
    return Prepared(statements_for(kind, schema, prefix).outbox.insert(number), _DIALECTS[kind](paramstyle=style))


def _kind_of(connection: Any) -> tuple[Kind, bool]:
    """Tell which database it is of, and whether it is Django's, whose cursors want %s on all of them."""
    vendor = getattr(connection, "vendor", None)
    if vendor in _VENDORS and hasattr(connection, "in_atomic_block"):
        return _VENDORS[vendor], True
    kinds = type(connection).__mro__ if hasattr(connection, "commit") else ()
    for kind in kinds:
        driver = kind.__module__.partition(".")[0]
        if driver in _DRIVERS:
            _refuse_what_answers_later(connection)
            return _DRIVERS[driver], False
    raise ConfigurationError(
        f"finish_in takes a connection of psycopg, sqlite3, PyMySQL, mysqlclient or Django, not a "
        f"{type(connection).__module__}.{type(connection).__qualname__}"
    )


def _refuse_what_answers_later(connection: Any) -> None:
    """Raise for a connection on which a write does not tell at once whether it met the fence."""
    if inspect.iscoroutinefunction(connection.commit):
        raise ConfigurationError(
            f"finish_in is blocking, and {type(connection).__qualname__} is asyncio's: with SQLAlchemy's AsyncSession, "
            "session= does the same for async def handlers"
        )
    if getattr(getattr(connection, "pgconn", None), "pipeline_status", 0):
        raise ConfigurationError(
            "finish_in was given a connection in pipeline mode, which does not tell whether the claim stands: call it "
            "when the pipeline has ended, in the same transaction"
        )


def _is_in_transaction(connection: Any, kind: Kind, is_django: bool) -> bool:
    """Tell whether what is written now is committed later; drivers that begin by themselves are."""
    if is_django:
        return bool(connection.in_atomic_block or not connection.get_autocommit())
    if kind == "sqlite":
        begins = connection.isolation_level is not None and getattr(connection, "autocommit", None) is not True
        return bool(connection.in_transaction or begins)
    if kind == "postgresql":
        info = getattr(connection, "info", None)
        return not connection.autocommit or (info is not None and info.transaction_status != 0)  # 0: IDLE
    return not connection.get_autocommit() or bool(getattr(connection, "server_status", 0) & _MYSQL_IN_TRANSACTION)
