"""The journal of steps in a database, as plain functions of a connection.

A step is written by one statement that first locks its record under the claim's fence. So whatever was written under
an earlier claim was written before this claim was granted, and nothing is written under it afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, TypeAlias

from sqlalchemy import ColumnElement, Connection, Integer, and_, bindparam, case, func, select
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.sql.dml import Insert

from idem_tasks.claims import (
    EncodedOutcome,
    Lease,
    Lost,
    Recorded,
    StepBegun,
    StepFinished,
    StepRecord,
    StepsDiffer,
)
from idem_tasks.stores.sql_claims import fence, place
from idem_tasks.stores.sql_clock import now
from idem_tasks.stores.sql_statements import AnyRow, Statements

Values: TypeAlias = "dict[str, ColumnElement[Any]]"


def begin(
    sql: Statements, connection: Connection, lease: Lease, position: int, name: str
) -> StepBegun | StepFinished | StepsDiffer | Lost:
    """Write that the step begins, or tell its outcome, in one statement."""
    steps = statements_for(sql)
    row = _write(steps, connection, steps.begin, _at(lease, position, name))
    if row is None:
        return Lost()
    if row.name != name:
        return StepsDiffer(tuple(connection.scalars(steps.names, place(lease.scope, lease.key))))
    return StepBegun() if row.finished_at is None else StepFinished(_outcome(row))


def finish(
    sql: Statements, connection: Connection, lease: Lease, position: int, name: str, outcome: EncodedOutcome
) -> Recorded | StepFinished | Lost:
    """Write the step's outcome unless it has one, in one statement."""
    steps = statements_for(sql)
    new = {"new_outcome": outcome.body, "new_codec": outcome.codec, "new_not_kept": outcome.not_kept}
    row = _write(steps, connection, steps.finish, _at(lease, position, name) | new)
    if row is None:
        return Lost()
    stands = _outcome(row)
    return Recorded() if stands == outcome else StepFinished(stands)


def steps(sql: Statements, connection: Connection, scope: str, key: str) -> list[StepRecord]:
    """Return the steps of the record's generation in their order."""
    return [StepRecord(**row._asdict()) for row in connection.execute(statements_for(sql).listed, place(scope, key))]


def _at(lease: Lease, position: int, name: str) -> dict[str, Any]:
    return place(lease.scope, lease.key) | fence(lease) | {"at_position": position, "new_name": name}


def _write(steps: StepStatements, connection: Connection, statement: Insert, values: dict[str, Any]) -> AnyRow | None:
    """Return the step as it stands now; None where the fence was missed."""
    result = connection.execute(statement, values)
    if not result.returns_rows:  # pragma: no cover - MySQL
        result = connection.execute(steps.read, values)
    return result.one_or_none()


def _outcome(row: AnyRow) -> EncodedOutcome:
    return EncodedOutcome(body=row.outcome, codec=row.codec, not_kept=row.not_kept)


@cache
def statements_for(sql: Statements) -> StepStatements:
    """Return the statements, always the same ones, so that SQLAlchemy compiles each of them once."""
    return StepStatements(sql)


class StepStatements:
    """The statements for one table of steps on one kind of database."""

    def __init__(self, sql: Statements) -> None:
        self._sql = sql
        self._records, self._steps = sql.table, sql.steps
        record, c = sql.table.c, sql.steps.c
        # The time itself, not whether it is null: SQLite 3.40 says "not null" of every column in a RETURNING.
        self._answer = (c.name, c.outcome, c.codec, c.not_kept, c.finished_at)
        steps = self._steps.join(
            self._records, and_(c.scope == record.scope, c.key == record.key, c.generation == record.generation)
        )
        self.names = select(c.name).select_from(steps).where(sql.at_place).order_by(c.position)
        """The names of all steps of the record's generation, in their order."""
        size = func.length(c.outcome, type_=Integer()).label("outcome_bytes")
        shown = (c.position, c.name, c.started_at, c.finished_at, size, c.codec, c.not_kept)
        self.listed = select(*shown).select_from(steps).where(sql.at_place).order_by(c.position)
        """The same steps as people see them."""
        self.read = select(*self._answer).select_from(steps).where(sql.at_fence, c.position == _AT_POSITION)
        """For MySQL, which has no RETURNING."""

        begun = {"fencing_token": bindparam("seen_token", type_=c.fencing_token.type), "started_at": now()}
        again = and_(c.finished_at.is_(None), c.name == self._new("name"))
        self.begin = self._write(sql.at_running_fence, begun, begun, only_if=again)
        """Writes that the step begins; a finished one, or one of another name, stays as it is."""

        # The time comes last: MariaDB and MySQL assign from left to right.
        outcome = {name: self._new(name) for name in ("outcome", "codec", "not_kept")} | {"finished_at": now()}
        self.finish = self._write(sql.at_fence, begun | outcome, outcome, only_if=c.finished_at.is_(None))
        """Writes the outcome; where there is one, that stays."""

    def _new(self, name: str) -> ColumnElement[Any]:
        return bindparam(f"new_{name}", type_=self._steps.c[name].type)

    def _write(
        self, at_fence: ColumnElement[bool], values: Values, changed: Iterable[str], only_if: ColumnElement[bool]
    ) -> Insert:
        """Insert the step, or change the one there is, if its record is under the fence; return what it is then."""
        record = self._records.c
        values = {
            "scope": record.scope,
            "key": record.key,
            "generation": record.generation,
            "position": _AT_POSITION,
            "name": self._new("name"),
        } | values
        columns, held = list(values), select(*values.values()).where(at_fence).with_for_update()

        def changes(proposed: Any) -> Values:
            return {name: case((only_if, proposed[name]), else_=self._steps.c[name]) for name in changed}

        if self._sql.kind == "postgresql":
            insert = postgresql.insert(self._steps).from_select(columns, held)
            upsert: Any = insert.on_conflict_do_update(index_elements=_PLACE, set_=changes(insert.excluded))
        elif self._sql.kind == "sqlite":
            into_file = sqlite.insert(self._steps).from_select(columns, held)
            upsert = into_file.on_conflict_do_update(index_elements=_PLACE, set_=changes(into_file.excluded))
        else:
            into = mysql.insert(self._steps).from_select(columns, held)
            upsert = into.on_duplicate_key_update(list(changes(into.inserted).items()))
        statement: Insert = upsert if self._sql.kind == "mysql" else upsert.returning(*self._answer)
        return statement


_PLACE = ("scope", "key", "generation", "position")
_AT_POSITION = bindparam("at_position", type_=Integer())
