r"""The story of one delivery: decorator -> key -> claim -> run -> record -> return.

Read `perform` first; the steps it calls stand below it in the order in which they happen.

    0  key      scope, key and fingerprint are taken from the call and frozen
    1  marker   \ `Store.claim`: of all deliveries of a key one is granted,
    2  claim    / the others get its outcome, or hear that it is in progress
    3  run      the handler, while the heartbeat renews its lease
    4  finish   \ `Store.finish`: the outcome is recorded, if the claim still stands,
    5  publish  / and from then on the marker answers with it
    6  ack      is the caller's, once this returned
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from idem_tasks.call import Call
from idem_tasks.claims import (
    Claim,
    ClaimAnswer,
    EncodedOutcome,
    Finished,
    Granted,
    InDoubt,
    InProgress,
    Lease,
    Lost,
    Parked,
    Recorded,
    Release,
    Released,
    State,
    enter,
    leave,
)
from idem_tasks.errors import (
    ConflictError,
    IdemTasksError,
    InDoubtError,
    InProgressError,
    LeaseLostError,
    ParkedError,
    StoreError,
    StoreUnavailableError,
)
from idem_tasks.events import EventName
from idem_tasks.replay import keep, keep_failure, message_of, replay, type_name, value_of
from idem_tasks.runtime import HandlerStopIteration, deadline_clock

Handler = Callable[..., Any]
Ending = Recorded | Released | Finished | Lost | None

_FIRST_PAUSE = 0.05
"""Seconds between the first two looks at a key in progress, or tries of a finish; doubled each time."""

_LONGEST_PAUSE = 2.0
"""Seconds between two such tries, at most."""


async def perform(call: Call, handler: Handler, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run the handler once for its key, and return the outcome that all deliveries of this key see.

    Raises what the handler raises; `InProgressError`, `LeaseLostError` and `StoreUnavailableError` when the message
    must be delivered again; `InDoubtError` and `ParkedError` when a person has to look.
    """
    opened = await open_claim(call)
    if isinstance(opened, Finished):
        return replay(call, opened)
    claim, raised, value = opened, None, None
    token = enter(claim)
    try:
        value = await call.services.runtime.invoke(handler, args, dict(kwargs))
    except GeneratorExit:
        # The event loop is gone and nothing can be awaited any more: the lease runs out by itself.
        call.services.heartbeat.let_go(claim)
        raise
    except BaseException as error:  # noqa: BLE001 - goes on unchanged once the claim is released
        raised = error
    finally:
        leave(token)
    if raised is not None:
        return await give_up(call, claim, raised)
    return await record(call, claim, value)


async def open_claim(call: Call) -> Claim | Finished:
    """Steps 1 and 2: claim the key, or return the outcome that it has already.

    Where the policy lets the handler run all the same (`enabled`, `shadow`, `on_store_unavailable`), the claim is
    not protected: nothing is recorded under it.
    """
    if not call.policy.active:
        return unprotected(call)
    try:
        return await claim_or_wait(call)
    except StoreUnavailableError as error:
        if call.policy.on_store_unavailable == "raise" and not call.policy.shadow:
            raise
        call.announce(EventName.UNPROTECTED_RUN, error=str(error))
    except (ConflictError, InDoubtError, ParkedError, StoreError) as error:
        if not call.policy.shadow:
            raise
        call.announce(EventName.SHADOW_DUPLICATE, found=type(error).__name__)
    return unprotected(call)


async def claim_or_wait(call: Call) -> Claim | Finished:
    """Claim the key; while it is in progress elsewhere, wait as long as the policy says."""
    waits_until = deadline_clock() + (call.policy.wait_timeout if call.policy.on_in_progress == "wait" else 0.0)
    pause = _FIRST_PAUSE
    while True:
        asked_at = deadline_clock()
        match await claim_or_withdraw(call):
            case Granted(lease):
                return take_up(call, lease, asked_at)
            case Finished() as finished:
                if not call.policy.shadow:
                    return finished
                call.announce(EventName.SHADOW_DUPLICATE, found=finished.outcome.state.value)
                return unprotected(call)
            case InDoubt(new):
                call.announce(EventName.IN_DOUBT, new=new)
                raise InDoubtError(scope=call.request.scope, key=call.request.key)
            case Parked(crashes, failures, new):
                call.announce(EventName.PARKED, crashes=crashes, failures=failures, new=new)
                raise ParkedError(scope=call.request.scope, key=call.request.key, crashes=crashes, failures=failures)
            case InProgress(retry_after):
                left = waits_until - deadline_clock()
                if left <= 0 or call.policy.shadow:
                    call.announce(EventName.IN_PROGRESS, retry_after=round(retry_after, 3))
                    raise InProgressError(
                        scope=call.request.scope, key=call.request.key, retry_after=max(retry_after, 0.0)
                    )
                await call.services.runtime.sleep(min(pause, left))
                pause = min(pause * 2, _LONGEST_PAUSE)


def unprotected(call: Call) -> Claim:
    """Make a claim that no store knows of, for a handler that is to run whatever happens."""
    claim = Claim(Lease(call.request, fencing_token=0), asked_at=deadline_clock())
    claim.deadline = math.inf
    return claim


async def claim_or_withdraw(call: Call) -> ClaimAnswer:
    """Ask the store; when this is interrupted on the way, give up whatever was granted meanwhile.

    Nothing has run yet: a claim that nobody holds would make others wait for its lease, or doubt it.
    """
    try:
        return await call.services.store.claim(call.request)
    except IdemTasksError:
        raise
    except BaseException as interruption:  # noqa: BLE001 - raised once the claim is withdrawn
        withdrawn = interruption
    await call.services.runtime.shield(lambda: withdraw(call))
    raise withdrawn


async def withdraw(call: Call) -> None:
    """Release what an interrupted claim may have been granted; the same owner is granted the same claim again."""
    try:
        answer = await call.services.store.claim(call.request)
        if isinstance(answer, Granted):
            await call.services.store.release(answer.lease, Release())
    except StoreError as error:
        call.announce(EventName.RELEASE_FAILED, error=str(error))


def take_up(call: Call, lease: Lease, asked_at: float) -> Claim:
    """Hold a granted claim: the heartbeat renews it from now on."""
    claim = Claim(lease, asked_at=asked_at)
    call.services.heartbeat.hold(claim)
    if lease.taken_over:
        call.announce(EventName.TAKEN_OVER, fencing_token=lease.fencing_token, crashes=lease.crashes)
    call.announce(EventName.GRANTED, fencing_token=lease.fencing_token, attempt=lease.attempts)
    return claim


async def record(call: Call, claim: Claim, value: Any) -> Any:
    """Steps 4 and 5: record the value and return it; from here on nothing releases the claim any more."""
    if not claim.protected:
        return value
    outcome = keep(call, value)
    try:
        answer = await call.services.runtime.shield(lambda: finish(call, claim, outcome))
    except StoreError:
        if call.policy.shadow:
            return value
        raise
    match answer:
        case Recorded():
            call.announce(EventName.COMPLETED, fencing_token=claim.fencing_token)
            return value
        case Finished():
            call.announce(EventName.SUPERSEDED, fencing_token=claim.fencing_token)
            return value if call.policy.shadow else value_of(call, answer)
        case Lost():
            lost = lease_lost(call, claim)
            if call.policy.shadow:
                return value
            raise lost


async def finish(call: Call, claim: Claim, outcome: EncodedOutcome) -> Recorded | Finished | Lost:
    """Bring the outcome to the record; while the store is away, try again as long as the lease lives.

    After that the outcome is kept in the marker, this process keeps trying, and `StoreUnavailableError` makes the
    message come back: it must never be acknowledged on the strength of a marker (F45, F57).
    """
    store, pause = call.services.store, _FIRST_PAUSE
    call.services.heartbeat.let_go(claim)
    while True:
        try:
            return await store.finish(claim.lease, outcome, may_insert=not claim.lost)
        except StoreError as error:
            refused = error
        if call.policy.shadow:
            raise refused
        if deadline_clock() + pause >= claim.deadline:
            break
        await call.services.runtime.sleep(pause)
        pause = min(pause * 2, _LONGEST_PAUSE)
    kept = await store.keep_pending(claim.lease, outcome)
    call.services.heartbeat.keep_trying(claim.lease, outcome)
    call.announce(EventName.OUTCOME_PENDING, kept_in_marker=kept, error=str(refused))
    raise StoreUnavailableError(
        f"the outcome of {claim.scope} {claim.key!r} could not be recorded while its lease lived ({refused}); "
        "this process keeps trying, and the message must be delivered again"
    ) from refused


async def give_up(call: Call, claim: Claim, raised: BaseException) -> Any:
    """The handler raised: record a final failure, or release the claim, before its exception goes on unchanged.

    Where somebody else's outcome is recorded already, that is returned instead, and the exception is logged (F58).
    """
    if not claim.protected:
        raise raised
    error = raised.error if isinstance(raised, HandlerStopIteration) else raised
    if isinstance(error, call.policy.record_failures):
        outcome = keep_failure(error)
        answer: Ending = await call.services.runtime.shield(lambda: finish(call, claim, outcome))
    else:
        answer = await call.services.runtime.shield(lambda: let_go(call, claim, error))
    match answer:
        case Recorded():
            call.announce(EventName.FAILED, error=type(error).__name__)
        case Released(State.IN_DOUBT):
            call.announce(EventName.IN_DOUBT, new=True, error=type(error).__name__)
        case Released(State.PARKED):
            call.announce(EventName.PARKED, new=True, error=type(error).__name__)
        case Released():
            call.announce(EventName.RELEASED, error=type(error).__name__)
        case Finished():
            call.announce(EventName.SUPERSEDED, fencing_token=claim.fencing_token, error=type(error).__name__)
            if isinstance(error, Exception) and not call.policy.shadow:
                return value_of(call, answer)
        case Lost():
            lost = lease_lost(call, claim)
            if isinstance(error, Exception) and not call.policy.shadow:
                raise lost from error
    raise raised


async def let_go(call: Call, claim: Claim, error: BaseException) -> Ending:
    """Release the claim of a handler that raised, as the policy says; None where the store cannot be reached.

    Then the lease runs out by itself, and the next delivery takes over from it as after a crash.
    """
    call.services.heartbeat.let_go(claim)
    release = Release(
        failed=isinstance(error, Exception) and (call.host is None or call.host.is_failure(error)),
        in_doubt=call.policy.on_crash == "hold" and not proves_no_effect(call, error),
        error_type=type_name(type(error)),
        error_message=message_of(error),
    )
    try:
        return await call.services.store.release(claim.lease, release)
    except StoreError as refused:
        call.announce(EventName.RELEASE_FAILED, error=str(refused))
        return None


def proves_no_effect(call: Call, error: BaseException) -> bool:
    """Tell whether a handler that raised this has had no effect, by the user's or the framework's word."""
    if isinstance(error, call.policy.safe_to_retry):
        return True
    return call.host is not None and call.host.proves_no_effect(error)


def lease_lost(call: Call, claim: Claim) -> LeaseLostError:
    """Say that the claim was taken over while its handler ran."""
    call.announce(EventName.LEASE_LOST, fencing_token=claim.fencing_token)
    return LeaseLostError(scope=claim.scope, key=claim.key, fencing_token=claim.fencing_token)
