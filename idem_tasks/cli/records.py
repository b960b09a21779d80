"""`idem-tasks ls`, `show` and `audit`: what is recorded, for people and for programs."""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import fields
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from idem_tasks.claims import AuditEntry, Record, State, StepRecord
from idem_tasks.cli.answers import Answer, instant, no_record, span
from idem_tasks.cli.where import on_a_store
from idem_tasks.errors import StoreConfigurationError
from idem_tasks.idempotency import Idempotency

Scope = Annotated[str, typer.Argument(help="The scope, such as the Celery task's name.", show_default=False)]
Key = Annotated[str, typer.Argument(help="The idempotency key.", show_default=False)]

_LISTED = (
    *("scope", "key", "state", "attention", "attempts", "failures", "crashes", "holder"),
    *("fencing_token", "created_at", "updated_at", "lease_expires_at"),
)
_SHORT = (
    *(("scope", "SCOPE"), ("key", "KEY"), ("state", "STATE"), ("attempts", "ATT"), ("crashes", "CRASH")),
    *(("holder", "HOLDER"), ("age", "CHANGED"), ("lease", "LEASE")),
)
_STEP = tuple(field.name for field in fields(StepRecord))
_STEP_SHORT = (
    *(("position", "STEP"), ("name", "NAME"), ("begun", "BEGUN"), ("finished", "FINISHED")),
    ("outcome", "OUTCOME"),
)
_AUDITED = tuple(field.name for field in fields(AuditEntry))
_AUDITED_SHORT = (
    *(("at", "AT"), ("actor", "ACTOR"), ("action", "ACTION"), ("scope", "SCOPE"), ("key", "KEY")),
    *(("state_before", "BEFORE"), ("state_after", "AFTER"), ("reason", "REASON")),
)


@on_a_store
def ls(
    idempotency: Idempotency,
    answer: Answer,
    state: Annotated[State | None, typer.Option(help="Only those in this state.")] = None,
    scope: Annotated[str | None, typer.Option(help="Only those of this scope.")] = None,
    attention: Annotated[
        bool, typer.Option("--attention", help="Only those to look at: in doubt, parked, failed or overdue.")
    ] = False,
    limit: Annotated[int, typer.Option(help="How many at most.", min=1, max=10_000)] = 50,
    cursor: Annotated[str | None, typer.Option(help="Where the page before ended, as it said.")] = None,
) -> None:
    """List records in the order of scope and key.

    What waits for a person: idem-tasks ls --state in_doubt, or --attention.
    """
    after = None if cursor is None else _place(cursor)
    found = list(idempotency.records(state=state, scope=scope, attention=attention, after=after, limit=limit + 1))
    page, more = found[:limit], len(found) > limit
    next_cursor = _cursor(page[-1]) if more else None
    if answer.as_json:
        answer.document([as_json(record) for record in page], next_cursor)
        return
    answer.rows(_LISTED, [_row(record) for record in page], short=_SHORT)
    count = f"{len(page)} record{'' if len(page) == 1 else 's'}"
    answer.say(f"{count}; more: --cursor {next_cursor}" if more else count)


@on_a_store
def show(
    idempotency: Idempotency,
    answer: Answer,
    scope: Scope,
    key: Key,
    outcome: Annotated[bool, typer.Option("--outcome", help="Show the outcome too, as it is stored.")] = False,
) -> None:
    """Show one record, every column, and its steps; its outcome only if asked for: it may be somebody's data."""
    record = idempotency.get(scope, key)
    if record is None:
        raise no_record(scope, key)
    steps, warnings = _steps(idempotency, scope, key)
    if answer.as_json:
        answer.document(
            as_json(record, with_outcome=outcome) | {"steps": [_step_as_json(step) for step in steps]},
            warnings=warnings,
        )
        return
    shown = {field.name: _text(getattr(record, field.name)) for field in fields(Record)}
    if record.outcome is not None:
        shown["outcome"] = _readable(record.outcome) if outcome else f"{len(record.outcome)} bytes, hidden: --outcome"
    answer.fields(shown)
    if steps:
        answer.gap()
        answer.rows(_STEP, [_step_row(step) for step in steps], short=_STEP_SHORT)
    for warning in warnings:
        answer.say(warning)


def _steps(idempotency: Idempotency, scope: str, key: str) -> tuple[list[StepRecord], list[str]]:
    """Return the record's steps, or why they cannot be told: the record itself is seen all the same."""
    try:
        return idempotency.steps(scope, key), []
    except StoreConfigurationError as error:  # a database of an older version, without the table
        return [], [f"its steps are not known: {error}"]


@on_a_store
def audit(
    idempotency: Idempotency,
    answer: Answer,
    scope: Annotated[str | None, typer.Argument(help="Only of this scope.", show_default=False)] = None,
    key: Annotated[str | None, typer.Argument(help="Only of this key.", show_default=False)] = None,
    limit: Annotated[int, typer.Option(help="How many at most.", min=1, max=10_000)] = 50,
) -> None:
    """List who ended or forgot which record, when and why, the last first."""
    entries = idempotency.audit(scope, key, limit=limit)
    told = [{name: _plain(getattr(entry, name)) for name in _AUDITED} for entry in entries]
    if answer.as_json:
        answer.document(told)
        return
    answer.rows(_AUDITED, [{name: _text(value) for name, value in each.items()} for each in told], short=_AUDITED_SHORT)


def as_json(record: Record, *, with_outcome: bool = False) -> dict[str, Any]:
    """Return a record as the JSON documents have it."""
    kept = record.outcome is not None
    outcome: dict[str, Any] = {
        "kept": kept,
        "codec": record.codec,
        "bytes": len(record.outcome) if record.outcome is not None else None,
        "reason": record.not_kept,
    }
    if with_outcome and record.outcome is not None:
        outcome["value"] = _value(record.outcome)
    told = {field.name: _plain(getattr(record, field.name)) for field in fields(Record)}
    for name in ("outcome", "codec", "not_kept", "error_type", "error_message"):
        del told[name]
    error = {"type": record.error_type, "message": record.error_message} if record.error_type else None
    return told | {"outcome": outcome, "error": error}


def _step_as_json(step: StepRecord) -> dict[str, Any]:
    """Return a step as the JSON documents have it, its outcome as that of a record."""
    told = {field.name: _plain(getattr(step, field.name)) for field in fields(StepRecord)}
    size, codec, reason = (told.pop(name) for name in ("outcome_bytes", "codec", "not_kept"))
    return told | {"outcome": {"kept": size is not None, "codec": codec, "bytes": size, "reason": reason}}


def _row(record: Record) -> dict[str, str]:
    row = {name: _text(getattr(record, name)) for name in _LISTED}
    row["age"] = _ago(record.updated_at)
    left = (record.lease_expires_at - datetime.now(UTC)).total_seconds()
    match record.state:
        case State.RUNNING:
            row["lease"] = "over" if record.attention == "overdue" else f"{span(max(left, 0))} left"
        case State.IN_DOUBT | State.PARKED:
            row["lease"] = "waits for you"
        case _:
            row["lease"] = ""
    return row


def _step_row(step: StepRecord) -> dict[str, str]:
    row = {name: _text(getattr(step, name)) for name in _STEP}
    kept = f"{step.outcome_bytes} bytes, {step.codec}" if step.outcome_bytes is not None else _text(step.not_kept)
    finished = "" if step.finished_at is None else _ago(step.finished_at)
    return row | {"begun": _ago(step.started_at), "finished": finished, "outcome": kept}


def _ago(time: datetime) -> str:
    return f"{span(max((datetime.now(UTC) - time).total_seconds(), 0))} ago"


def _plain(value: object) -> Any:
    """Turn a field into what JSON has."""
    match value:
        case datetime():
            return instant(value)
        case State():
            return value.value
        case _:
            return value


def _text(value: object) -> str:
    return "" if value is None else str(_plain(value))


def _readable(outcome: bytes) -> str:
    try:
        return outcome.decode()
    except UnicodeDecodeError:
        return base64.b64encode(outcome).decode()


def _value(outcome: bytes) -> Any:
    try:
        return json.loads(outcome)
    except ValueError:
        return {"base64": base64.b64encode(outcome).decode()}


def _cursor(record: Record) -> str:
    place = json.dumps([record.scope, record.key]).encode()
    return base64.urlsafe_b64encode(place).decode().rstrip("=")


def _place(cursor: str) -> tuple[str, str]:
    try:
        scope, key = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    except (binascii.Error, ValueError, TypeError) as error:
        raise typer.BadParameter("this is no cursor that `ls` printed", param_hint="--cursor") from error
    return str(scope), str(key)
