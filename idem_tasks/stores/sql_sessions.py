"""A SQLAlchemy session of the user's, whose one commit makes the handler's writes and its outcome true together.

Written once, as plain functions of a `Session`: called directly, or through `AsyncSession.run_sync`.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, NoReturn, TypeVar

from sqlalchemy import Connection, Engine, Table, Transaction, event
from sqlalchemy.exc import SQLAlchemyError, UnboundExecutionError
from sqlalchemy.orm import Session, SessionTransaction, scoped_session, sessionmaker

from idem_tasks.claims import EncodedOutcome, Finished, Lease, Lost, Recorded
from idem_tasks.errors import ConfigurationError, StoreError
from idem_tasks.runtime import interruption_in
from idem_tasks.stores import sql_batches, sql_errors
from idem_tasks.stores.base import RuntimeName
from idem_tasks.stores.sql_errors import Fault
from idem_tasks.stores.sql_statements import Statements
from idem_tasks.stores.sql_transactions import (
    autocommit,
    begins,
    commits,
    had_error,
    is_aborted,
    is_in_transaction,
    is_open,
    locks_what_it_reads,
    refuse_autocommit,
    refuse_remainder,
    undone,
    watch,
    without_parameters,
)
from idem_tasks.stores.sql_urls import shown

T = TypeVar("T")

_UNSEEN = (Fault.MISSING_TABLE, Fault.UNKNOWN_COLUMN, Fault.NO_SCHEMA, Fault.SQLITE_STATEMENT)
"""Answers of a database that has no such record because it has no such table."""


_MUST_NOT_COMMIT = (
    "a handler with session= must not commit: its rows are committed with its outcome once it returns; "
    "take session.begin_nested() for a part that may fail, or a session of its own for what must stay"
)


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
        """Tell what became of the commit."""
        raise NotImplementedError  # nobody asks: without a record nothing says so, and a commit that failed is raised

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


class GuardedTransaction(UnfencedTransaction):
    """A session in which the handler's writes are committed together with ours, by us and by nobody else."""

    def __init__(
        self,
        sessions: Sessions,
        given: Any,
        *,
        table: Table,
        address: str,
        statements: Callable[[Connection], Statements],
    ) -> None:
        super().__init__(sessions, given)
        self._table = table
        self._address = address
        self._statements = statements
        self._refused: ConfigurationError | None = None
        self._begun = False
        self._is_sqlite = False
        self._in_step = False
        self._bound: Connection | None = None
        self._guarded: list[Connection] = []
        self._open: Transaction | None = None

    # Begin

    def _see(self, sql: Statements, connection: Connection) -> bool:
        """Do what the transaction begins with; False if it does not see there what is ours."""
        raise NotImplementedError  # records see their leases, a mark its partition: each kind below has its own

    def _begin(self, session: Session) -> tuple[bool, str]:
        """Begin; tell whether it sees what is ours, and where it is bound to."""
        if session.in_transaction():
            raise ConfigurationError(
                "the session has begun a transaction already, so its writes would not be this handler's alone: "
                "commit or roll back before the call"
            )
        self._check_source(session)
        event.listen(session, "before_commit", self._before_commit)
        event.listen(session, "after_begin", self._after_begin)
        self._begun = True
        session.begin()
        before = sys.exception()
        try:
            self._bound = connection = self._connection(session)
            refuse_autocommit(connection)
            watch(connection)
            sql = self._statements(connection)
            self._is_sqlite = sql.kind == "sqlite"
            bound_to = _shown(connection)
            with without_parameters():
                seen = self._see(sql, connection)
            if self._is_sqlite and seen and not is_in_transaction(connection):
                raise autocommit()
            self._guard(connection)
        except SQLAlchemyError as error:
            struck = interruption_in(error, before)
            if struck is not None:
                # SQLAlchemy wraps what strikes within it: as itself, or a framework would not know its own time limit.
                raise struck from None
            fault = sql_errors.fault_of(error)
            if fault in _UNSEEN:
                return False, _shown(session.get_bind(clause=self._table))
            raise self._explained(error) from error
        return seen, bound_to

    def _check_source(self, session: Session) -> None:
        if session.twophase:
            raise ConfigurationError(
                "session= makes sessions with twophase=True: a worker that dies between its two commits leaves its "
                "rows locked, and their fate to somebody else; make them without it"
            )
        with suppress(UnboundExecutionError):  # of which is told where it is connected
            bind = session.get_bind(clause=self._table)
            if isinstance(bind, Connection) and bind.in_transaction():
                raise ConfigurationError(
                    "the session is bound to a connection that is in a transaction already, whose owner could undo "
                    "what counts as recorded: bind it to the engine, or to a connection that has begun nothing"
                )

    def _connection(self, session: Session) -> Connection:
        try:
            return session.connection(bind_arguments={"clause": self._table})
        except UnboundExecutionError as error:
            raise ConfigurationError(
                f"the session does not know in which database {self._table.fullname} is: "
                "give session= a sessionmaker(bind=engine), or a bind for that table"
            ) from error

    # While the handler runs

    def _before_commit(self, session: Session) -> None:
        """Let nobody else commit: rows without their outcome would be there again at the next delivery (F63)."""
        if not (self.commit_begun or session.in_nested_transaction()):
            self._refuse(_MUST_NOT_COMMIT)

    def _after_begin(self, _session: Session, _transaction: SessionTransaction, connection: Connection) -> None:
        """Guard the next connection too, once a handler has rolled back."""
        if self._bound is None or connection in self._guarded or connection.engine is not self._bound.engine:
            return
        try:
            refuse_autocommit(connection)
        except ConfigurationError as refused:
            self._refused = refused
            raise
        self._bound = connection
        self._guard(connection)

    def _guard(self, connection: Connection) -> None:
        self._guarded.append(connection)
        for name, listener in self._listeners():
            event.listen(connection, name, listener)
        self._see_whether_open(connection)

    def _listeners(self) -> tuple[tuple[str, Callable[..., None]], ...]:
        return (
            ("before_cursor_execute", self._before_statement),
            ("after_cursor_execute", self._see_whether_open),
            ("commit", self._before_commit_of_connection),
        )

    def _before_statement(self, connection: Connection, _cursor: object, statement: str, *_: object) -> None:
        if self._in_step:
            self._refuse_in_step()
        self._see_whether_open(connection)
        if not self.may_be_committed and commits(connection, statement):
            words = " ".join(statement.split()[:2])
            self._refuse(f"{words} commits what was written before it, but {_MUST_NOT_COMMIT}")
        # Python's sqlite3 begins with the first INSERT or so. A savepoint that comes before it is a transaction of its
        # own, and its end a commit.
        if self._is_sqlite and not is_in_transaction(connection) and not begins(statement):
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    def _before_commit_of_connection(self, connection: Connection) -> None:
        """Let nobody commit past the session, and do not take for a commit what PostgreSQL answers by a rollback."""
        refused = self._refused if self.may_be_committed else ConfigurationError(_MUST_NOT_COMMIT)
        if refused is None and connection.dialect.name == "postgresql" and is_aborted(connection):
            refused = _swallowed()
        if refused is None:
            return
        self._refused = refused
        # SQLAlchemy takes the transaction for ended whatever becomes of this commit, and would not roll it back.
        with suppress(connection.dialect.loaded_dbapi.Error):
            connection.dialect.do_rollback(connection.connection)
        raise refused

    def _see_whether_open(self, connection: Connection, *_: object) -> None:
        """See that nothing ended the transaction behind SQLAlchemy's back; drivers know, and ask nobody."""
        transaction, now_open = connection.get_transaction(), is_open(connection)
        if now_open:
            self._open = transaction
        elif now_open is False and transaction is not None and transaction is self._open and not undone(connection):
            self._refuse(
                "the handler's transaction was ended by a statement or through the driver, so that what was written "
                f"before may be committed already, without its outcome; {_MUST_NOT_COMMIT}"
            )

    def _refuse(self, why: str) -> NoReturn:
        self._refused = ConfigurationError(why)
        raise self._refused

    # Commit

    async def finish(self, write: Callable[[Statements, Connection], list[bool]]) -> list[bool]:
        """Write what is ours as the last thing and commit, unless any of it could not be written, as `write` tells."""
        if self._refused is not None:
            raise self._refused
        self.commit_begun = True
        return await self._do(partial(self._commit, write))

    def _commit(self, write: Callable[[Statements, Connection], list[bool]], session: Session) -> list[bool]:
        before = sys.exception()
        try:
            session.flush()
            connection = self._connection(session)
            refuse_remainder(connection)
            had_error(connection)  # what was before the finish is told by the finish
            with without_parameters():
                written = write(self._statements(connection), connection)
            if not all(written):
                return written
            self.may_be_committed = True
            session.commit()
        except SQLAlchemyError as error:
            struck = interruption_in(error, before)
            if struck is not None:
                raise struck from None
            if sql_errors.is_aborted(error):
                raise _swallowed() from error
            if sql_errors.fault_of(error) is not Fault.UNAVAILABLE:
                raise
            raise self._explained(error) from error
        return written

    @property
    def is_cut_off(self) -> bool:
        """Whether the connection on which it was begun broke."""
        return self._bound is not None and self._bound.invalidated

    async def roll_back(self, *, throw_away: bool) -> None:
        """Undo everything that is not committed, unless it was begun by somebody else."""
        if self._begun:
            # In SQLite nothing is ever under way, and a database in memory is gone with its connection.
            await super().roll_back(throw_away=throw_away and not self._is_sqlite)

    async def close(self) -> None:
        """Leave the session as it was found, or end it if it was made here."""
        if self._begun:
            self._begun = False
            session = getattr(self.session, "sync_session", self.session)
            event.remove(session, "before_commit", self._before_commit)
            event.remove(session, "after_begin", self._after_begin)
            for connection in self._guarded:
                for name, listener in self._listeners():
                    event.remove(connection, name, listener)
            self._guarded.clear()
        await super().close()

    # Steps

    def check_steps(self) -> None:
        """Raise `ConfigurationError` where this transaction keeps the journal from being written."""
        if self._is_sqlite:
            raise ConfigurationError(
                "on SQLite a handler with session= has no steps: its transaction keeps everybody else from writing, "
                "their journal too; take a database server, or one of the two"
            )
        if self._bound is not None and locks_what_it_reads(self._bound):
            raise ConfigurationError(
                "at SERIALIZABLE on MySQL and MariaDB a handler with session= has no steps: its transaction locks the "
                "record, for which their journal would wait; take another isolation level, or one of the two"
            )

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Raise `ConfigurationError` for whatever is done in the session meanwhile, and refuse to commit then."""
        session: Session = getattr(self.session, "sync_session", self.session)
        before = _changed(session)
        event.listen(session, "before_attach", self._refuse_in_step)
        self._in_step = True
        try:
            yield
            if _changed(session) != before:
                self._refuse_in_step()
        finally:
            self._in_step = False
            event.remove(session, "before_attach", self._refuse_in_step)

    def _refuse_in_step(self, *_: Any) -> None:
        self._refuse(
            "a step must not use the session: what it writes would be missing where the step is replayed, because its "
            "outcome is committed apart from the session; write it outside of the step"
        )

    def _explained(self, error: Exception) -> StoreError | Exception:
        fault = sql_errors.fault_of(error)
        return error if fault is None else sql_errors.error_for(fault, self._address, self._table.fullname)


class FencedTransaction(GuardedTransaction):
    """A session in which the handler's writes and its outcomes are committed together, each under its lease's fence.

    The verbs of `Transaction` are for one lease, which is nearly always so; those of `BatchTransaction` for any number.
    """

    def __init__(
        self,
        sessions: Sessions,
        given: Any,
        *,
        leases: Sequence[Lease],
        table: Table,
        address: str,
        statements: Callable[[Connection], Statements],
        look: Callable[[], Awaitable[list[Recorded | Finished | Lost | None]]],
    ) -> None:
        super().__init__(sessions, given, table=table, address=address, statements=statements)
        self._leases = leases
        self._look = look

    async def begin(self) -> Finished | Lost | None:
        """Begin, and see to it that the record is there under this claim; tell who has it if it is not."""
        [answer] = await self.begin_all()
        return answer

    async def begin_all(self) -> list[Finished | Lost | None]:
        """Begin, and see to it that all records are there under their claims; tell who has those that are not."""
        await super().begin()
        seen, bound_to = await self._do(self._begin)
        if seen:
            return [None] * len(self._leases)
        await self.roll_back(throw_away=False)
        answers = await self._look()
        if all(answer is None for answer in answers):
            raise ConfigurationError(
                f"session= is bound to {bound_to}, and the records are in {self._address}: "
                "they have to be in one database, or they cannot be committed together"
            )
        return [Lost() if isinstance(answer, Recorded) else answer for answer in answers]

    def _see(self, sql: Statements, connection: Connection) -> bool:
        return sql_batches.are_seen(sql, connection, self._leases)

    async def commit(self, outcome: EncodedOutcome) -> bool:
        """Write the outcome as the last thing and commit; False, and nothing is committed, if the fence missed."""
        return all(await self.commit_all([outcome]))

    async def commit_all(self, outcomes: Sequence[EncodedOutcome]) -> list[bool]:
        """Write the outcomes as the last thing and commit, unless a fence missed; tells of each whether it held."""
        finished = list(zip(self._leases, outcomes, strict=True))
        return await self.finish(lambda sql, connection: sql_batches.write_finishes(sql, connection, finished))

    async def look(self) -> Recorded | Finished | Lost | None:
        """Tell, on a connection of the store's own, how this ended; None: nothing is committed, the claim stands."""
        [answer] = await self.look_all()
        return answer

    async def look_all(self) -> list[Recorded | Finished | Lost | None]:
        """Tell of each what `look` tells of one."""
        return await self._look()


def _changed(session: Session) -> set[int]:
    """Tell which objects are to be written at the next flush."""
    return {id(each) for each in (*session.new, *session.dirty, *session.deleted)}


def _roll_back(session: Session) -> None:
    """Undo what is not committed; a session that was struck in the middle of its commit can only be closed."""
    try:
        session.rollback()
    except SQLAlchemyError:
        session.invalidate()


def _shown(bind: Connection | Engine) -> str:
    translates = bind.get_execution_options().get("schema_translate_map")
    moved = " (whose schema_translate_map is applied to the table of records too)" if translates else ""
    return f"{shown(bind.engine.url)}{moved}"


def _swallowed() -> ConfigurationError:
    return ConfigurationError(
        "a statement in the handler's session failed, and it went on: PostgreSQL has undone everything, and nothing is "
        "committed; take session.begin_nested() for a part that may fail"
    )
