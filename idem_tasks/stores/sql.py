"""Records in a database: the truth that all correctness rests on, whatever else there is."""

from __future__ import annotations

import copy
import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, get_args

from sqlalchemy import Connection, Engine, inspect

from idem_tasks.claims import (
    AuditEntry,
    ClaimAnswer,
    ClaimRequest,
    EncodedOutcome,
    Finished,
    Granted,
    InProgress,
    Lease,
    Lost,
    OutboxMessage,
    Record,
    Recorded,
    Release,
    Released,
    State,
    StepBegun,
    StepFinished,
    StepRecord,
    StepsDiffer,
    new_owner,
)
from idem_tasks.errors import ConfigurationError, StoreConfigurationError, StoreError, StoreUnavailableError
from idem_tasks.events import Announcer
from idem_tasks.runtime import Asyncio, Blocking, interruption_in
from idem_tasks.stores import (
    sql_admin,
    sql_audit,
    sql_batches,
    sql_claims,
    sql_relay,
    sql_renewals,
    sql_steps,
    sql_watermarks,
)
from idem_tasks.stores.base import (
    BatchTransaction,
    FailedSend,
    MarkerPending,
    MarkingTransaction,
    MarkPlace,
    RuntimeName,
    SessionSource,
    Transaction,
)
from idem_tasks.stores.schema import DEFAULT_PREFIX, audit_table, records_table, steps_table, watermarks_table
from idem_tasks.stores.sql_clients import Client, clients_for
from idem_tasks.stores.sql_errors import (
    Fault,
    MissingTableError,
    RowLockedError,
    StatementRefusedError,
    error_for,
    fault_of,
    is_lost_connection,
    why_not_connected,
)
from idem_tasks.stores.sql_statements import Kind, Statements, statements_for

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from idem_tasks.stores.sql_sessions import FencedTransaction

P = ParamSpec("P")
T = TypeVar("T")

_CONFLICTS = 5
"""How often work is begun again that a deadlock or a serialization failure ended."""

_CONFLICT_PAUSE = 0.05
"""Seconds, at most, before it is begun again; at random, so that the two do not meet again."""

_SCHEMA_WAIT = 60.0
"""Seconds to wait for another process that makes the tables just now."""

_SCHEMA_POLL = 0.1

_BATCH = 1000
"""Records in one statement. Measured on PostgreSQL: 1,000 are purged in 7 ms, 5,000 in 100 ms and on disk."""


class SQLStore:
    """Keeps records in SQLite, PostgreSQL, MariaDB or MySQL, and arbitrates claims on them.

    `url_or_engine`: a URL serves both runtimes, each with the driver it needs; an `Engine` only blocking handlers,
    an `AsyncEngine` only asyncio ones, in one event loop. An engine of yours keeps its own settings: give it a short
    lock timeout, READ COMMITTED and `hide_parameters`. SQLite files are turned to WAL with synchronous=NORMAL: a
    killed process loses nothing, a power cut perhaps the last commits. SQLite in memory is for one process, where
    each runtime has records of its own.

    `schema` and `table_prefix` say where the tables are. `create_schema` says whether they are made on first use:
    True always, False never (`idem-tasks init-db` makes them), None on SQLite only.

    `claim_commit`, on PostgreSQL: "durable" waits until a claim is on the server's disk before its handler begins;
    "auto" does not where a marker is held for it in Redis and the policy is `on_crash="rerun"`; "async" not where there
    is no marker either. A crash of the server can then forget claims of its last moments, never an outcome:
    docs/decisions/0009-durable-claims.md. Elsewhere, and for batches, every claim is durable.

    Connections are opened when first used, in each process and event loop, so a store may be made before a fork.
    Every verb may raise `StoreUnavailableError`, `StoreConfigurationError` or another `StoreError`; the constructor
    only `ConfigurationError`, for a URL that cannot work.
    """

    def __init__(
        self,
        url_or_engine: str | Engine | AsyncEngine,
        *,
        schema: str | None = None,
        table_prefix: str = DEFAULT_PREFIX,
        create_schema: bool | None = None,
        claim_commit: sql_claims.ClaimCommit = "durable",
    ) -> None:
        if claim_commit not in get_args(sql_claims.ClaimCommit):
            raise ConfigurationError(f"claim_commit={claim_commit!r} is none of 'durable', 'auto' and 'async'")
        self._claim_commit = claim_commit
        self._clients = clients_for(url_or_engine)
        self._schema = schema
        self._prefix = table_prefix
        self._creates_schema = create_schema
        self._table = records_table(schema, table_prefix)
        self._runtime: RuntimeName = next(iter(self._clients))
        self._siblings: dict[RuntimeName, SQLStore] = {self._runtime: self}

    @property
    def address(self) -> str:
        """Where the database is, without password."""
        return self._client.address

    @property
    def runtimes(self) -> frozenset[RuntimeName]:
        """The runtimes it can serve."""
        return frozenset(self._clients)

    def on(self, runtime: RuntimeName, announce: Announcer) -> SQLStore:
        """Return this store as `runtime` uses it, always the same one.

        Raises `ConfigurationError` if it was given an engine of the other runtime.
        """
        if runtime not in self._clients:
            needed = "an AsyncEngine" if runtime == "asyncio" else "an Engine"
            raise ConfigurationError(
                f"this SQLStore cannot serve {runtime} handlers: give it {needed}, or a URL, which serves both"
            )
        if runtime not in self._siblings:
            sibling = copy.copy(self)
            sibling._runtime = runtime  # noqa: SLF001 (its own kind)
            self._siblings[runtime] = sibling
        return self._siblings[runtime]

    # The verbs

    async def claim(self, request: ClaimRequest) -> ClaimAnswer:
        """Claim the record, or tell why not.

        One round trip and one commit for a first claim. A record locked by another transaction is `InProgress`
        after a short wait (F46).
        """
        try:
            return await self._run(sql_claims.claim, request, self._claim_commit)
        except RowLockedError:
            return InProgress(sql_claims.RETRY_AFTER_LOCK)

    async def decide(
        self, dead: Lease, request: ClaimRequest, outcome: EncodedOutcome | None
    ) -> Granted | Finished | Lost:
        """End the doubt about this dead claim: by this outcome, or (None) by granting the record to `request`."""
        return await self._run(sql_claims.decide, dead, request, outcome)

    async def renew(self, leases: Sequence[Lease], still_held: Callable[[str], bool]) -> frozenset[str]:
        """Extend these leases by their policy's `lease` from now; return the owners of those extended.

        1,000 at a time, so that a finish never waits long for its record: one round trip and one commit each on
        PostgreSQL and SQLite; on MariaDB and MySQL four round trips for every 500 leases of the same length.

        Locked records are passed over. While others write to an SQLite file for too long, none is extended: nor can
        any be taken over meanwhile.
        """
        renewed: frozenset[str] = frozenset()
        for start in range(0, len(leases), _BATCH):
            batch = [lease for lease in leases[start : start + _BATCH] if still_held(lease.owner)]
            try:
                renewed |= await self._run(sql_renewals.renew, batch)
            except RowLockedError:
                break
        return renewed

    async def finish(
        self, lease: Lease, outcome: EncodedOutcome, *, may_insert: bool = False
    ) -> Recorded | Finished | Lost:
        """Record the outcome under this lease's fence, in one round trip and one commit.

        With messages that is so on PostgreSQL; elsewhere they are inserted in the same transaction.

        With `may_insert` it is also written where the record is gone, never over one that is there.
        """
        return await self._run(sql_claims.finish, lease, outcome, may_insert)

    async def claim_batch(self, requests: Sequence[ClaimRequest]) -> list[ClaimAnswer | None]:
        """Claim all these records, 1,000 at a time: on PostgreSQL and MariaDB one round trip and one commit each.

        On SQLite and MySQL it takes two where a record was there. None for one that a single statement cannot decide,
        and for 1,000 of which one is locked for longer than is waited.
        """
        answers: list[ClaimAnswer | None] = []
        for start in range(0, len(requests), sql_batches.MOST_AT_ONCE):
            some = requests[start : start + sql_batches.MOST_AT_ONCE]
            try:
                answers += await self._run(sql_batches.claim, some)
            except RowLockedError:
                answers += [None] * len(some)
        return answers

    async def finish_batch(self, finished: Sequence[tuple[Lease, EncodedOutcome]]) -> list[Recorded | None]:
        """Record these outcomes, up to 1,000 and 4 MB at a time, in one round trip and one commit each.

        On MariaDB and MySQL a second one tells which fences missed, if any did; on SQLite each is a statement. None for
        one whose fence missed, and for all of a statement that met a lock for longer than is waited.
        """
        answers: list[Recorded | None] = []
        for some in sql_batches.cut(finished):
            try:
                answers += await self._run(sql_batches.finish, some)
            except RowLockedError:
                answers += [None] * len(some)
        return answers

    def transaction(self, lease: Lease, source: SessionSource, given: Any) -> Transaction:
        """Return a transaction in a session of the user's, whose commit records the outcome under this lease."""
        return self._transaction([lease], source, given)

    def batch_transaction(self, leases: Sequence[Lease], source: SessionSource, given: Any) -> BatchTransaction:
        """Return a transaction in a session of the user's, whose one commit records all outcomes, or none of them."""
        return self._transaction(leases, source, given)

    def _transaction(self, leases: Sequence[Lease], source: SessionSource, given: Any) -> FencedTransaction:
        from idem_tasks.stores.sql_sessions import FencedTransaction, Sessions  # the ORM: not everybody needs it

        assert isinstance(source, Sessions)
        return FencedTransaction(
            source,
            given,
            leases=leases,
            table=self._table,
            address=self._client.address,
            statements=self._statements,
            look=lambda: self._run(sql_batches.look, leases),
        )

    def finish_in(self, connection: Any, lease: Lease, outcome: EncodedOutcome) -> bool:
        """Write the outcome in the transaction of a connection of the user's; False if the fence missed."""
        from idem_tasks.stores.sql_connections import write_finish_in

        return write_finish_in(connection, self._schema, self._prefix, lease, outcome)

    async def look(self, lease: Lease, outcome: EncodedOutcome) -> Recorded | Finished | Lost | None:
        """Tell whether that transaction was committed; None: it was not, and the lease stands."""
        return await self._run(sql_claims.look, lease)

    async def keep_pending(self, lease: Lease, outcome: EncodedOutcome) -> bool:
        """Return False: a database that cannot be reached has no second place."""
        return False

    async def release(self, lease: Lease, release: Release) -> Released | Finished | Lost:
        """Give the claim up without an outcome, under the same fence as `finish`."""
        return await self._run(sql_claims.release, lease, release)

    async def begin_step(self, lease: Lease, position: int, name: str) -> StepBegun | StepFinished | StepsDiffer | Lost:
        """Write that the step begins, or return the outcome it has: one round trip (on MySQL two) and one commit."""
        return await self._run(sql_steps.begin, lease, position, name)

    async def finish_step(
        self, lease: Lease, position: int, name: str, outcome: EncodedOutcome
    ) -> Recorded | StepFinished | Lost:
        """Write the step's outcome unless it has one: one round trip (on MySQL two) and one commit."""
        return await self._run(sql_steps.finish, lease, position, name, outcome)

    async def steps(self, scope: str, key: str) -> list[StepRecord]:
        """Return the steps of the record's generation in their order: one round trip, and no outcome is read."""
        return await self._run(sql_steps.steps, scope, key)

    async def write_through(self, scope: str, key: str, pending: MarkerPending, retention: float) -> bool:
        """Record a pending outcome under the fence of the claim that made it; never inserts."""
        return await self._run(sql_claims.write_through, scope, key, pending, retention)

    async def get(self, scope: str, key: str) -> Record | None:
        """Return the record, or None."""
        return await self._run(sql_admin.get, scope, key)

    async def forget(
        self, scope: str, key: str, *, expect_token: int | None = None, actor: str = "", reason: str | None = None
    ) -> AuditEntry | None:
        """Delete the record, and write to the audit who did it, in one transaction; raises as `Store.forget` says."""
        return await self._run(sql_admin.forget, scope, key, expect_token, actor, reason)

    async def resolve(
        self,
        scope: str,
        key: str,
        outcome: EncodedOutcome | None,
        *,
        expect_token: int | None = None,
        actor: str = "",
        reason: str | None = None,
    ) -> AuditEntry | None:
        """End `in_doubt`, `parked` or an overdue `running`: by this outcome, or (None) by releasing it.

        The outcome is kept for at least the retention of the last claim. The audit is written in the same
        transaction. Raises as `Store.resolve` says.
        """
        return await self._run(sql_admin.resolve, scope, key, outcome, new_owner(), expect_token, actor, reason)

    async def audit(self, *, scope: str | None, key: str | None, limit: int) -> list[AuditEntry]:
        """Return what was done to the records of this scope and key, if given, the last first."""
        return await self._run(sql_audit.audit, scope, key, limit)

    async def records(
        self,
        *,
        state: State | None,
        scope: str | None,
        after: tuple[str, str] | None,
        limit: int,
        attention: bool = False,
    ) -> list[Record]:
        """Return up to `limit` records in the order of scope and key, by bytes, beginning after the given one.

        By the states `in_doubt`, `parked` and `failed` it uses a small index. By another state, and by `attention`
        alone, which counts overdue ones in, it reads the records of the scope if one is given, or else the table.
        """
        return await self._run(sql_admin.records, state, scope, after, limit, attention)

    async def stats(self) -> dict[State, int]:
        """Return how many records there are in each state. Reads the whole table."""
        return await self._run(sql_admin.stats)

    async def purge(self, *, limit: int, grace: float) -> list[tuple[str, str]]:
        """Delete up to `limit` records whose retention ended over `grace` seconds ago, 1,000 in a transaction."""
        purged: list[tuple[str, str]] = []
        while len(purged) < limit:
            wanted = min(limit - len(purged), _BATCH)
            batch = await self._run(sql_admin.purge, wanted, grace)
            purged += batch
            if len(batch) < wanted:
                break
        return purged

    @property
    def outbox(self) -> SQLOutbox:
        """The messages of recorded outcomes that wait to be sent, in a table beside the records."""
        return SQLOutbox(self)

    @property
    def watermarks(self) -> SQLWatermarks:
        """How far consumer groups have come in partitions, in a table beside the records."""
        return SQLWatermarks(self)

    def marked(self, place: MarkPlace, source: SessionSource, given: Any, max_hold: float) -> MarkingTransaction:
        """Return a transaction in a session of the user's, whose commit moves this mark."""
        from idem_tasks.stores.sql_marked_sessions import MarkedTransaction
        from idem_tasks.stores.sql_sessions import Sessions  # the ORM: not everybody needs it

        assert isinstance(source, Sessions)
        return MarkedTransaction(
            source,
            given,
            table=watermarks_table(self._schema, self._prefix),
            address=self._client.address,
            statements=self._statements,
            place=place,
            max_hold=max_hold,
        )

    # The tables

    async def prepare(self) -> None:
        """Bring the tables to the newest revision; does nothing if they are. Several processes may do so at once.

        Raises `StoreConfigurationError` for tables that a newer version of this library made.
        """
        if await self._try(self._are_newest):
            return
        until = time.monotonic() + _SCHEMA_WAIT
        while not await self._try(self._upgrade):
            if time.monotonic() > until:
                raise StoreUnavailableError(
                    f"{self._client.address}: another process has been making the tables for {_SCHEMA_WAIT:.0f} s"
                )
            await self._sleep(_SCHEMA_POLL)

    async def revision(self) -> str | None:
        """Return the number of the newest revision that the tables have, such as 0001; None where there are none."""
        return await self._try(self._revision)

    def _revision(self, sql: Statements, connection: Connection) -> str | None:
        from idem_tasks.stores.migrations import revision_of

        return revision_of(connection, self._schema, self._prefix)

    def _are_newest(self, sql: Statements, connection: Connection) -> bool:
        """Tell whether there is nothing to be made; raises `StoreConfigurationError` for tables that are newer."""
        from idem_tasks.stores.migrations.offline import newest_revision

        revision, newest = self._revision(sql, connection), newest_revision()
        if revision is not None and revision > newest:
            raise StoreConfigurationError(
                f"{self._client.address}: the tables {self._tables} were made by a newer version of idem_tasks: they "
                f"have version {revision}, and this one knows {newest}; upgrade idem_tasks here"
            )
        return revision == newest

    def _upgrade(self, sql: Statements, connection: Connection) -> bool:
        from idem_tasks.stores.migrations import upgrade  # Alembic is slow to import and seldom needed

        return upgrade(connection, self._schema, self._prefix)

    def _has_tables(self, connection: Connection) -> bool:
        of_them = (steps_table(self._schema, self._prefix), audit_table(self._schema, self._prefix))
        tables = (self._table, *of_them)
        return all(inspect(connection).has_table(table.name, schema=self._schema) for table in tables)

    # Running work

    async def close(self) -> None:
        """Close this runtime's connections (asyncio: those of the running loop); new ones are opened when needed."""
        await self._client.close()

    @property
    def _client(self) -> Client:
        return self._clients[self._runtime]

    async def _run(
        self, work: Callable[Concatenate[Statements, Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Do the work on a connection, making the tables first where they are missing and may be made."""
        try:
            return await self._try(work, *args, **kwargs)
        except (MissingTableError, StatementRefusedError):
            # The second on SQLite: the table may have been missing, and be made by another thread since.
            if not self._may_create_schema:
                raise
            await self.prepare()
            return await self._try(work, *args, **kwargs)

    async def _try(
        self, work: Callable[Concatenate[Statements, Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Do the work, once more on a new connection if one broke; raises our own errors only.

        Every verb may be begun again: what its first try did is known by owner and token (F21).
        """

        def on_connection(connection: Connection) -> T:
            return work(self._statements(connection), connection, *args, **kwargs)

        is_repeated, conflicts, before = False, 0, sys.exception()
        while True:
            try:
                return await self._client.run(on_connection)
            except Exception as error:
                struck = interruption_in(error, before)
                if struck is not None:
                    # A soft limit or a shutdown, which the driver took for a broken connection: nobody may retry that.
                    raise struck from None
                fault = fault_of(error)
                if fault is None:
                    raise
                if is_lost_connection(error) and not is_repeated:
                    is_repeated = True
                elif fault is Fault.CONFLICT and conflicts < _CONFLICTS:
                    conflicts += 1
                    await self._sleep(random.uniform(0, _CONFLICT_PAUSE))  # noqa: S311 (no secret)
                else:
                    raise await self._explained(fault, why_not_connected(error)) from error

    async def _explained(self, fault: Fault, why: str) -> StoreError:
        # SQLite has no error code for a missing table.
        if fault is Fault.SQLITE_STATEMENT and not await self._client.run(self._has_tables):
            fault = Fault.MISSING_TABLE
        return error_for(fault, self._client.address, self._tables, why)

    @property
    def _tables(self) -> str:
        """What their names begin with, as in jobs.idem_tasks_*."""
        return f"{self._table.fullname.removesuffix('records')}*"

    def _statements(self, connection: Connection) -> Statements:
        dialect = connection.dialect
        kind: Kind
        if dialect.name == "postgresql":
            kind = "postgresql"
        elif dialect.name == "sqlite":
            kind = "sqlite"
        else:
            kind = "mariadb" if dialect.insert_returning else "mysql"
        return statements_for(kind, self._schema, self._prefix)

    @property
    def _may_create_schema(self) -> bool:
        return self._client.is_sqlite if self._creates_schema is None else self._creates_schema

    async def _sleep(self, seconds: float) -> None:
        await (Blocking() if self._runtime == "blocking" else Asyncio()).sleep(seconds)


class SQLWatermarks:
    """The marks of a `SQLStore`; see `base.Watermarks`."""

    def __init__(self, store: SQLStore) -> None:
        self._store = store

    async def make(self, place: MarkPlace) -> None:
        """Make the mark unless there is one: a round trip, and a second one where there is none."""
        await self._store._run(sql_watermarks.make, place)  # noqa: SLF001 (a part of the store)

    def transaction(
        self, place: MarkPlace, source: SessionSource, given: Any, *, max_hold: float
    ) -> MarkingTransaction:
        """Return a transaction whose commit moves the mark: two statements beside the handler's own."""
        return self._store.marked(place, source, given, max_hold)


class SQLOutbox:
    """The outbox of a `SQLStore`; see `base.Outbox`."""

    def __init__(self, store: SQLStore) -> None:
        self._run = store._run  # noqa: SLF001 (a part of the store)

    async def take(
        self, owner: str, *, lease: float, limit: int, of: tuple[str, str] | None = None
    ) -> list[OutboxMessage]:
        """Lease up to `limit` messages, 100 at most: one statement; on MariaDB and MySQL a transaction of three."""
        try:
            return await self._run(sql_relay.take, owner, lease, min(limit, sql_relay.MOST_AT_ONCE), of)
        except RowLockedError:
            return []  # SQLite, while others write for too long

    async def settle(
        self, owner: str, *, sent: Sequence[OutboxMessage], failed: Sequence[FailedSend], rest: Sequence[OutboxMessage]
    ) -> None:
        """Delete what was sent, let what failed wait, and give the rest back."""
        await self._run(sql_relay.settle, owner, sent, failed, rest)

    async def count(self) -> int:
        """Return how many messages there are. Reads the whole table."""
        return await self._run(sql_relay.count)
