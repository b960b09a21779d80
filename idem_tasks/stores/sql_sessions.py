"""A SQLAlchemy session of the user's, whose one commit makes the handler's writes and its outcome true together.

Written once, as plain functions of a `Session`: called directly, or through `AsyncSession.run_sync`.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar
from weakref import WeakSet

from sqlalchemy import Connection, Dialect, ExceptionContext, Table, event
from sqlalchemy.exc import SQLAlchemyError, UnboundExecutionError
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from idem_tasks.claims import EncodedOutcome, Finished, Lease, Lost, Recorded
from idem_tasks.errors import ConfigurationError, StoreError
from idem_tasks.runtime import interruption_in
from idem_tasks.stores import sql_claims, sql_errors
from idem_tasks.stores.base import RuntimeName
from idem_tasks.stores.sql_errors import Fault
from idem_tasks.stores.sql_statements import Statements
from idem_tasks.stores.sql_urls import shown

T = TypeVar("T")

_UNSEEN = (Fault.MISSING_TABLE, Fault.UNKNOWN_COLUMN, Fault.NO_SCHEMA, Fault.SQLITE_STATEMENT)
"""Answers of a database that has no such record because it has no such table."""


def _asyncio(name: str) -> type[Any] | tuple[()]:
    """Return a class of SQLAlchemy's asyncio extension; nothing is one of it while nobody has imported that."""
    module = sys.modules.get("sqlalchemy.ext.asyncio")
    return () if module is None else getattr(module, name)


class Sessions:
    """What was given as `session=`: it makes the sessions of one handler, or finds them.

    Raises `ConfigurationError` for what gives none, and for sessions of the other runtime where that can be told.
    """

    def __init__(self, source: Any, runtime: RuntimeName) -> None:
        self._source = source
        self._runtime = runtime
        if not callable(source):
            raise ConfigurationError(
                f"session= takes a sessionmaker, or a callable that returns a Session, not {_named(source)}"
            )
        if isinstance(source, (_asyncio("async_sessionmaker"), _asyncio("async_scoped_session"))):
            self._check_runtime("asyncio", source)
        elif isinstance(source, sessionmaker | scoped_session):
            self._check_runtime("blocking", source)

    def open(self, given: Any) -> tuple[Any, bool]:
        """Return a session and whether it was made here, so that it is to be closed here."""
        session = self._source() if given is None else given
        if isinstance(session, (scoped_session, _asyncio("async_scoped_session"))):
            session = session()  # that of this thread or task; the finish may run in a task of its own
        if isinstance(session, _asyncio("AsyncSession")):
            self._check_runtime("asyncio", session)
        elif isinstance(session, Session):
            self._check_runtime("blocking", session)
        else:
            given_as = "what session= returned" if given is None else "the argument session"
            raise ConfigurationError(f"{given_as} is {_named(session)}, not a Session of SQLAlchemy")
        return session, given is None and isinstance(self._source, (sessionmaker, _asyncio("async_sessionmaker")))

    def unfenced(self, given: Any) -> UnfencedTransaction:
        """Return a transaction that no claim guards; `given` is the caller's own session, if there is one."""
        return UnfencedTransaction(self, given)

    def _check_runtime(self, runtime: RuntimeName, source: Any) -> None:
        if runtime != self._runtime:
            handler, fitting = (
                ("a def handler", "sessionmaker")
                if runtime == "asyncio"
                else ("an async def one", "async_sessionmaker")
            )
            raise ConfigurationError(f"{_named(source)} does not serve {handler}; give a {fitting}")


def _named(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


class UnfencedTransaction:
    """A session that is committed for its handler, with no record: disabled, in shadow, or while there is no store."""

    commit_begun = False
    may_be_committed = False

    def __init__(self, sessions: Sessions, given: Any) -> None:
        self._sessions = sessions
        self._given = given
        self._made = False
        self.session: Any = None

    @property
    def is_cut_off(self) -> bool:
        """Whether the connection on which it was begun broke; False where that is not for us to know."""
        return False

    async def begin(self) -> Finished | Lost | None:
        """Take the session; whatever transaction it is in is not ours to judge here."""
        self.session, self._made = self._sessions.open(self._given)
        return None

    async def commit(self, outcome: EncodedOutcome) -> bool:
        """Commit what the handler wrote."""
        self.commit_begun = True
        await self._do(Session.commit)
        return True

    async def roll_back(self, *, throw_away: bool) -> None:
        """Undo what is not committed."""
        if self.session is not None:
            # A statement may be under way, whose answer the next user of the connection would take for his own.
            await self._do(Session.invalidate if throw_away else _roll_back)

    async def look(self) -> Recorded | Finished | Lost | None:
        """Return None: there is no record to look at."""
        return None

    async def close(self) -> None:
        """End the session, if it was made here."""
        if self._made:
            await self._do(Session.close)

    def is_conflict(self, error: BaseException) -> bool:
        """Tell whether a deadlock or a serialization failure undid everything."""
        return sql_errors.is_conflict(error)

    def check_steps(self) -> None:
        """Do nothing: without a claim there is no journal, and a step just runs."""

    def untouched(self) -> AbstractContextManager[None]:
        """Refuse nothing."""
        return nullcontext()

    async def _do(self, work: Callable[[Session], T]) -> T:
        if isinstance(self.session, Session):
            return work(self.session)
        done: T = await self.session.run_sync(work)
        return done


class FencedTransaction(UnfencedTransaction):
    """A session in which the handler's writes and its outcome are committed together, under the fence of a lease."""

    def __init__(
        self,
        sessions: Sessions,
        given: Any,
        *,
        lease: Lease,
        table: Table,
        address: str,
        statements: Callable[[Connection], Statements],
        look: Callable[[], Awaitable[Recorded | Finished | Lost | None]],
    ) -> None:
        super().__init__(sessions, given)
        self._lease = lease
        self._table = table
        self._address = address
        self._statements = statements
        self._look = look
        self._refused: ConfigurationError | None = None
        self._begun = False
        self._is_sqlite = False
        self._bound: Connection | None = None

    # Begin

    async def begin(self) -> Finished | Lost | None:
        """Begin, and see to it that the record is there under this claim; tell who has it if it is not."""
        await super().begin()
        seen, bound_to = await self._do(self._begin)
        if seen:
            return None
        await self.roll_back(throw_away=False)
        answer = await self._look()
        if answer is None:
            raise ConfigurationError(
                f"session= is bound to {bound_to}, and the records are in {self._address}: "
                "they have to be in one database, or they cannot be committed together"
            )
        return Lost() if isinstance(answer, Recorded) else answer

    def _begin(self, session: Session) -> tuple[bool, str]:
        if session.in_transaction():
            raise ConfigurationError(
                "the session has begun a transaction already, so its writes would not be this handler's alone: "
                "commit or roll back before the call"
            )
        event.listen(session, "before_commit", self._before_commit)
        self._begun = True
        session.begin()
        before = sys.exception()
        try:
            self._bound = connection = self._connection(session)
            _refuse_autocommit(connection)
            _watch(connection)
            sql = self._statements(connection)
            self._is_sqlite = sql.kind == "sqlite"
            bound_to = shown(connection.engine.url)
            seen = sql_claims.is_seen(sql, connection, self._lease)
            if self._is_sqlite and seen and not _is_in_transaction(connection):
                raise _autocommit()
        except SQLAlchemyError as error:
            if interruption_in(error, before) is not None:
                raise
            fault = sql_errors.fault_of(error)
            if fault in _UNSEEN:
                return False, shown(session.get_bind(clause=self._table).engine.url)
            raise self._explained(error) from error
        return seen, bound_to

    def _connection(self, session: Session) -> Connection:
        try:
            return session.connection(bind_arguments={"clause": self._table})
        except UnboundExecutionError as error:
            raise ConfigurationError(
                f"the session does not know in which database {self._table.fullname} is: "
                "give session= a sessionmaker(bind=engine), or a bind for that table"
            ) from error

    def _before_commit(self, session: Session) -> None:
        """Let nobody else commit: rows without their outcome would be there again at the next delivery (F63)."""
        if self.commit_begun or session.in_nested_transaction():
            return
        self._refused = ConfigurationError(
            "a handler with session= must not commit: its rows are committed with its outcome once it returns; "
            "take session.begin_nested() for a part that may fail, or a session of its own for what must stay"
        )
        raise self._refused

    # Commit

    async def commit(self, outcome: EncodedOutcome) -> bool:
        """Write the outcome as the last thing and commit; False, and nothing is committed, if the fence missed."""
        if self._refused is not None:
            raise self._refused
        self.commit_begun = True
        return await self._do(partial(self._commit, outcome))

    def _commit(self, outcome: EncodedOutcome, session: Session) -> bool:
        before = sys.exception()
        try:
            session.flush()
            connection = self._connection(session)
            _refuse_remainder(connection)
            if not sql_claims.write_finish(self._statements(connection), connection, self._lease, outcome):
                return False
            self.may_be_committed = True
            session.commit()
        except SQLAlchemyError as error:
            if interruption_in(error, before) is not None or sql_errors.fault_of(error) is not Fault.UNAVAILABLE:
                raise
            raise self._explained(error) from error
        return True

    @property
    def is_cut_off(self) -> bool:
        """Whether the connection on which it was begun broke."""
        return self._bound is not None and self._bound.invalidated

    async def roll_back(self, *, throw_away: bool) -> None:
        """Undo everything that is not committed, unless it was begun by somebody else."""
        if self._begun:
            # In SQLite nothing is ever under way, and a database in memory is gone with its connection.
            await super().roll_back(throw_away=throw_away and not self._is_sqlite)

    async def look(self) -> Recorded | Finished | Lost | None:
        """Tell, on a connection of the store's own, how this ended; None: nothing is committed, the claim stands."""
        return await self._look()

    async def close(self) -> None:
        """Leave the session as it was found, or end it if it was made here."""
        if self._begun:
            self._begun = False
            event.remove(getattr(self.session, "sync_session", self.session), "before_commit", self._before_commit)
        await super().close()

    # Steps

    def check_steps(self) -> None:
        """Raise `ConfigurationError` on SQLite, where this transaction alone may write to the file."""
        if self._is_sqlite:
            raise ConfigurationError(
                "on SQLite a handler with session= has no steps: its transaction keeps everybody else from writing, "
                "their journal too; take a database server, or one of the two"
            )

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Raise `ConfigurationError` for whatever is done in the session meanwhile, and refuse to commit then."""
        session: Session = getattr(self.session, "sync_session", self.session)
        connection, before = self._connection(session), _changed(session)
        watched: tuple[tuple[Any, str], ...] = ((session, "before_attach"), (connection, "before_cursor_execute"))
        for target, name in watched:
            event.listen(target, name, self._refuse_in_step)
        try:
            yield
            if _changed(session) != before:
                self._refuse_in_step()
        finally:
            for target, name in watched:
                event.remove(target, name, self._refuse_in_step)

    def _refuse_in_step(self, *_: Any) -> None:
        self._refused = ConfigurationError(
            "a step must not use the session: what it writes would be missing where the step is replayed, because its "
            "outcome is committed apart from the session; write it outside of the step"
        )
        raise self._refused

    def _explained(self, error: Exception) -> StoreError | Exception:
        fault = sql_errors.fault_of(error)
        return error if fault is None else sql_errors.error_for(fault, self._address, self._table.fullname)


def _changed(session: Session) -> set[int]:
    """Tell which objects are to be written at the next flush."""
    return {id(each) for each in (*session.new, *session.dirty, *session.deleted)}


def _roll_back(session: Session) -> None:
    """Undo what is not committed; a session that was struck in the middle of its commit can only be closed."""
    try:
        session.rollback()
    except SQLAlchemyError:
        session.invalidate()


def _refuse_autocommit(connection: Connection) -> None:
    """Ask the driver, which asks nobody; SQLite is asked after its first write, for it may be begun by hand."""
    if connection.dialect.name == "sqlite":
        return
    dbapi_connection: Any = connection.connection.dbapi_connection
    if connection.dialect.detect_autocommit_setting(dbapi_connection):
        raise _autocommit()


_UNDONE = "idem_tasks_undone"
_watched: WeakSet[Dialect] = WeakSet()


def _watch(connection: Connection) -> None:
    """Note conflicts from now on, also those that a handler swallows; once for each engine."""
    if connection.dialect not in _watched:
        _watched.add(connection.dialect)
        event.listen(connection.engine, "handle_error", _note_conflict)


def _note_conflict(context: ExceptionContext) -> None:
    connection, error = context.connection, context.sqlalchemy_exception
    if connection is not None and sql_errors.is_conflict(error):
        connection.info[_UNDONE] = connection.get_transaction(), error


def _refuse_remainder(connection: Connection) -> None:
    """Raise the deadlock that a handler swallowed: MariaDB and MySQL undid all before it, and would commit the rest.

    PostgreSQL refuses everything after it; a handler that rolled back by itself has begun another transaction.
    """
    transaction, error = connection.info.pop(_UNDONE, (None, None))
    if error is not None and transaction is connection.get_transaction() and connection.dialect.name in _MYSQL_FAMILY:
        raise error


_MYSQL_FAMILY = ("mysql", "mariadb")


def _is_in_transaction(connection: Connection) -> bool:
    driver: Any = connection.connection.driver_connection
    return bool(driver.in_transaction)


def _autocommit() -> ConfigurationError:
    return ConfigurationError(
        "session= is bound to an engine in AUTOCOMMIT, where each of the handler's writes is committed by itself; "
        "bind it to one with transactions"
    )
