"""`idem-tasks resolve` and `forget`: what people decide about records.

Each shows what it would do, asks, and then changes exactly the record that it showed, by its fencing token.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from idem_tasks.claims import Record, State
from idem_tasks.cli import terminal
from idem_tasks.cli.answers import Answer, RefusalError, instant, no_record, span
from idem_tasks.cli.records import Key, Scope, as_json
from idem_tasks.cli.where import on_a_store
from idem_tasks.errors import ConflictError
from idem_tasks.idempotency import Idempotency
from idem_tasks.stores.base import outbox_of

Token = Annotated[
    int | None, typer.Option("--expect-token", help="Only if the record still has this fencing token.", metavar="N")
]
Reason = Annotated[str | None, typer.Option("--reason", help="Why, for the audit.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]


@on_a_store
def resolve(
    idempotency: Idempotency,
    answer: Answer,
    scope: Scope,
    key: Key,
    outcome: Annotated[
        str | None, typer.Option("--outcome", help="It happened, and this is what callers get.", metavar="JSON")
    ] = None,
    rerun: Annotated[bool, typer.Option("--rerun", help="It did not happen: let the next delivery run.")] = False,
    fail: Annotated[
        str | None, typer.Option("--fail", help="It failed for good: callers get this.", metavar="TYPE:MESSAGE")
    ] = None,
    expect_token: Token = None,
    reason: Reason = None,
    yes: Yes = False,
    dry_run: DryRun = False,
) -> None:
    """End a record that is in doubt or parked, or whose holder is dead.

    Look at the provider first. Give one of --outcome, --rerun and --fail.
    """
    word = _word(outcome, fail, rerun=rerun)
    record = _look(idempotency, scope, key, expect_token)
    if record.state in (State.COMPLETED, State.FAILED, State.RELEASED):
        raise RefusalError(f"{scope} {key!r} is {record.state.value} already: there is nothing to resolve")
    plan = [_described(record)]
    if rerun:
        holder = record.holder or "the old worker"
        place = f"Its scope is {terminal.cell(scope)}, its key {terminal.cell(key)}, its last holder {holder}."
        plan += [
            "It will be released: the next delivery runs the handler.",
            f'This gives up "at most once" for this key: be sure that {holder} is dead, not merely slow.',
            f"Nothing is sent: send the message again. {place}",
        ]
    elif fail is not None:
        plan.append(f"It will be failed for good: every later delivery gets {fail}, and nothing runs.")
    else:
        plan.append(f"It will be completed: every later delivery gets {outcome}, and nothing runs.")
        if outbox_of(idempotency.store) is not None:
            plan.append("Messages that its handler published are not sent: what is to follow, send yourself.")
    if not _agreed(answer, plan, record, yes=yes, dry_run=dry_run):
        return
    try:
        after = idempotency.resolve(scope, key, expect_token=record.fencing_token, reason=reason, **word)
    except ConflictError as error:
        raise _moved(error, idempotency, scope, key) from error
    if after is None:
        raise no_record(scope, key)
    again = {"scope": scope, "key": key, "holder": record.holder} if rerun else None
    if answer.as_json:
        answer.document({"done": True, "plan": plan, "record": as_json(after), "send_again": again})
    else:
        answer.say(f"Done: {scope} {key!r} is {after.state.value}, with fencing token {after.fencing_token}.")


@on_a_store
def forget(
    idempotency: Idempotency,
    answer: Answer,
    scope: Scope,
    key: Key,
    expect_token: Token = None,
    reason: Reason = None,
    yes: Yes = False,
    dry_run: DryRun = False,
) -> None:
    """Delete a record and its marker: the next delivery runs the handler again."""
    record = idempotency.get(scope, key)
    if record is None and not dry_run:
        idempotency.forget(scope, key)  # a marker may be left of one that was deleted while Redis was away
    record = _look(idempotency, scope, key, expect_token)
    plan = [_described(record), "It will be deleted: the next delivery will run the handler again.", CACHED]
    if not _agreed(answer, plan, record, yes=yes, dry_run=dry_run):
        return
    try:
        existed = idempotency.forget(scope, key, expect_token=record.fencing_token, reason=reason)
    except ConflictError as error:
        raise _moved(error, idempotency, scope, key) from error
    if not existed:
        raise no_record(scope, key)
    if answer.as_json:
        answer.document({"done": True, "plan": plan, "record": None})
    else:
        answer.say(f"Done: {scope} {key!r} is forgotten.")


CACHED = "A process with local_cache= answers for it until its local_cache_ttl is over: send nothing again before."


def _word(outcome: str | None, fail: str | None, *, rerun: bool) -> dict[str, Any]:
    """Return what `Idempotency.resolve` is to be told."""
    if [outcome is not None, fail is not None, rerun].count(True) != 1:
        raise typer.BadParameter("give one of --outcome JSON, --rerun and --fail TYPE:MESSAGE")
    if rerun:
        return {"rerun": True}
    if fail is not None:
        if not fail.partition(":")[0].strip():
            raise typer.BadParameter("give it as TYPE:MESSAGE, such as shop.Declined:card expired", param_hint="--fail")
        return {"error": fail}
    try:
        return {"outcome": json.loads(outcome or "")}
    except ValueError as error:
        raise typer.BadParameter(
            f"{outcome} is not JSON ({error}); a text is given in quotes: '\"receipt 17\"'", param_hint="--outcome"
        ) from error


def _look(idempotency: Idempotency, scope: str, key: str, expect_token: int | None) -> Record:
    """Return the record as it is to be changed; refuse one that runs, or that is another one."""
    record = idempotency.get(scope, key)
    if record is None:
        raise no_record(scope, key)
    if record.state is State.RUNNING and record.attention != "overdue":
        left = (record.lease_expires_at - datetime.now(UTC)).total_seconds()
        raise RefusalError(
            f"{scope} {key!r} is running, held by {record.holder or '?'}; its lease ends in {span(max(left, 0))} "
            "unless it is renewed",
            hint="nothing was done; wait until it ends, or until its worker is dead and the lease is over",
        )
    if expect_token is not None and record.fencing_token != expect_token:
        raise RefusalError(
            f"{scope} {key!r} has changed: it is {record.state.value} now, with fencing token {record.fencing_token} "
            f"instead of {expect_token}",
            hint="nothing was done; look at it again with idem-tasks show",
        )
    return record


def _described(record: Record) -> str:
    times = f"{record.attempts} attempt{'' if record.attempts == 1 else 's'}, {record.crashes} crash" + (
        "" if record.crashes == 1 else "es"
    )
    state = "overdue" if record.attention == "overdue" else record.state.value
    error = f", last error {record.error_type}" if record.error_type else ""
    return (
        f"{record.scope} {record.key!r} is {state} since {instant(record.updated_at)}: {times}, held by "
        f"{record.holder or '?'}, fencing token {record.fencing_token}{error}."
    )


def _agreed(answer: Answer, plan: list[str], record: Record, *, yes: bool, dry_run: bool) -> bool:
    """Tell what is going to be done, and ask; False for a dry run. Refuses where nobody can be asked."""
    if not answer.as_json:
        for line in plan:
            answer.say(line)
    if dry_run:
        if answer.as_json:
            answer.document({"done": False, "plan": plan, "record": as_json(record)})
        else:
            answer.say("Nothing was done: this is a dry run.")
        return False
    if yes:
        return True
    if answer.as_json or not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise RefusalError("nothing was done: without a terminal to ask on, give --yes", code="confirmation_missing")
    terminal.talk().print("Do it? [y/N] ", end="", markup=False)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise RefusalError("nothing was done", code="confirmation_missing")
    return True


def _moved(error: ConflictError, idempotency: Idempotency, scope: str, key: str) -> RefusalError:
    """Say what the record is now that changed while its change was being asked for."""
    now = idempotency.get(scope, key)
    state = "there is no record any more" if now is None else f"it is {now.state.value} now"
    show = f"idem-tasks show {terminal.argument(scope)} {terminal.argument(key)}"
    return RefusalError(f"{error}", hint=f"nothing was done; {state}: {show}")
