"""What a function given as `on_crash` answers, and how it is asked.

It is asked by the delivery that found a dead holder, while the record is in doubt already: whatever happens to it on
the way, the record waits for a person. Its answer is applied by `Store.decide`.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, Final, Literal

from idem_tasks.call import Call
from idem_tasks.claims import DeadClaim, EncodedOutcome, Lease, State
from idem_tasks.errors import ConfigurationError, InDoubtError
from idem_tasks.events import EventName
from idem_tasks.replay import keep, message_of, type_name
from idem_tasks.runtime import deadline_clock


class Verdict(Enum):
    """The type of `RERUN` and `HOLD`."""

    RERUN = "rerun"
    HOLD = "hold"

    def __repr__(self) -> str:
        return self.name


RERUN: Final = Verdict.RERUN
"""The effect did not happen: run the handler again. No more is promised then than under `on_crash="rerun"`."""

HOLD: Final = Verdict.HOLD
"""Not known: the record stays in doubt, for a person."""


class Outcome:
    """The effect happened, and this is its outcome; `Outcome.failed` for a failure that is final.

    The record is completed with it, and every delivery gets it.
    """

    __slots__ = ("failure", "value")

    def __init__(self, value: Any = None) -> None:
        """`value` is what the handler would have returned."""
        self.value = value
        self.failure: EncodedOutcome | None = None

    @classmethod
    def failed(cls, error_type: type[Exception] | Exception | str, message: str = "") -> Outcome:
        """Return the outcome of a handler that failed for good, as with `record_failures`.

        `error_type` is an exception, or its type or `module.qualname` with the message beside it. A type that
        `record_failures` names is raised as itself again, any other as `ReplayedFailureError`.
        """
        outcome = cls()
        outcome.failure = failure_of(error_type, message)
        return outcome

    def __repr__(self) -> str:
        return "<Outcome>" if self.failure is None else f"<Outcome failed {self.failure.error_type}>"


Answer = Outcome | Literal[Verdict.RERUN, Verdict.HOLD]


def failure_of(error_type: type[Exception] | Exception | str, message: str = "") -> EncodedOutcome:
    """Encode a final failure that somebody tells of."""
    if isinstance(error_type, Exception):
        return EncodedOutcome(
            State.FAILED, error_type=type_name(type(error_type)), error_message=message or message_of(error_type)
        )
    name = error_type if isinstance(error_type, str) else type_name(error_type)
    return EncodedOutcome(State.FAILED, error_type=name, error_message=message)


async def ask(call: Call, dead: Lease) -> EncodedOutcome | None:
    """Ask the policy's function what became of the dead claim; None: it says that the handler is to run again.

    Raises `InDoubtError`, and announces why, where it does not know, does not answer within the policy's `lease`,
    answers something else, or raises: a soft time limit too, because a person finds the record. A shutdown or
    cancellation goes on, and the message comes again to a record in doubt.
    """
    asked_at, on_crash = deadline_clock(), call.policy.on_crash
    assert callable(on_crash)
    try:
        answer = await call.services.runtime.ask(on_crash, DeadClaim(dead), call.policy.lease)
    except Exception as error:
        raise _left(call, f"on_crash raised {type(error).__name__}", error=type(error).__name__) from error
    except BaseException as interruption:
        call.announce(EventName.IN_DOUBT, new=True, error=type(interruption).__name__)
        raise
    if answer is HOLD:
        raise _left(call, "on_crash does not know", answer="hold")
    if answer is not RERUN and not isinstance(answer, Outcome):
        wrong = ConfigurationError(f"on_crash returned {_kind(answer)}, not an Outcome, RERUN or HOLD")
        raise _left(call, str(wrong), error=str(wrong)) from wrong
    took = deadline_clock() - asked_at
    if took > call.policy.lease:
        raise _left(call, f"on_crash took {took:.1f} s, longer than the lease", error="answered too late")
    if not isinstance(answer, Outcome):
        call.announce(EventName.ANSWERED, answer="rerun", crashes=dead.crashes)
        return None
    outcome = await call.services.runtime.shield(lambda: _encoded(call, answer))
    call.announce(EventName.ANSWERED, answer=outcome.state.value, crashes=dead.crashes)
    return outcome


async def _encoded(call: Call, answer: Outcome) -> EncodedOutcome:
    return answer.failure or keep(call, answer.value)


def _kind(answer: object) -> str:
    return "None" if answer is None else f"a value of type {type(answer).__name__}"


def _left(call: Call, why: str, **details: Any) -> InDoubtError:
    """Announce that the record stays in doubt, and say so to the caller."""
    call.announce(EventName.IN_DOUBT, new=True, **details)
    scope, key = call.request.scope, call.request.key
    return InDoubtError(
        f"{scope} {key!r} is in doubt: an earlier delivery ended in mid-run, and {why}; find out whether its effect "
        "happened, then run idem-tasks resolve, or call Idempotency.resolve",
        scope=scope,
        key=key,
    )
