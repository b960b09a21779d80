r"""The story of one delivery: decorator -> key -> claim -> run -> record -> return.

Read `perform` first; the steps it calls stand below it in the order in which they happen.

    0  key      scope, key and fingerprint are taken from the call and frozen
    1  marker   \ `Store.claim`: of all deliveries of a key one is granted,
    2  claim    / the others get its outcome, or hear that it is in progress
    3  run      the handler, while the heartbeat renews its lease
    4  finish   \ `Store.finish`: the outcome is recorded, if the claim still stands,
    5  publish  / and from then on the marker answers with it
    6  ack      is the caller's, once this returned

With `session=` steps 3 and 4 are one transaction of the user's session: session_run.py.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from idem_tasks.asking import ask
from idem_tasks.call import Call
from idem_tasks.claims import (
    Claim,
    ClaimRequest,
    EncodedOutcome,
    Finished,
    Granted,
    InDoubt,
    InProgress,
    Lease,
    Lost,
    OutboxMessage,
    Parked,
    Recorded,
    Release,
    Released,
    enter,
    leave,
)
from idem_tasks.endings import give_back, keep_all, lease_lost, never_began, tell
from idem_tasks.errors import (
    ConfigurationError,
    IdemTasksError,
    InDoubtError,
    InProgressError,
    ParkedError,
    ReplayedFailureError,
    StoreError,
    StoreUnavailableError,
    comes_again,
)
from idem_tasks.events import EventName
from idem_tasks.replay import DOUBTFUL_SIZE, keep_failure, message_of, outcome_of_another, replay, type_name
from idem_tasks.runtime import FIRST_PAUSE, LONGEST_PAUSE, HandlerStopIteration, deadline_clock, is_interruption
from idem_tasks.session_run import commit_of_handler, finish_in, run_in_session
from idem_tasks.steps import Steps

Handler = Callable[..., Any]
A = TypeVar("A")
Ending = Recorded | Released | Finished | Lost | None
Answer = Claim | Finished | InProgress | InDoubt | Parked


async def perform(call: Call, handler: Handler, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run the handler once for its key, and return the outcome that all deliveries of this key see.

    Raises what the handler raises; `InProgressError`, `LeaseLostError` and `StoreError` when the message must be
    delivered again; `InDoubtError` and `ParkedError` when a person has to look.
    """
    outside = enter(None)
    try:
        claim = await open_claim(call)
        if isinstance(claim, Finished):
            return replay(call, claim)
        enter(claim)
        try:
            value = await run(call, claim, handler, args, kwargs)
        except BaseException as raised:
            recorded = await give_up(call, claim, raised)
            if recorded is None:
                raise
        else:
            return await record(call, claim, value)
        return outcome_of_another(call, recorded)
    finally:
        # Whatever struck, and wherever: a claim whose call is over is renewed no more, so that its lease runs out.
        call.services.heartbeat.let_go(call.request.owner)
        leave(outside)


async def open_claim(call: Call, told: Answer | None = None) -> Claim | Finished:
    """Steps 1 and 2: claim the key, or return the outcome that it has already.

    Where the policy lets the handler run all the same (`enabled`, `shadow`, `on_store_unavailable`), the claim is
    not protected: nothing is recorded under it. `told` is what the store has answered already, asked for many at once.
    """
    policy = call.request.policy
    if not policy.active:
        return unprotected(call)
    if not call.request.key:  # in shadow only; elsewhere no key is an error
        call.announce(EventName.UNPROTECTED_RUN, error="no usable key")
        return unprotected(call)
    try:
        claim = await claim_or_wait(call, told)
    except IdemTasksError as error:
        if policy.shadow and not isinstance(error, StoreError | ConfigurationError):
            call.announce(EventName.SHADOW_DUPLICATE, found=type(error).__name__)
        elif not runs_without_store(call, error):
            if isinstance(error, StoreError):
                call.announce(EventName.STORE_UNAVAILABLE, error=str(error))
            raise
        claim = unprotected(call)
        claim.refused = error if isinstance(error, StoreError) else None
        return claim
    except Exception as struck:
        if call.host is None or not is_interruption(struck):
            raise
        # A soft time limit, and nothing has run: the message has to come again, though Celery would fail it (F31).
        raise never_began(call, struck) from struck
    if policy.shadow and isinstance(claim, Finished):
        call.announce(EventName.SHADOW_DUPLICATE, found=claim.outcome.state.value)
        return unprotected(call)
    return claim


def runs_without_store(call: Call, error: IdemTasksError) -> bool:
    """Tell, and announce, whether this store's error must not keep a handler from running nor from returning."""
    if call.policy.shadow or (call.policy.on_store_unavailable == "run" and isinstance(error, StoreUnavailableError)):
        call.announce(EventName.UNPROTECTED_RUN, error=str(error))
        return True
    return False


async def claim_or_wait(call: Call, told: Answer | None = None) -> Claim | Finished:
    """Claim the key; while it is in progress elsewhere, wait as long as the policy says."""
    request, pause, waits_until = call.request, FIRST_PAUSE, -math.inf
    scope, key, policy = request.scope, request.key, request.policy
    if policy.on_in_progress == "wait" and not policy.shadow:
        waits_until = deadline_clock() + policy.wait_timeout
    while True:
        answer = told or await claim_or_withdraw(call, request, partial(call.services.store.claim, request))
        told = None
        match answer:
            case Claim() | Finished() as opened:
                return opened
            case InDoubt(dead=Lease() as dead) if callable(policy.on_crash):
                decided = await end_doubt(call, request, dead)
                if not isinstance(decided, ClaimRequest):
                    return decided
                request = decided
            case InDoubt(new):
                call.announce(EventName.IN_DOUBT, new=new)
                raise InDoubtError(scope=scope, key=key)
            case Parked(crashes, failures, new):
                call.announce(EventName.PARKED, crashes=crashes, failures=failures, new=new)
                raise ParkedError(scope=scope, key=key, crashes=crashes, failures=failures)
            case InProgress(retry_after):  # pragma: no branch - there is no other answer
                left = waits_until - deadline_clock()
                if left <= 0:
                    call.announce(EventName.IN_PROGRESS, retry_after=round(retry_after, 3))
                    raise InProgressError(scope=scope, key=key, retry_after=max(retry_after, 0.0))
                await call.services.runtime.sleep(min(pause, left))
                pause, request = min(pause * 2, LONGEST_PAUSE), request.again()


async def end_doubt(call: Call, request: ClaimRequest, dead: Lease) -> Claim | Finished | ClaimRequest:
    """Ask the policy's function about a dead holder, and apply its answer while that may still be true.

    Returns the request for another claim where somebody else ended the doubt meanwhile: his word counts, also the
    dead holder's own, who wakes up late. Raises `InDoubtError` where the function does not say.
    """
    until, pause = deadline_clock() + call.policy.lease, FIRST_PAUSE
    outcome = await ask(call, dead)
    while True:
        request = request.again()
        try:
            decided: Claim | Finished | Lost = await claim_or_withdraw(
                call, request, partial(call.services.store.decide, dead, request, outcome)
            )
        except StoreUnavailableError:
            if deadline_clock() + pause > until:
                raise
            await call.services.runtime.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE)
        else:
            return request.again() if isinstance(decided, Lost) else decided


def new_claim(call: Call, lease: Lease, *, asked_at: float) -> Claim:
    """Return a lease as its handler sees it, with what its steps and messages need."""
    return Claim(
        lease, Steps(call), asked_at=asked_at, outgoing=call.services.outgoing, finish_in=partial(finish_in, call)
    )


def unprotected(call: Call) -> Claim:
    """Make a claim that no store knows of, for a handler that is to run whatever happens."""
    claim = new_claim(call, Lease(call.request, fencing_token=0), asked_at=deadline_clock())
    claim.deadline = math.inf
    return claim


async def claim_or_withdraw(
    call: Call, request: ClaimRequest, ask_store: Callable[[], Awaitable[A | Granted]]
) -> A | Claim:
    """Ask the store; when this is interrupted on the way, give up whatever was granted meanwhile.

    Nothing has run yet: a claim that nobody holds would make others wait for its lease, or doubt it.
    """
    asked_at = deadline_clock()
    try:
        answer = await ask_store()
        if not isinstance(answer, Granted):
            return answer
        return await take_up_in_time(call, answer.lease, asked_at)
    except IdemTasksError:
        raise
    except BaseException as interruption:
        if call.services.runtime.can_wait(after=interruption):
            await call.services.runtime.shield(lambda: withdraw(call, request))
        raise


async def take_up_in_time(call: Call, lease: Lease, asked_at: float) -> Claim:
    """Hold a claim whose grant came in time; one that came late is given back, and the message comes again."""
    if deadline_clock() < asked_at + lease.request.policy.lease:
        return take_up(call, lease, asked_at)
    # Its lease may be over and another at work (F1).
    await call.services.runtime.shield(lambda: give_back(call, lease))
    raise too_late(call)


def too_late(call: Call) -> StoreUnavailableError:
    """Say that a lease was over before its handler began."""
    return StoreUnavailableError(
        f"the store took longer than the lease to grant {call.request.scope} {call.request.key!r}, "
        "so its handler did not begin"
    )


def take_up(call: Call, lease: Lease, asked_at: float) -> Claim:
    """Hold a granted claim: the heartbeat renews it from now on."""
    claim = new_claim(call, lease, asked_at=asked_at)
    call.services.heartbeat.hold(claim)
    if lease.taken_over:
        call.announce(EventName.TAKEN_OVER, fencing_token=lease.fencing_token, crashes=lease.crashes)
    call.announce(EventName.GRANTED, fencing_token=lease.fencing_token, attempt=lease.attempts)
    return claim


async def withdraw(call: Call, request: ClaimRequest) -> None:
    """Give back what an interrupted claim may have been granted; the same owner is granted the same claim again."""
    call.services.heartbeat.let_go(call.request.owner)
    try:
        answer = await call.services.store.claim(request.again())
    except IdemTasksError as error:
        call.announce(EventName.RELEASE_FAILED, error=str(error))
    else:
        if isinstance(answer, Granted):
            await give_back(call, answer.lease)


def run(call: Call, claim: Claim, handler: Handler, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Awaitable[Any]:
    """Step 3: run the handler; with `session=` step 4 too, and `claim.ending` says then how it ended."""
    if call.session is not None:
        return run_in_session(call, claim, call.session, handler, args, kwargs)
    return call.services.runtime.invoke(handler, args, kwargs)


async def seen_committed(call: Call, claim: Claim) -> Any:
    """See that the handler has committed what it finished by `finish_in`, and return the value that it gave there.

    What was rolled back is a failure of the handler, though it returned: nothing of it has happened.
    """
    assert claim.written is not None
    if await commit_of_handler(call, claim) is not None:
        return claim.written[0]
    error = ConfigurationError(
        f"{claim.scope} {claim.key!r}: the transaction that finish_in wrote in was rolled back, and nothing of it is "
        "recorded; let what rolled it back leave the handler as an exception"
    )
    await give_up(call, claim, error)
    raise error


async def record(call: Call, claim: Claim, value: Any, away: StoreError | None = None) -> Any:
    """Steps 4 and 5: record the value and return it; from here on nothing releases the claim any more.

    Where somebody else's outcome is recorded already, that is returned instead. What the handler published is
    recorded with the value, and then sent. `away` is what `finish` takes.
    """
    protected = claim.protected
    if protected and claim.parked_by is not None:
        raise claim.parked_by  # which the handler did not let through: nothing is recorded of a parked claim
    if protected and claim.written is not None:
        value = await seen_committed(call, claim)
    answer = claim.ending
    if answer is None and protected:
        try:
            answer = await call.services.runtime.shield(lambda: finish(call, claim, keep_all(call, claim, value), away))
        except IdemTasksError as error:
            if not runs_without_store(call, error):
                raise
    if isinstance(answer, Recorded) or answer is None or call.policy.shadow:
        messages = claim.close_outgoing()
        if messages:
            await send(call, messages, recorded=isinstance(answer, Recorded))
        return value
    if isinstance(answer, Finished):
        return outcome_of_another(call, answer)
    raise lease_lost(claim)


async def send(call: Call, messages: Sequence[OutboxMessage], *, recorded: bool) -> None:
    """Send what the handler published, before its caller acknowledges the message; a relay sends what fails.

    Where nothing is recorded that it could be sent from, what fails is raised, as if the handler had sent it.
    """
    relay = call.services.relay
    await (relay.send_now(messages) if recorded else relay.send_unrecorded(messages))


async def finish(
    call: Call, claim: Claim, outcome: EncodedOutcome, away: StoreError | None = None
) -> Recorded | Finished | Lost:
    """Bring the outcome to the record; while the store is away, try again as long as the lease lives.

    After that the outcome is kept in the marker, this process keeps trying, and `StoreUnavailableError` makes the
    message come back: it must never be acknowledged on the strength of a marker (F45, F57).

    `away` is what another message of its batch met just now, where this one's lease is over: its outcome is kept
    without another try, which could take long, and meanwhile somebody else runs the message.
    """
    store, pause, refused = call.services.store, FIRST_PAUSE, away
    call.services.heartbeat.let_go(call.request.owner)
    while refused is None or (not call.policy.shadow and deadline_clock() + pause < claim.deadline):
        if refused is not None:
            await call.services.runtime.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE)
        try:
            answer = await store.finish(claim.lease, outcome, may_insert=not claim.lost)
        except StoreError as error:  # even a table that is gone: the effect has happened
            refused = error
        else:
            tell(call, claim, answer, outcome.error_type)
            return answer
    claim.refused = refused
    if call.policy.shadow:
        raise refused
    if away is None and outcome.body is not None and len(outcome.body) > DOUBTFUL_SIZE:
        # Larger than MariaDB's max_allowed_packet, say: recorded without it, or it would be refused for ever (F43).
        without = replace(outcome, body=None, codec=None, not_kept="too_large")
        with contextlib.suppress(StoreError):
            answer = await store.finish(claim.lease, without, may_insert=not claim.lost)
            call.announce(EventName.OUTCOME_NOT_KEPT, reason=f"{len(outcome.body)} bytes were refused ({refused})")
            tell(call, claim, answer, outcome.error_type)
            return answer
    kept = await store.keep_pending(claim.lease, outcome)
    call.services.heartbeat.keep_trying(claim.lease, outcome)
    call.announce(EventName.OUTCOME_PENDING, kept_in_marker=kept, error=str(refused))
    raise StoreUnavailableError(
        f"the outcome of {claim.scope} {claim.key!r} could not be recorded while its lease lived ({refused}); "
        "this process keeps trying, and the message must be delivered again"
    ) from refused


async def give_up(call: Call, claim: Claim, raised: BaseException, away: StoreError | None = None) -> Finished | None:
    """The handler raised: record a final failure, or release the claim, before its exception goes on unchanged.

    Returns the outcome that somebody else has recorded: it is the answer then, and the exception is announced (F58).
    None: the exception goes on. `away` is what `finish` takes.
    """
    runtime = call.services.runtime
    if not claim.protected or claim.ending is not None or not runtime.can_wait(after=raised):
        return None
    error = raised.error if isinstance(raised, HandlerStopIteration) else raised
    try:
        answer: Ending
        if claim.written is not None and (committed := await own_outcome(call, claim)) is not None:
            answer = committed
        elif is_final(call, error):
            answer = await runtime.shield(lambda: finish(call, claim, keep_failure(error), away))
        else:
            answer = await runtime.shield(lambda: let_go(call, claim, error, away))
    except IdemTasksError as refused:
        if runs_without_store(call, refused):
            return None
        raise
    if call.policy.shadow or not isinstance(error, Exception):
        return None
    if isinstance(answer, Lost):
        raise lease_lost(claim) from error
    return answer if isinstance(answer, Finished) else None


async def own_outcome(call: Call, claim: Claim) -> Finished | Lost | None:
    """Return what a handler has committed by `finish_in` that raised after that, and send what it published with it.

    That is its outcome, whatever came later. None: it was rolled back, and the claim stands.
    """
    assert claim.written is not None
    _, outcome = claim.written
    answer = await commit_of_handler(call, claim)
    if not isinstance(answer, Recorded):
        return answer
    if outcome.messages:
        await send(call, outcome.messages, recorded=True)
    return Finished(outcome, call.request.fingerprint, call.policy.retention, claim.fencing_token)


async def let_go(call: Call, claim: Claim, error: BaseException, away: StoreError | None = None) -> Ending:
    """Release the claim of a handler that raised, as the policy says; None where the store cannot be reached.

    Then the lease runs out by itself, and the next delivery takes over from it as after a crash. `away` is what
    `finish` takes.
    """
    call.services.heartbeat.let_go(claim.lease.owner)
    release = Release(
        failed=is_failure(call, error),
        in_doubt=call.policy.doubts and not proves_no_effect(call, error),
        error_type=type_name(type(error)),
        error_message=message_of(error),
    )
    try:
        if away is not None:
            raise away
        answer = await call.services.store.release(claim.lease, release)
    except StoreError as refused:
        claim.refused = refused
        call.announce(EventName.RELEASE_FAILED, error=str(refused))
        return None
    tell(call, claim, answer, type(error).__name__)
    return answer


def is_failure(call: Call, error: BaseException) -> bool:
    """Tell a handler's failure from a shutdown, a framework's control flow, and a nested call that was put off."""
    if not isinstance(error, Exception) or comes_again(error):
        return False  # the latter are of a nested call, which asks for another delivery
    return call.host is None or call.host.is_failure(error)


def is_final(call: Call, error: BaseException) -> bool:
    """Tell whether the policy makes this failure the outcome.

    Never an error of ours, though `record_failures` be Exception: what is not set up right is mended, and then the
    message has to run. One that a nested call replayed is its handler's.
    """
    ours = isinstance(error, IdemTasksError) and not isinstance(error, ReplayedFailureError)
    return isinstance(error, call.policy.record_failures) and not ours and is_failure(call, error)


def proves_no_effect(call: Call, error: BaseException) -> bool:
    """Tell whether a handler that raised this has had no effect, by the user's or the framework's word."""
    if isinstance(error, call.policy.safe_to_retry):
        return True
    return call.host is not None and call.host.proves_no_effect(error)
