"""How a claim ends, whoever ends it: what is kept with its outcome, what is announced, and what is given back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from idem_tasks.call import Call
from idem_tasks.claims import Claim, EncodedOutcome, Finished, Lease, Lost, Recorded, Release, Released, State
from idem_tasks.errors import IdemTasksError, LeaseLostError, StoreUnavailableError
from idem_tasks.events import EventName
from idem_tasks.replay import keep


def never_began(call: Call, struck: BaseException) -> StoreUnavailableError:
    """Say that a framework's interruption came before the handler."""
    return StoreUnavailableError(
        f"{call.request.scope} {call.request.key!r} was struck by {type(struck).__name__} before its handler began"
    )


async def give_back(call: Call, lease: Lease) -> None:
    """Release a claim under which nothing has run."""
    try:
        await call.services.store.release(lease, Release())
    except IdemTasksError as error:
        call.announce(EventName.RELEASE_FAILED, error=str(error))


def keep_all(call: Call, claim: Claim, value: Any) -> EncodedOutcome:
    """Keep what the handler returned, and what it published; from here on it publishes nothing more."""
    kept, messages = keep(call, value), claim.close_outgoing()
    return replace(kept, messages=messages) if messages else kept


def is_fenced(call: Call, claim: Claim) -> bool:
    """Tell whether what the handler writes in its session stands or falls with its claim.

    Not so in shadow, disabled or without a store: then it is only committed, because the handler does not do that.
    """
    return claim.protected and not call.policy.shadow


def end(call: Call, claim: Claim, answer: Recorded | Finished | Lost) -> None:
    """Note, and announce, how the claim of a handler that returned ended."""
    claim.ending = answer
    tell(call, claim, answer, None)


def tell(call: Call, claim: Claim, answer: Recorded | Released | Finished | Lost, error: str | None) -> None:
    """Announce how a claim ended; `error` is the type of what its handler raised, None if it returned."""
    details: dict[str, Any] = {"fencing_token": claim.lease.fencing_token}
    if error is not None:
        details["error"] = error
    match answer:
        case Recorded():
            call.announce(EventName.COMPLETED if error is None else EventName.FAILED, **details)
        case Released(State.IN_DOUBT):
            call.announce(EventName.IN_DOUBT, new=True, **details)
        case Released(State.PARKED):
            call.announce(EventName.PARKED, new=True, **details)
        case Released():
            call.announce(EventName.RELEASED, **details)
        case Finished():
            call.announce(EventName.SUPERSEDED, **details)
        case Lost():  # pragma: no branch - there is no other answer
            call.announce(EventName.LEASE_LOST, **details)


def lease_lost(claim: Claim) -> LeaseLostError:
    """Say that the claim was taken over while its handler ran, and that no outcome is recorded yet."""
    return LeaseLostError(scope=claim.scope, key=claim.key, fencing_token=claim.fencing_token)
