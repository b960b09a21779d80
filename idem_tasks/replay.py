"""What is kept of a handler's ending, and what a duplicate gets of it."""

from __future__ import annotations

import sys
from typing import Any

from idem_tasks.call import Call
from idem_tasks.claims import EncodedOutcome, Finished, State
from idem_tasks.errors import DuplicateError, FingerprintMismatchError, OutcomeError, ReplayedFailureError
from idem_tasks.events import EventName
from idem_tasks.policy import Policy
from idem_tasks.runtime import interruption_in

MAX_ERROR_MESSAGE = 2000
"""Characters kept of an exception's text."""

DOUBTFUL_SIZE = 1024 * 1024
"""Bytes of an outcome, the default limit, above which it may be the outcome that a database refuses."""

_REASONS = {
    "too_large": "it was larger than the policy's max_outcome_bytes",
    "not_encodable": "it could not be encoded; see the log of that run",
    "skipped": 'the policy was on_duplicate="skip"',
}


def keep(call: Call, value: Any) -> EncodedOutcome:
    """Encode the value of a handler, or of its step.

    No fault of the codec or the value is raised, because the effect has happened (F43). What cannot be kept is logged,
    and the record, or step, is completed without it.
    """
    policy, codec, before = call.request.policy, call.services.codec, sys.exception()
    if policy.on_duplicate == "skip" and call.step is None:
        return EncodedOutcome(not_kept="skipped")
    try:
        body = codec.encode(value, call.return_type(), call.context)
        kept = EncodedOutcome(body=body if type(body) is bytes else memoryview(body).tobytes(), codec=codec.name)
    except Exception as error:
        # A user's codec may raise anything, and the effect must be recorded. What struck from outside is no fault.
        if interruption_in(error, before) is not None:
            raise
        reason = str(error) if isinstance(error, OutcomeError) else type(error).__name__
        call.announce(EventName.OUTCOME_NOT_KEPT, reason=reason)
        return EncodedOutcome(not_kept="not_encodable")
    if len(body) > policy.max_outcome_bytes:
        call.announce(
            EventName.OUTCOME_NOT_KEPT,
            reason=f"{len(body)} bytes are more than max_outcome_bytes={policy.max_outcome_bytes}",
        )
        return EncodedOutcome(not_kept="too_large")
    return kept


def keep_failure(error: BaseException) -> EncodedOutcome:
    """Keep a failure that the policy calls final."""
    return EncodedOutcome(State.FAILED, error_type=type_name(type(error)), error_message=message_of(error))


def type_name(kind: type[BaseException]) -> str:
    """Return `module.qualname`, by which a recorded failure is told from others."""
    return f"{kind.__module__}.{kind.__qualname__}"


def message_of(error: BaseException) -> str:
    """Return an exception's text, cut to `MAX_ERROR_MESSAGE` characters, or its type where that text fails."""
    before = sys.exception()
    try:
        text = str(error)
    except Exception as broken:  # a user's exception may have a broken __str__
        if interruption_in(broken, before) is not None:
            raise
        text = f"<{type(error).__name__} without a readable message>"
    return text.replace("\x00", "").encode("utf-8", "replace").decode()[:MAX_ERROR_MESSAGE]


def replay(call: Call, finished: Finished) -> Any:
    """Answer a duplicate: return the recorded value, or raise what the policy says.

    Raises `FingerprintMismatchError` for other arguments, `DuplicateError` under on_duplicate="raise", the
    recorded failure, and `OutcomeError` for an outcome that was not kept or cannot be read.
    """
    check_arguments(call, finished)
    call.announce(EventName.REPLAYED, state=finished.outcome.state.value)
    match call.policy.on_duplicate:
        case "skip":
            return None
        case "raise":
            raise DuplicateError(
                scope=call.request.scope, key=call.request.key, outcome=_value_if_readable(call, finished)
            )
        case _:
            return value_of(call, finished.outcome)


def outcome_of_another(call: Call, finished: Finished) -> Any:
    """Answer a handler that was superseded: all deliveries of a key see the outcome that was recorded first.

    Raises `FingerprintMismatchError` if that was for other arguments, and what `value_of` raises.
    """
    check_arguments(call, finished)
    return value_of(call, finished.outcome)


def check_arguments(call: Call, finished: Finished) -> None:
    """Raise `FingerprintMismatchError` if the key was finished for other arguments."""
    if not call.request.matches(finished.fingerprint):
        call.announce(EventName.MISMATCHED)
        raise FingerprintMismatchError(scope=call.request.scope, key=call.request.key)


def value_of(call: Call, outcome: EncodedOutcome) -> Any:
    """Return the recorded value, or raise the recorded failure."""
    if outcome.state is State.FAILED:
        raise recorded_failure(call.policy, outcome)
    if outcome.body is not None:
        codec, before = call.services.codec, sys.exception()
        try:
            return codec.decode(outcome.body, call.return_type(), call.context)
        except Exception as error:
            struck = interruption_in(error, before)
            if struck is not None:
                # A soft limit, which the codec took for damaged bytes: that would be final, and the outcome is there.
                raise struck from None
            raise
    if outcome.not_kept == "skipped":
        return None
    reason = _REASONS.get(outcome.not_kept or "", "the reason is not known")
    what = "" if call.step is None else f"step {call.step!r} of "
    raise OutcomeError(
        f"{what}{call.request.scope} {call.request.key!r} was completed before, but its outcome was not kept: {reason}"
    )


def _value_if_readable(call: Call, finished: Finished) -> Any:
    if finished.outcome.state is State.FAILED:
        return None
    before = sys.exception()
    try:
        return value_of(call, finished.outcome)
    except Exception as error:  # an outcome that was not kept, or is unreadable, has no value to show
        if interruption_in(error, before) is not None:
            raise
        return None


def recorded_failure(policy: Policy, outcome: EncodedOutcome) -> Exception:
    """Rebuild a recorded failure as its own type, if the policy names exactly that type and its text survives."""
    error_type, message = outcome.error_type or "Exception", outcome.error_message or ""
    before = sys.exception()
    for kind in policy.record_failures:
        if type_name(kind) == error_type:
            try:
                rebuilt = kind(message)
                if str(rebuilt) == message or rebuilt.args == (message,):
                    return rebuilt
            except Exception as error:  # its constructor wants something else: replayed under its name then
                if interruption_in(error, before) is not None:
                    raise
                break
    return ReplayedFailureError(error_type=error_type, error_message=message)
