"""What is known, without asking the server, of a transaction in a session of the user's.

SQLAlchemy tells of errors and statements; the driver tells whether a transaction is open.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from sqlalchemy import Connection, Dialect, ExceptionContext, event
from sqlalchemy.exc import StatementError

from idem_tasks.errors import ConfigurationError
from idem_tasks.stores import sql_errors

_MYSQL_FAMILY = ("mysql", "mariadb")


def refuse_autocommit(connection: Connection) -> None:
    """Ask the driver, which asks nobody; SQLite is asked after its first write, for it may be begun by hand."""
    if connection.dialect.name == "sqlite":
        return
    dbapi_connection: Any = connection.connection.dbapi_connection
    if connection.dialect.detect_autocommit_setting(dbapi_connection):
        raise autocommit()


def autocommit() -> ConfigurationError:
    """Return what to raise for an engine that commits each statement."""
    return ConfigurationError(
        "session= is bound to an engine in AUTOCOMMIT, where each of the handler's writes is committed by itself; "
        "bind it to one with transactions"
    )


def locks_what_it_reads(connection: Connection) -> bool:
    """Tell whether a SELECT locks its rows, as far as the engine says or the server did when it was first connected."""
    level = (
        connection.get_execution_options().get("isolation_level")
        or getattr(connection.dialect, "_on_connect_isolation_level", None)
        or connection.default_isolation_level
    )
    return level == "SERIALIZABLE" and connection.dialect.name in _MYSQL_FAMILY


# Errors, also those that a handler swallows


_UNDONE = "idem_tasks_undone"
_FAILED = "idem_tasks_failed"
_watched: WeakSet[Dialect] = WeakSet()


def watch(connection: Connection) -> None:
    """Note errors from now on; once for each engine."""
    if connection.dialect not in _watched:
        _watched.add(connection.dialect)
        event.listen(connection.engine, "handle_error", _note_error)


def _note_error(context: ExceptionContext) -> None:
    connection, error = context.connection, context.sqlalchemy_exception
    if connection is None or connection.closed or connection.invalidated:
        return  # with a connection that is gone, so is all that was not committed
    connection.info[_FAILED] = True
    if sql_errors.is_conflict(error) or (_is_timeout(error) and not undone(connection)):
        connection.info[_UNDONE] = connection.get_transaction(), error


def had_error(connection: Connection) -> bool:
    """Tell whether a statement failed since it was asked last."""
    return connection.info.pop(_FAILED, False) is True


def undone(connection: Connection) -> Exception | None:
    """Return the error by which MariaDB or MySQL undid, or may have undone, all of this transaction before it.

    PostgreSQL refuses everything after it; a handler that rolled back by itself has begun another transaction.
    """
    transaction, error = connection.info.get(_UNDONE, (None, None))
    is_of_this = transaction is connection.get_transaction() and connection.dialect.name in _MYSQL_FAMILY
    return error if is_of_this else None


def refuse_remainder(connection: Connection) -> None:
    """Raise the deadlock that a handler swallowed: MariaDB and MySQL undid all before it, and would commit the rest."""
    error = undone(connection)
    connection.info.pop(_UNDONE, None)
    if error is not None and (not _is_timeout(error) or _undoes_all_at_timeout(connection)):
        raise error


def _is_timeout(error: BaseException | None) -> bool:
    """Tell whether it waited too long for a lock, at which MariaDB and MySQL undo the statement, or everything."""
    return isinstance(error, StatementError) and error.orig is not None and error.orig.args[:1] == (1205,)


def _undoes_all_at_timeout(connection: Connection) -> bool:
    return bool(connection.exec_driver_sql("SELECT @@innodb_rollback_on_timeout").scalar())


@contextmanager
def without_parameters() -> Iterator[None]:
    """Keep the outcome out of the words of an error, which end in logs and in the record; the engine is the user's."""
    try:
        yield
    except StatementError as error:
        error.hide_parameters = True
        raise


# The state of a transaction, as statements and drivers tell it


_BLANK = r"(?:\s|/\*.*?\*/)*"
_BEGINS = re.compile(_BLANK + r"BEGIN\b", re.IGNORECASE | re.DOTALL)
_COMMITS = re.compile(_BLANK + r"(COMMIT|END|PREPARE\s+TRANSACTION)\b", re.IGNORECASE | re.DOTALL)
_MYSQL_COMMITS = re.compile(
    _BLANK + r"(COMMIT|BEGIN|START|LOCK|UNLOCK|SET\s.*\bautocommit\b|SET\s+PASSWORD"
    r"|ALTER|TRUNCATE|RENAME|GRANT|REVOKE|FLUSH|RESET|INSTALL|UNINSTALL|CACHE\s+INDEX|LOAD\s+INDEX"
    r"|(CREATE|DROP)\s+(?!(OR\s+REPLACE\s+)?TEMPORARY\b|PREPARE\b)"
    r"|(ANALYZE|CHECK|OPTIMIZE|REPAIR)\s+((NO_WRITE_TO_BINLOG|LOCAL)\s+)?TABLE)",
    re.IGNORECASE | re.DOTALL,
)
"""What commits what came before it; on MySQL and MariaDB nearly all that is neither of rows nor of savepoints."""


def commits(connection: Connection, statement: str) -> bool:
    """Tell whether a statement commits what came before it."""
    pattern = _MYSQL_COMMITS if connection.dialect.name in _MYSQL_FAMILY else _COMMITS
    return pattern.match(statement) is not None


def begins(statement: str) -> bool:
    """Tell whether it is a BEGIN."""
    return _BEGINS.match(statement) is not None


def _driver(connection: Connection) -> Any:
    return connection.connection.driver_connection


def is_in_transaction(connection: Connection) -> bool:
    """Tell whether SQLite is in a transaction."""
    return bool(_driver(connection).in_transaction)


def is_open(connection: Connection) -> bool | None:
    """Tell whether the server is in a transaction, without asking it; None if this driver does not know."""
    driver = _driver(connection)
    if connection.dialect.name == "sqlite":
        return is_in_transaction(connection)
    if hasattr(driver, "is_in_transaction"):  # asyncpg
        return bool(driver.is_in_transaction())
    status = _transaction_status(driver)
    if status is not None:
        return status != _IDLE
    flags = getattr(driver, "server_status", None)  # PyMySQL, asyncmy
    return bool(flags & _MYSQL_IN_TRANSACTION) if isinstance(flags, int) else None


_IDLE, _IN_ERROR = 0, 3
"""libpq's numbers, as psycopg and psycopg2 tell them."""
_MYSQL_IN_TRANSACTION = 1
"""SERVER_STATUS_IN_TRANS of the protocol."""


def _transaction_status(driver: Any) -> int | None:
    status: int | None = getattr(getattr(driver, "info", None), "transaction_status", None)
    return status


def is_aborted(connection: Connection) -> bool:
    """Tell whether PostgreSQL would answer a COMMIT by a rollback, and no error; asyncpg does not know."""
    status = _transaction_status(_driver(connection))
    if status is None and had_error(connection):
        connection.exec_driver_sql("SELECT 1")  # refused, if it is so
    return status == _IN_ERROR
