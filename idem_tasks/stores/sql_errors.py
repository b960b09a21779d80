"""What an error of a database or its driver means, told by SQLSTATE and error number and never by its text (F39)."""

from __future__ import annotations

import sqlite3
from enum import Enum, auto

from sqlalchemy import exc

from idem_tasks.errors import IdemTasksError, StoreConfigurationError, StoreError, StoreUnavailableError


class Fault(Enum):
    """What went wrong, as far as it matters here."""

    UNAVAILABLE = auto()
    POOL_EXHAUSTED = auto()
    LOCKED = auto()
    CONFLICT = auto()
    MISSING_TABLE = auto()
    UNKNOWN_COLUMN = auto()
    SQLITE_STATEMENT = auto()
    READ_ONLY = auto()
    DENIED = auto()
    NO_DATABASE = auto()
    NO_SCHEMA = auto()
    NO_FILE = auto()
    OTHER = auto()


class RowLockedError(StoreUnavailableError):
    """Another transaction held the record for longer than is waited; try again."""


class MissingTableError(StoreConfigurationError):
    """The tables have not been made."""


class StatementRefusedError(StoreError):
    """SQLite refused the statement; it has one code for all reasons, a missing table among them."""


_SQLSTATES = {
    "55P03": Fault.LOCKED,
    "40001": Fault.CONFLICT,
    "40P01": Fault.CONFLICT,
    "42P01": Fault.MISSING_TABLE,
    "3F000": Fault.NO_SCHEMA,
    "42703": Fault.UNKNOWN_COLUMN,
    "25006": Fault.READ_ONLY,
    "42501": Fault.DENIED,
    "28000": Fault.DENIED,
    "28P01": Fault.DENIED,
    "3D000": Fault.NO_DATABASE,
    "57014": Fault.UNAVAILABLE,  # cancelled, as by statement_timeout
}
_UNAVAILABLE_CLASSES = ("08", "53", "57P", "58")
"""Lost connection; out of connections, memory or disk; shut down or starting; trouble outside the server."""

_MYSQL_NUMBERS = {
    1205: Fault.LOCKED,
    3572: Fault.LOCKED,
    1213: Fault.CONFLICT,
    1020: Fault.CONFLICT,
    1146: Fault.MISSING_TABLE,
    1054: Fault.UNKNOWN_COLUMN,
    1290: Fault.READ_ONLY,
    1792: Fault.READ_ONLY,
    1836: Fault.READ_ONLY,
    1044: Fault.DENIED,
    1045: Fault.DENIED,
    1142: Fault.DENIED,
    1143: Fault.DENIED,
    1698: Fault.DENIED,
    1049: Fault.NO_DATABASE,
}

_MYSQL_UNAVAILABLE = frozenset(
    {1021, 1040, 1041, 1053, 1114, 1152, 1158, 1159, 1160, 1161, 1203, 1226, 1317, 1927, 1969, 3024, 4031}
)
"""Out of disk, memory or connections; shut down, interrupted or cut off."""

_SQLITE_CODES = {
    sqlite3.SQLITE_ERROR: Fault.SQLITE_STATEMENT,
    sqlite3.SQLITE_BUSY: Fault.LOCKED,
    sqlite3.SQLITE_BUSY_SNAPSHOT: Fault.CONFLICT,
    sqlite3.SQLITE_LOCKED: Fault.LOCKED,
    sqlite3.SQLITE_READONLY: Fault.READ_ONLY,
    sqlite3.SQLITE_PERM: Fault.NO_FILE,
    sqlite3.SQLITE_CANTOPEN: Fault.NO_FILE,
    sqlite3.SQLITE_NOTADB: Fault.NO_FILE,
    sqlite3.SQLITE_IOERR: Fault.UNAVAILABLE,
    sqlite3.SQLITE_FULL: Fault.UNAVAILABLE,
}


def fault_of(error: Exception) -> Fault | None:
    """Return what the error means; None if it is not the database's or its driver's."""
    if isinstance(error, IdemTasksError):
        return None
    if isinstance(error, exc.TimeoutError):
        return Fault.POOL_EXHAUSTED
    if isinstance(error, exc.DBAPIError):
        if error.connection_invalidated:
            return Fault.UNAVAILABLE
        # Without a code it is the driver that speaks: it could not connect, or the connection broke.
        lost = isinstance(error, exc.OperationalError | exc.InterfaceError)
        return _fault_of_driver(error.orig) or (Fault.UNAVAILABLE if lost else Fault.OTHER)
    if isinstance(error, exc.SQLAlchemyError):
        return Fault.OTHER
    # While it connects, asyncpg raises its own errors and the system's.
    return _fault_of_driver(error) or (Fault.UNAVAILABLE if isinstance(error, OSError) else None)


def _fault_of_driver(error: BaseException | None) -> Fault | None:
    # MySQL's numbers come first: its SQLSTATEs, which some drivers tell too, say less.
    number = error.args[0] if error is not None and error.args else None
    if isinstance(number, int) and not isinstance(error, OSError):
        return _fault_of_mysql(number)
    sqlstate = getattr(error, "sqlstate", None)
    if isinstance(sqlstate, str):
        unavailable = sqlstate.startswith(_UNAVAILABLE_CLASSES)
        return _SQLSTATES.get(sqlstate, Fault.UNAVAILABLE if unavailable else Fault.OTHER)
    code = getattr(error, "sqlite_errorcode", None)
    if isinstance(code, int):
        # Most are told by the low byte; the rest tells more than is needed.
        return _SQLITE_CODES.get(code) or _SQLITE_CODES.get(code & 0xFF, Fault.OTHER)
    return None


def _fault_of_mysql(number: int) -> Fault:
    # Below 1,000 it is the system's errno, or 0 for a closed connection; in 2,000 to 2,999 the client's own.
    if number < 1000 or 2000 <= number < 3000 or number in _MYSQL_UNAVAILABLE:
        return Fault.UNAVAILABLE
    return _MYSQL_NUMBERS.get(number, Fault.OTHER)


def is_conflict(error: BaseException | None) -> bool:
    """Tell whether a deadlock or a serialization failure is behind an error: all of its transaction is undone."""
    for _ in range(_CHAIN_LIMIT):
        if not isinstance(error, Exception):
            return False
        if fault_of(error) is Fault.CONFLICT:
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


_CHAIN_LIMIT = 50


def is_aborted(error: BaseException) -> bool:
    """Tell whether PostgreSQL refused a statement because an earlier one of its transaction had failed."""
    return isinstance(error, exc.DBAPIError) and getattr(error.orig, "sqlstate", None) == "25P02"


def is_lost_connection(error: Exception) -> bool:
    """Tell whether the connection broke under a statement, which may or may not have been carried out."""
    return isinstance(error, exc.DBAPIError) and error.connection_invalidated


def why_not_connected(error: Exception) -> str:
    """Return the server's or driver's own words where no connection was made; else nothing.

    psycopg has no SQLSTATE for a refused password. Words about a statement might quote its parameters; there is none.
    """
    if not isinstance(error, exc.DBAPIError) or error.statement is not None or error.connection_invalidated:
        return ""
    lines = str(error.orig).strip().splitlines()
    return f" ({lines[0][:300]})" if lines else ""


def error_for(fault: Fault, address: str, tables: str, why: str = "") -> StoreError:
    """Return our own error; it says what to do and quotes no parameters. `why` is what `why_not_connected` says.

    `tables` is what the names of the tables begin with, as in jobs.idem_tasks_*.
    """
    match fault:
        case Fault.LOCKED:
            return RowLockedError(f"{address}: the record is locked by another transaction; try again")
        case Fault.CONFLICT:
            return StoreUnavailableError(f"{address}: other transactions stood in the way several times; try again")
        case Fault.MISSING_TABLE:
            return MissingTableError(
                f"{address} lacks tables {tables}; make them by: idem-tasks init-db --database-url URL"
            )
        case Fault.UNKNOWN_COLUMN:
            return StoreConfigurationError(
                f"{address}: the tables {tables} are of an older version; "
                "bring them up to date by: idem-tasks init-db --database-url URL"
            )
        case Fault.READ_ONLY:
            return StoreError(
                f"{address} is read-only, perhaps a replica; point the database URL to the primary server, "
                "or let this user write"
            )
        case Fault.DENIED:
            return StoreConfigurationError(
                f"{address} refuses this user; check the user and password in the database URL, and that the user "
                f"may SELECT, INSERT, UPDATE and DELETE in {tables}"
            )
        case Fault.NO_DATABASE:
            return StoreConfigurationError(f"{address}: there is no such database; check the database URL or create it")
        case Fault.NO_SCHEMA:
            schema = tables.rpartition(".")[0] or "of that name"
            return StoreConfigurationError(f"{address} has no schema {schema}; create it first: CREATE SCHEMA {schema}")
        case Fault.NO_FILE:
            return StoreConfigurationError(
                f"{address} cannot be opened; check that its folder exists and may be written to, and that the file "
                "is an SQLite database"
            )
        case Fault.POOL_EXHAUSTED:
            return StoreUnavailableError(f"{address}: all connections of this process are in use; try again")
        case Fault.UNAVAILABLE:
            return StoreUnavailableError(
                f"{address} cannot be reached{why}; check that it runs, and the host, port, user, password and "
                "database in its URL"
            )
        case Fault.SQLITE_STATEMENT:
            return StatementRefusedError(f"{address} answered with an error; its cause is attached")
        case Fault.OTHER:  # pragma: no branch - there is no other fault
            return StoreError(f"{address} answered with an error; its cause is attached")
