"""What happens in an execution, in words for people, and in short for telling equal states."""

from __future__ import annotations

from typing import Any

from idem_tasks.claims import EncodedOutcome, Finished, Granted, InDoubt, InProgress, Record
from idem_tasks.stores.base import MarkerFinished, MarkerPending, MarkerRunning
from idem_tasks.testing.explorer.scenario import T0
from idem_tasks.testing.stepped import Step


def words(step: Step) -> str:
    """Say what an actor does at a step."""
    match step.tier, step.when:
        case "clock", _:
            return f"waits {step.answer:g} s"
        case "marker" | "record" | "outbox" | "session", "before":
            return f"asks the {step.tier}: {step.verb}"
        case "marker" | "record" | "outbox" | "session", _:
            return f"the {step.tier} has done {step.verb}, and answers: {words_of(step.answer)}"
        case "handler", _:
            return f"the handler: {step.verb}"
        case _:
            return step.verb


def words_of(answer: Any) -> str:
    """Say what a tier answered."""
    match answer:
        case Granted(lease):
            return f"granted, fencing token T0+{lease.fencing_token - int(T0 * 1e6)}"
        case MarkerFinished(finished):
            return f"finished, {_text(finished.outcome)}"
        case Finished():
            return f"finished, {_text(answer.outcome)}"
        case MarkerPending():
            return f"pending, {_text(answer.outcome)} of {answer.owner}"
        case None:
            return "done"
        case str() | bool() | frozenset() | list():
            return str(answer)
        case Record():
            return answer.state.value
        case _:
            return type(answer).__name__


def _text(outcome: EncodedOutcome) -> str:
    return outcome.error_type or "nothing" if outcome.body is None else outcome.body.decode()


def summary_of(answer: Any) -> Any:
    """Return what an actor can learn from an answer."""
    match answer:
        case Granted(lease):
            return "granted", lease.fencing_token, lease.attempts, lease.crashes, lease.failures, lease.taken_over
        case MarkerFinished(finished):
            return "finished", finished.outcome, finished.expires_in
        case Finished():
            return "finished", answer.outcome, answer.expires_in
        case MarkerPending():
            return "pending", answer.owner, answer.fencing_token, answer.outcome
        case MarkerRunning(retry_after) | InProgress(retry_after):
            return "in progress", retry_after
        case InDoubt(new):
            return "in doubt", new
        case list() | tuple() | set():
            return len(answer)
        case Record():
            return record_summary(answer)
        case _:
            return repr(answer)


def record_summary(record: Record) -> tuple[Any, ...]:
    """Return what of a record anything depends on."""
    return (
        record.state,
        record.fencing_token,
        record.owner if record.owner.startswith("delivery") else "a person",  # whose owners are random
        record.attempts,
        record.failures,
        record.crashes,
        record.generation,
        record.lease_expires_at,
        record.expires_at,
        record.outcome,
    )
