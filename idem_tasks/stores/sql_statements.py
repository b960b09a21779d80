"""Every statement of the SQL store, built once for a table and a kind of database, and used again at each call.

Parameters begin with `at_` for the place of the record (scope and key), `seen_` for what a compare-and-set expects
to find, `new_` for what it writes, and otherwise have names of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, Literal, TypeAlias

from sqlalchemy import (
    ColumnElement,
    Executable,
    Integer,
    Row,
    Select,
    Table,
    Text,
    and_,
    bindparam,
    case,
    delete,
    exists,
    func,
    insert,
    literal,
    literal_column,
    null,
    or_,
    select,
    true,
    tuple_,
    union_all,
    update,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.sql.dml import Insert, Update

from idem_tasks.claims import State
from idem_tasks.stores.schema import audit_table, outbox_table, records_table, steps_table, watermarks_table
from idem_tasks.stores.sql_batch_statements import BatchStatements
from idem_tasks.stores.sql_clock import (
    Seconds,
    after,
    after_seconds,
    clock_microseconds,
    later_of,
    now,
    seconds_until,
)
from idem_tasks.stores.sql_outbox import OutboxStatements
from idem_tasks.stores.sql_watermarks import WatermarkStatements

AnyRow: TypeAlias = "Row[*tuple[Any, ...]]"

Kind = Literal["postgresql", "sqlite", "mariadb", "mysql"]
"""MariaDB and MySQL are told apart because only MariaDB has RETURNING."""

ENDED = (State.COMPLETED, State.FAILED)
PURGEABLE = (*ENDED, State.RELEASED)
FENCED = (State.RUNNING, State.IN_DOUBT)
"""The states in which a record still obeys the claim whose fencing token and owner it carries."""


@cache
def statements_for(kind: Kind, schema: str | None, prefix: str) -> Statements:
    """Return the statements, always the same ones, so that SQLAlchemy compiles each of them once."""
    makers = (records_table, steps_table, audit_table, outbox_table, watermarks_table)
    return Statements(kind, *(make(schema, prefix) for make in makers))


class Statements:
    """The statements for the records in one table on one kind of database.

    `outbox` are those for their messages, `batches` those for many records at once, `watermarks` those for the marks of
    partitions.
    """

    def __init__(self, kind: Kind, table: Table, steps: Table, audit: Table, outbox: Table, marks: Table) -> None:
        self.kind = kind
        self.table = table
        self.steps = steps
        """The table of the records' steps, which end with them; `sql_steps` writes them."""
        self._audit = audit
        self._columns = table.c
        self.at_place = and_(
            table.c.scope == bindparam("at_scope"),
            table.c.key == bindparam("at_key"),
        )
        of_claim = and_(
            self.at_place,
            table.c.fencing_token == bindparam("seen_token"),
            table.c.owner == bindparam("seen_owner"),
        )
        self.is_fenced = _is_any_of(table.c.state, FENCED)
        self.at_fence = and_(of_claim, self.is_fenced)
        """Where the record obeys the claim, be it that somebody doubts it."""
        self.at_running_fence = and_(of_claim, table.c.state == State.RUNNING)
        self._held = and_(table.c.state == State.RUNNING, table.c.lease_expires_at > now())
        self._make_claim()
        self._make_fenced()
        self._make_renewals()
        self._make_admin()
        self.outbox = OutboxStatements(kind, outbox, self.finish, self.insert_finished)
        self.watermarks = WatermarkStatements(kind, marks)
        self.batches = BatchStatements(self)

    # Claim

    def _make_claim(self) -> None:
        c = self._columns
        self.known = (
            c.state,
            c.fencing_token,
            c.owner,
            c.fingerprint,
            c.attempts,
            c.failures,
            c.crashes,
            c.generation,
            c.outcome,
            c.codec,
            c.not_kept,
            c.error_type,
            c.error_message,
            c.traceparent,
            seconds_until(c.lease_expires_at).label("lease_left"),
            seconds_until(c.expires_at).label("retention_left"),
        )
        """What a claim has to know of a record to be answered."""
        answer = (*self.known, clock_microseconds().label("clock"))
        self.read = select(*answer).where(self.at_place)
        """The record as a claim sees it."""
        granted = self._granted(self._given)
        first = self.first(self._given)
        self.claim: Executable
        """Inserts a running record unless there is one, and returns (MySQL: only inserts) what is there now.

        No row: it came or went meanwhile (PostgreSQL), or was there before (SQLite, which has to read it).
        """
        self.claim_async: Executable | None = None
        """PostgreSQL: the same, and its commit does not wait until it is on the server's disk."""
        if self.kind == "postgresql":
            self.claim = self._look_or_insert(first, answer)
            not_waiting = func.set_config(literal_column("'synchronous_commit'"), literal_column("'off'"), true())
            self.claim_async = self._look_or_insert(first, answer, not_waiting.is_not(None))
        elif self.kind == "mysql":
            self.claim = self._unless_there(first)
        else:
            self.claim = self._unless_there(first).returning(*answer)

        unchanged = and_(
            c.fencing_token == bindparam("seen_token"),
            c.owner == bindparam("seen_owner"),
            c.state == bindparam("seen_state"),
        )
        dead = and_(c.state == State.RUNNING, c.lease_expires_at <= now())
        over = and_(_is_any_of(c.state, PURGEABLE), c.expires_at <= now())
        take = (
            update(self.table)
            .where(self.at_place, unchanged)
            .values(
                granted
                | {
                    "fencing_token": self._new("fencing_token"),
                    "attempts": self._new("attempts"),
                    "failures": self._new("failures"),
                    "crashes": self._new("crashes"),
                    "generation": self._new("generation"),
                    "attention": null(),
                }
            )
        )
        self.take: Update = take.where(or_(c.state == State.RELEASED, dead, over))
        """Grants a record that was seen free, if it is still as it was seen (F6)."""
        self.take_doubted: Update = take.where(c.state == State.IN_DOUBT)
        """The same for a record in doubt, to whoever was told that its effect did not happen."""
        self.take_afresh: Update = self.take.values(
            created_at=now(),
            completed_at=null(),
            outcome=null(),
            codec=null(),
            not_kept=null(),
            error_type=null(),
            error_message=null(),
        )
        """The same for a record whose retention is over: a new generation of it."""
        self.set_aside: Update = (
            update(self.table)
            .where(self.at_place, unchanged, dead)
            .values(
                state=self._new("state"), attention=self._new("state"), crashes=self._new("crashes"), updated_at=now()
            )
        )
        """Puts a dead claim in doubt or parks it; its token and owner stay, so that a late finish ends the doubt."""

    def _look_or_insert(
        self, first: dict[str, ColumnElement[Any]], answer: Iterable[ColumnElement[Any]], *also: ColumnElement[bool]
    ) -> Executable:
        """It reads first: a duplicate then burns no transaction id and writes nothing."""
        seen = self.read.cte("seen")
        values = select(*first.values()).where(~exists(select(seen.c.state)), *also)
        claim = (
            postgresql.insert(self.table)
            .from_select(list(first), values)
            .on_conflict_do_nothing()
            .returning(*answer)
            .cte("claim")
        )
        return union_all(select(seen), select(claim))

    def first(self, given: Callable[[str], ColumnElement[Any]]) -> dict[str, ColumnElement[Any]]:
        """Return the values of a first claim's record; `given` returns what its request says, by a parameter's name."""
        return {
            "scope": given("at_scope"),
            "key": given("at_key"),
            **self._granted(given),
            "fencing_token": clock_microseconds(),
            "attempts": literal(1, Integer),
            "failures": literal(0, Integer),
            "crashes": literal(0, Integer),
            "created_at": now(),
            "generation": literal(1, Integer),
        }

    def _granted(self, given: Callable[[str], ColumnElement[Any]]) -> dict[str, ColumnElement[Any]]:
        return {
            "state": literal(State.RUNNING.value),
            "owner": given("new_owner"),
            "fingerprint": given("new_fingerprint"),
            "lease_expires_at": after(given("lease")),
            "holder": given("new_holder"),
            "updated_at": now(),
            "expires_at": after(given("lifetime")),
            "traceparent": given("new_traceparent"),
        }

    def ended(self, given: Callable[[str], ColumnElement[Any]]) -> dict[str, ColumnElement[Any]]:
        """Return what a finish writes; `given` as in `first`."""
        names = ("state", "outcome", "codec", "not_kept", "error_type", "error_message", "attention")
        return {name: given(f"new_{name}") for name in names} | {
            "completed_at": now(),
            "updated_at": now(),
            # Set when it was granted; changes, and is no HOT update, only after a very long run (F61).
            "expires_at": later_of(self._columns.expires_at, after(given("retention"))),
        }

    def _given(self, name: str) -> ColumnElement[Any]:
        """Return the parameter of this name, of the type of the column that its name ends with."""
        column_name = name.removeprefix("at_").removeprefix("new_")
        return bindparam(name, type_=Seconds() if column_name == name else self._columns[column_name].type)

    def _new(self, name: str) -> ColumnElement[Any]:
        return self._given(f"new_{name}")

    def _unless_there(self, values: dict[str, Any]) -> Insert:
        if self.kind == "postgresql":
            return postgresql.insert(self.table).values(values).on_conflict_do_nothing()
        if self.kind == "sqlite":
            return sqlite.insert(self.table).values(values).on_conflict_do_nothing()
        # Not INSERT IGNORE, which ignores much else. The update changes nothing, but makes RETURNING give the row.
        return mysql.insert(self.table).values(values).on_duplicate_key_update(owner=self._columns.owner)

    # Finish, release: under the fence

    def _make_fenced(self) -> None:
        c = self._columns
        ended = self.ended(self._given)
        self.finish: Update = update(self.table).where(self.at_fence).values(ended)
        self._make_sessions()
        self.insert_finished = self._unless_there(
            ended
            | {
                "scope": bindparam("at_scope", type_=c.scope.type),
                "key": bindparam("at_key", type_=c.key.type),
                "fencing_token": bindparam("seen_token", type_=c.fencing_token.type),
                "owner": bindparam("seen_owner", type_=c.owner.type),
                "fingerprint": self._new("fingerprint"),
                "attempts": self._new("attempts"),
                "failures": self._new("failures"),
                "crashes": self._new("crashes"),
                "generation": self._new("generation"),
                "holder": self._new("holder"),
                "traceparent": self._new("traceparent"),
                "lease_expires_at": now(),
                "created_at": now(),
                "expires_at": after_seconds("retention"),
            }
        )
        """Writes a finished record whose claim was lost with the database's last moments; never over another."""
        self.release: Update = (
            update(self.table)
            .where(self.at_fence)
            .values(
                {name: self._new(name) for name in ("state", "failures", "attention", "error_type", "error_message")}
                | {"lease_expires_at": now(), "updated_at": now()}
            )
        )

        unchanged = and_(
            c.fencing_token == bindparam("seen_token"),
            c.owner == bindparam("seen_owner"),
            c.state == bindparam("seen_state"),
        )
        resolve = (
            update(self.table)
            .where(self.at_place, unchanged, ~self._held)
            .values(
                fencing_token=self._new("fencing_token"),
                owner=self._new("owner"),
                lease_expires_at=now(),
                updated_at=now(),
            )
        )
        self.resolve_released: Update = resolve.values(
            state=State.RELEASED.value, attention=null(), failures=0, crashes=0
        )
        self.resolve_ended: Update = resolve.values(ended)

    def _make_sessions(self) -> None:
        """Statements for a transaction of the user's that begins and ends under a claim."""
        self.begin: Executable
        """Tells by its rows whether the record is seen here under its fence.

        On SQLite it writes, which takes the write lock at once: a transaction that begins by reading can never write
        again once another has (SQLITE_BUSY_SNAPSHOT).
        """
        self.read_settled: Select[Any]
        """The record as it is once a commit that is under way has ended."""
        self.settings_of_sessions: list[ColumnElement[Any]] = []
        """What such a transaction sets as it begins."""
        if self.kind == "postgresql":
            # A worker that is paused in mid-transaction must not keep its locks for ever.
            limit = bindparam("idle_milliseconds", type_=Text())
            setting = func.set_config("idle_in_transaction_session_timeout", limit, literal_column("true"))
            self.settings_of_sessions.append(setting)
        if self.kind == "sqlite":
            self.begin = update(self.table).where(self.at_fence).values(owner=self._columns.owner)
            self.read_settled = self.read
        else:
            self.begin = select(self._columns.state, *self.settings_of_sessions).where(self.at_fence)
            self.read_settled = self.read.with_for_update()

    # Renew

    def _make_renewals(self) -> None:
        c = self._columns
        places = tuple_(c.scope, c.key).in_(bindparam("places", expanding=True))
        self.lock_running = (
            select(c.scope, c.key, c.fencing_token, c.owner)
            .where(places, c.state == State.RUNNING)
            .order_by(c.scope, c.key)
            .with_for_update(skip_locked=True)
        )
        self.renew_locked = update(self.table).where(places).values(self.renewed(self._given("lease")))
        self.delete_locked = delete(self.table).where(places)
        """For MariaDB and MySQL, which can do neither in one statement: lock what is not locked, then write it."""

    def renewed(self, lease: ColumnElement[Any]) -> dict[str, ColumnElement[Any]]:
        """Return what a renewal by these seconds writes."""
        return {"lease_expires_at": after(lease), "updated_at": now()}

    # People

    def _make_admin(self) -> None:
        c = self._columns
        self._overdue = and_(c.state == State.RUNNING, c.lease_expires_at <= now())
        attention = case((self._overdue, "overdue"), else_=c.attention).label("attention")
        self._all = select(*(attention if each is c.attention else each for each in c))
        self.get = self._all.where(self.at_place)
        unchanged = and_(
            c.fencing_token == bindparam("seen_token"),
            c.owner == bindparam("seen_owner"),
            c.state == bindparam("seen_state"),
        )
        self.forget = delete(self.table).where(self.at_place, unchanged, ~self._held)
        steps = self.steps
        self.forget_steps = delete(steps).where(
            steps.c.scope == bindparam("at_scope"), steps.c.key == bindparam("at_key")
        )
        self.delete_steps = delete(steps).where(
            tuple_(steps.c.scope, steps.c.key).in_(bindparam("places", expanding=True))
        )
        """Of all generations, as is each of these."""
        given = {"scope": bindparam("at_scope"), "key": bindparam("at_key"), "at": now()}
        written = ("actor", "action", "state_before", "state_after", "token_before", "token_after", "reason")
        self.write_audit = insert(self._audit).values(given | {name: bindparam(f"new_{name}") for name in written})
        self.stats = select(c.state, func.count().label("number")).group_by(c.state)

        # In a subquery of its own it is worked out once, so that PostgreSQL can use the index.
        cut = select(after_seconds("cut")).scalar_subquery()
        self.doomed = (
            select(c.scope, c.key)
            .where(c.expires_at < cut, _is_any_of(c.state, PURGEABLE))
            .order_by(c.expires_at)
            .limit(bindparam("limit", type_=Integer()))
            .with_for_update(skip_locked=True)
        )
        if self.kind == "postgresql":
            doomed = self.doomed.cte("doomed")
            purged = (
                delete(self.table)
                .where(c.scope == doomed.c.scope, c.key == doomed.c.key)
                .returning(c.scope, c.key)
                .cte("purged")
            )
            # No step of theirs can be under way: a running record is not purged.
            with_them = (
                delete(steps).where(steps.c.scope == purged.c.scope, steps.c.key == purged.c.key).cte("with_them")
            )
            self.purge: Executable = select(purged).add_cte(with_them)
        elif self.kind == "sqlite":
            self.purge = delete(self.table).where(tuple_(c.scope, c.key).in_(self.doomed)).returning(c.scope, c.key)

    @cache  # noqa: B019 (as below)
    def audit(self, *, by_scope: bool, by_key: bool) -> Select[Any]:
        """Return the statement for the last entries of the audit."""
        a = self._audit.c
        last = select(*(each for each in a if each is not a.id)).order_by(a.id.desc())
        last = last.limit(bindparam("limit", type_=Integer()))
        if by_scope:
            last = last.where(a.scope == bindparam("at_scope"))
        if by_key:
            last = last.where(a.key == bindparam("at_key"))
        return last

    @cache  # noqa: B019 (there are as many as kinds of databases in use, and they live as long as the process)
    def records(
        self, *, by_state: bool, by_scope: bool, after: bool, by_attention: Literal["none", "any", "state"]
    ) -> Select[Any]:
        """Return the statement for one page of a listing.

        There is no index on the state. Those that wait for a person have it as `attention` too, which has a small one.
        Overdue ones have not: nobody was there to write it, and an index that finds them would make each finish
        dearer. So "any" reads the records of the scope, or all.
        """
        c = self._columns
        page = self._all.order_by(c.scope, c.key).limit(bindparam("limit", type_=Integer()))
        if by_attention == "any":
            page = page.where(or_(c.attention.is_not(None), self._overdue))
        elif by_attention == "state":
            page = page.where(c.attention == bindparam("in_state"))
        if by_state:
            page = page.where(c.state == bindparam("in_state"))
        if by_scope:
            page = page.where(c.scope == bindparam("in_scope"))
        if after:
            further_on = and_(c.scope == bindparam("at_scope"), c.key > bindparam("at_key"))
            page = page.where(or_(c.scope > bindparam("at_scope"), further_on))
        return page


def _is_any_of(column: ColumnElement[Any], values: Iterable[str]) -> ColumnElement[bool]:
    """Like `in_`, whose list SQLAlchemy would write out anew at each call."""
    return or_(*(column == value for value in values))
