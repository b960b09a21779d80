"""The story of many messages at once: a claim and an outcome for each of them, one handler for all that are new.

Read `perform_batch` first. Each step is that of `task.py`, for as many messages as the store takes at once; a message
that it does not answer for goes there alone, and so do all where the store takes one at a time.

    0  key      one key, scope and fingerprint for each message; what comes twice in a batch is claimed once
    1  claim    in the order of scope and key, so that two batches never wait for each other (F66)
    2  run      the handler gets the new messages, in their order
    3  finish   each message by its own outcome, or its own exception (F38)

With `session=` the handler's writes and all outcomes are one transaction: batch_session.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from idem_tasks.batch_members import Batch, Member, claims_of, errors_of, outcomes_in, outcomes_of, results_of
from idem_tasks.batch_session import APART, handler_of_one, in_one_transaction
from idem_tasks.claims import EncodedOutcome, Finished, Granted, enter, leave
from idem_tasks.endings import end, give_back, keep_all, never_began
from idem_tasks.errors import (
    BatchError,
    FingerprintMismatchError,
    StoreError,
    StoreUnavailableError,
    comes_again,
)
from idem_tasks.events import EventName
from idem_tasks.replay import DOUBTFUL_SIZE, outcome_of_another, replay
from idem_tasks.runtime import (
    HandlerStopIteration,
    deadline_clock,
    interruption_in,
    is_interruption,
)
from idem_tasks.session_run import run_in_session
from idem_tasks.stores.base import batch_store_of
from idem_tasks.task import (
    give_up,
    open_claim,
    record,
    runs_without_store,
    take_up_in_time,
    too_late,
    unprotected,
    withdraw,
)

_AT_LEAST = 2
"""Messages for which a verb of many is asked: one alone has a verb of its own."""


async def perform_batch(batch: Batch) -> list[Any]:
    """Run the handler for the messages that are new, and return the outcomes of all, in their order.

    Raises `BatchError` if any message has no outcome; and what strikes from outside, as itself.
    """
    outside = enter(None)
    try:
        new = await open_all(batch)
        if new:
            await run_together(batch, new)
        return outcomes_of(batch)
    finally:
        # Whatever struck, and wherever: a claim whose call is over is renewed no more, so that its lease runs out.
        for member in batch.members:
            if member.call is not None:
                batch.services.heartbeat.let_go(member.call.request.owner)
        leave(outside)


# Steps 1 and 2


async def open_all(batch: Batch) -> list[Member]:
    """Claim the key of each message, and return those that are to run, in the order of the messages.

    Whatever strikes before the handler has begun: all that was granted is given back.
    """
    keyed = [member for member in batch.members if member.call is not None]
    asked = sorted([member for member in keyed if member.first is None], key=lambda member: member.place)
    try:
        await claim_together(batch, asked)
        for member in asked:
            await open_one(member)
            away = member.error if member.claim is None else member.claim.refused
            if isinstance(away, StoreUnavailableError):
                leave_the_rest(asked, away)
        for member in keyed:
            if member.first is not None:
                await open_later_one(member, member.first)
        for member in keyed:
            await see_in_time(member)
        return [member for member in batch.members if member.claim is not None and not member.settled]
    except BaseException as struck:
        runtime = batch.services.runtime
        if runtime.can_wait(after=struck):
            await runtime.shield(lambda: give_back_all(keyed))
        if batch.host is not None and keyed and is_interruption(struck):
            raise never_began(keyed[0].its_call, struck) from struck
        raise


async def claim_together(batch: Batch, members: Sequence[Member]) -> None:
    """Ask for all claims at once; what has no answer then is claimed by itself."""
    store = batch_store_of(batch.services.store)
    # In shadow a message may have no key, and disabled nothing is claimed.
    members = [member for member in members if member.its_call.request.key and member.its_call.policy.active]
    if store is None or len(members) < _AT_LEAST:
        return
    requests, asked_at = [member.its_call.request for member in members], deadline_clock()
    for member in members:
        member.asked = True
    try:
        answers = await store.claim_batch(requests)
    except StoreError:
        answers = [None] * len(members)  # by itself, each hears why
    for member, answer in zip(members, answers, strict=True):
        call = member.its_call
        if isinstance(answer, Granted):
            try:
                member.claim = await take_up_in_time(call, answer.lease, asked_at)
            except StoreUnavailableError as late:
                go_without(member, late)
        else:
            member.told, member.call = answer, replace(call, request=call.request.again())
        member.asked = False


async def open_one(member: Member) -> None:
    """Claim the key of this message, if that is not done yet, or end it by the outcome that there is, or its error."""
    if member.claim is not None or member.settled:
        return
    before, member.asked = sys.exception(), member.told is None
    try:
        opened = await open_claim(member.its_call, member.told)
        if isinstance(opened, Finished):
            member.end(replay(member.its_call, opened))
        else:
            member.claim = opened
    except Exception as error:
        if interruption_in(error, before) is not None:
            raise
        member.fail(error)
    member.asked = False


def leave_the_rest(members: Sequence[Member], error: StoreUnavailableError) -> None:
    """Ask for no more claims: each would wait for a store that is away, while those that were granted grow old."""
    for member in members:
        if member.claim is None and member.told is None and not member.settled:
            request = member.its_call.request
            go_without(member, StoreUnavailableError(f"{request.scope} {request.key!r} was not claimed: {error}"))


def go_without(member: Member, error: StoreUnavailableError) -> None:
    """Bring a message back that has no claim, unless the policy lets it run all the same."""
    if runs_without_store(member.its_call, error):
        member.claim = unprotected(member.its_call)
    else:
        member.fail(error)


async def open_later_one(member: Member, first: Member) -> None:
    """Leave a message to the outcome of the one before it of its key, but for shadow, and what was refused there."""
    if member.its_call.policy.shadow:
        member.its_call.announce(EventName.SHADOW_DUPLICATE, found="same_batch")
        member.claim = unprotected(member.its_call)
    elif isinstance(first.error, FingerprintMismatchError):
        await open_one(member)  # the record is for other content than the first one's, and may be for this one's


async def see_in_time(member: Member) -> None:
    """Give a claim back whose lease ran out while others were asked for: another may be at work (F1)."""
    claim = member.claim
    if claim is None or deadline_clock() < claim.deadline:
        return
    call = member.its_call
    call.services.heartbeat.let_go(claim.lease.owner)
    await call.services.runtime.shield(lambda: give_back(call, claim.lease))
    member.claim = None
    go_without(member, too_late(call))


async def give_back_all(members: Sequence[Member]) -> None:
    """Give back every claim of a batch whose handler has not begun."""
    for member in members:
        call, claim = member.its_call, member.claim
        if claim is not None and claim.protected:
            call.services.heartbeat.let_go(claim.lease.owner)
            await give_back(call, claim.lease)
        elif member.asked:
            await withdraw(call, call.request)


# Step 3


async def run_together(batch: Batch, new: Sequence[Member]) -> None:
    """Run the handler for these messages, and end each of them as it says."""
    runtime = batch.services.runtime
    try:
        enter(claims_of(new))
        if batch.session is None:
            returned = await runtime.invoke(batch.handler, (*batch.leading, [member.message for member in new]), {})
        else:
            returned = await in_one_transaction(batch, new)
    except BaseException as raised:
        error = raised.error if isinstance(raised, HandlerStopIteration) else raised
        if runtime.can_wait(after=raised):
            await runtime.shield(lambda: fail_all(new, error))
        if not is_of_the_messages(batch, error):
            raise
        if error in [member.error for member in new]:
            raise BatchError(results=results_of(batch), errors=errors_of(batch)) from error
    else:
        if returned is APART:
            await run_apart(batch, new)
        else:
            await runtime.shield(lambda: end_all(batch, new, returned))


async def run_apart(batch: Batch, new: Sequence[Member]) -> None:
    """Run the handler for each of these messages alone, in a transaction of its own."""
    runtime = batch.services.runtime
    for place, member in enumerate(new):
        error: BaseException | None = None
        try:
            if member.its_claim.ending is None:
                member.returned = await run_alone(batch, member)
        except BaseException as raised:
            error = member.returned = raised.error if isinstance(raised, HandlerStopIteration) else raised
            if not is_of_the_messages(batch, error):
                if runtime.can_wait(after=raised):
                    await runtime.shield(partial(end_the_struck, member, new[place + 1 :]))
                raise
        await runtime.shield(partial(settle, member))


async def run_alone(batch: Batch, member: Member) -> Any:
    """Run the handler for this message, in a transaction of its own."""
    assert batch.session is not None
    enter(claims_of([member]))
    call, claim = member.its_call, member.its_claim
    return await run_in_session(call, claim, batch.session, handler_of_one(batch, member), (), {})


async def end_the_struck(member: Member, rest: Sequence[Member]) -> None:
    """End the message whose handler was struck, and give the others back, of which nothing is done."""
    await settle(member)
    await give_back_all([other for other in rest if other.its_claim.ending is None])


def is_of_the_messages(batch: Batch, error: BaseException) -> bool:
    """Tell a handler's failure from what struck it, and from its framework's control flow: those go on unchanged."""
    if not isinstance(error, Exception) or is_interruption(error):
        return False
    return batch.host is None or comes_again(error) or batch.host.is_failure(error)


async def fail_all(members: Sequence[Member], error: BaseException) -> None:
    """The handler raised: that is the failure of each message."""
    for member in members:
        member.returned = error
    await settle_in_turn(members)


# Step 4


async def end_all(batch: Batch, members: Sequence[Member], returned: Any) -> None:
    """End each message by its own outcome, or its own failure; may be begun again.

    From here on nothing releases a claim any more but the failure of its own message.
    """
    outcomes, batch.surplus = outcomes_in(members, returned)
    for member, outcome in zip(members, outcomes, strict=True):
        member.returned = outcome
    await finish_together(batch, members)
    await settle_in_turn(members)


async def finish_together(batch: Batch, members: Sequence[Member]) -> None:
    """Bring the outcomes to their records in one step.

    What is not recorded then is finished by itself: that tries again, tells why, and keeps what has to be kept. Its
    claim is renewed until then: one outcome that is refused must not cost the others their leases.
    """
    store = batch_store_of(batch.services.store)
    plain = [member for member in members if is_plain(member)]
    if store is None or len(plain) < _AT_LEAST:
        return
    for member in plain:
        batch.services.heartbeat.let_go(member.its_claim.lease.owner)
    kept = [(member, keep_all(member.its_call, member.its_claim, member.returned)) for member in plain]
    kept.sort(key=lambda pair: pair[0].place)
    for group in list(groups_of(kept)):
        try:
            answers = await store.finish_batch([(member.its_claim.lease, outcome) for member, outcome in group])
        except StoreError:
            break
        for (member, _), answer in zip(group, answers, strict=True):
            if answer is not None:
                end(member.its_call, member.its_claim, answer)
    for member in plain:
        if member.its_claim.ending is None:
            batch.services.heartbeat.hold(member.its_claim)


def is_plain(member: Member) -> bool:
    """Tell whether nothing but an outcome is to be written for this message."""
    claim = member.its_claim
    ends_itself = claim.ending is not None or claim.parked_by is not None or claim.written is not None
    return not isinstance(member.returned, BaseException) and claim.protected and not ends_itself


def groups_of(kept: Sequence[tuple[Member, EncodedOutcome]]) -> Iterator[list[tuple[Member, EncodedOutcome]]]:
    """Split what is to be written so that no database refuses it for its size; what has messages goes by itself."""
    group: list[tuple[Member, EncodedOutcome]] = []
    size = 0
    for member, outcome in kept:
        if outcome.messages:
            continue
        more = len(outcome.body or b"")
        if group and size + more > DOUBTFUL_SIZE:
            yield group
            group, size = [], 0
        group.append((member, outcome))
        size += more
    if group:
        yield group


async def settle_in_turn(members: Sequence[Member]) -> None:
    """End these messages one after another; those whose leases are over do not wait for a store that is away."""
    refused: StoreError | None = None
    for member in members:
        claim = member.its_claim
        is_over = member.its_call.policy.shadow or deadline_clock() >= claim.deadline
        await settle(member, away=refused if is_over else None)
        refused = claim.refused


async def settle(member: Member, *, away: StoreError | None = None) -> None:
    """End this message as a handler of it alone would have ended: by its outcome, or by its exception."""
    if member.settled:
        return
    call, claim, returned = member.its_call, member.its_claim, member.returned
    before = returned if isinstance(returned, BaseException) else sys.exception()
    try:
        if not isinstance(returned, BaseException):
            member.end(await record(call, claim, returned, away))
            return
        recorded = await give_up(call, claim, returned, away)
        if recorded is None:
            member.fail(returned)
        else:
            member.end(outcome_of_another(call, recorded))
    except Exception as error:
        if interruption_in(error, before) is not None:
            raise
        member.fail(error)
