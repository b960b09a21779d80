"""Steps 2 and 3 of a batch as one: what the handler writes for all its messages, and their outcomes, are one commit.

That is so as long as nothing goes wrong. What is written for one message cannot be told from what is written for
another, so where one failed or was taken over nothing is committed, and the handler is called again for each message
alone, in a transaction of its own (`handler_of_one`). Read `in_one_transaction` first.
"""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from idem_tasks.batch_members import Batch, Member, outcomes_in
from idem_tasks.claims import Claim, EncodedOutcome, Finished, Lost, Recorded, Released, State
from idem_tasks.endings import end, give_back, is_fenced, keep_all, never_began
from idem_tasks.errors import ConfigurationError, IdemTasksError, StoreError, StoreUnavailableError
from idem_tasks.runtime import FIRST_PAUSE, interruption_in, is_interruption
from idem_tasks.session_run import CONFLICT_NOTE, RERUNS, inherited, look, may_run_again
from idem_tasks.stores.base import BatchTransaction, batch_transaction_of

Answer = Recorded | Finished | Lost | None

APART: Final = object()
"""Returned in the place of what the handler returned: each message is to run by itself."""


async def in_one_transaction(batch: Batch, new: Sequence[Member]) -> Any:
    """Run the handler and record all outcomes in one transaction, and return what it returned; or `APART`.

    Under `hold` each message runs apart from the beginning: none may run twice. A deadlock or a serialization failure
    undoes all that was written in the session, so the handler runs again.
    """
    assert batch.session is not None
    fenced = [is_fenced(member.its_call, member.its_claim) for member in new]
    if len(new) == 1 or new[0].its_call.policy.doubts or len(set(fenced)) > 1:
        return APART
    if not fenced[0]:
        return await run_unfenced(batch, new)
    placed, runs = sorted(new, key=lambda member: member.place), 0
    while True:
        runs += 1
        leases = [member.its_claim.lease for member in placed]
        transaction = batch_transaction_of(batch.services.store, leases, batch.session.source, batch.session.given)
        try:
            return await run_once(batch, new, placed, transaction)
        except Exception as raised:
            if not all(may_run_again(each.its_call, each.its_claim, transaction, raised) for each in new):
                raise
            if runs > RERUNS:
                raised.add_note(CONFLICT_NOTE)
                raise
        await batch.services.runtime.sleep(random.uniform(0, FIRST_PAUSE))  # noqa: S311 - so that two do not meet again
        hold_again(batch, new)


async def run_unfenced(batch: Batch, new: Sequence[Member]) -> Any:
    """Run the handler in a session that no claim guards: disabled, in shadow, or while there is no store."""
    assert batch.session is not None
    runtime, transaction = batch.services.runtime, batch.session.source.unfenced(batch.session.given)
    committed = False
    try:
        await transaction.begin()
        returned = await call_handler(batch, new, transaction)
        if not has_failed(outcomes_in(new, returned)[0]):
            committed = await runtime.shield(lambda: transaction.commit(EncodedOutcome()))
            return returned
        drop(batch, new)
        return APART
    finally:
        ended_by = sys.exception()
        if ended_by is None or runtime.can_wait(after=ended_by):
            was_struck = ended_by is not None and interruption_in(ended_by, None) is not None
            if not committed:
                await runtime.shield(lambda: transaction.roll_back(throw_away=was_struck))
            await runtime.shield(transaction.close)


async def run_once(batch: Batch, new: Sequence[Member], placed: Sequence[Member], transaction: BatchTransaction) -> Any:
    """Begin, run the handler, and commit what it wrote together with all outcomes; or leave nothing of either."""
    runtime = batch.services.runtime
    is_here = True
    try:
        if not await begin(batch, placed, transaction):
            return APART
        returned = await call_handler(batch, new, transaction)
        is_here = new[0].its_claim.is_here
        outcomes, batch.surplus = outcomes_in(new, returned)
        if has_failed(outcomes):
            await runtime.shield(lambda: undo(batch, new, transaction))
            return APART
        for member, outcome in zip(new, outcomes, strict=True):
            member.returned = outcome
        if is_here and not await runtime.shield(lambda: commit(batch, placed, transaction)):
            hold_again(batch, new)
            return APART
    except BaseException as raised:
        is_here = new[0].its_claim.is_here
        was_struck, is_cut_off = interruption_in(raised, None) is not None, transaction.is_cut_off
        if is_here and not are_ended(new) and runtime.can_wait(after=raised):
            await runtime.shield(lambda: transaction.roll_back(throw_away=was_struck))
        if is_cut_off and not was_struck and not isinstance(raised, IdemTasksError):
            # Nothing was written, so the messages may as well come again (F59).
            raise StoreUnavailableError(
                f"a batch of {len(new)} messages lost its database while its handler ran, so nothing is written"
            ) from raised
        raise
    else:
        return returned
    finally:
        ended_by = sys.exception()
        if not is_here:
            inherited.append(transaction)
        elif ended_by is None or runtime.can_wait(after=ended_by):
            await runtime.shield(transaction.close)


async def call_handler(batch: Batch, new: Sequence[Member], transaction: Any) -> Any:
    """Call the handler with these messages and its session."""
    assert batch.session is not None
    for member in new:
        member.its_claim.transaction, member.its_claim.steps = transaction, NoSteps()
    arguments = (*batch.leading, [member.message for member in new])
    return await batch.services.runtime.invoke(batch.handler, arguments, batch.session.passed({}, transaction.session))


async def begin(batch: Batch, placed: Sequence[Member], transaction: BatchTransaction) -> bool:
    """Begin the transaction; False if a claim was lost before.

    Where it cannot be begun all claims are given back: nothing has run.
    """
    runtime = batch.services.runtime
    try:
        answers = await transaction.begin_all()
    except BaseException as error:
        if runtime.can_wait(after=error):
            was_struck = interruption_in(error, None) is not None
            await runtime.shield(lambda: end_before_it_began(batch, placed, transaction, was_struck))
        if batch.host is not None and is_interruption(error):
            raise never_began(placed[0].its_call, error) from error
        raise
    note(placed, answers)
    return answers == [None] * len(answers)


async def end_before_it_began(
    batch: Batch, placed: Sequence[Member], transaction: BatchTransaction, was_struck: bool
) -> None:
    """Give back the claims of a handler whose transaction could not be begun."""
    await transaction.roll_back(throw_away=was_struck)
    for member in placed:
        claim = member.its_claim
        batch.services.heartbeat.let_go(claim.lease.owner)
        await give_back(member.its_call, claim.lease)
        claim.ending = Released(State.RELEASED)


async def undo(batch: Batch, new: Sequence[Member], transaction: BatchTransaction) -> None:
    """Leave nothing of what was written for all of them, before each runs by itself."""
    await transaction.roll_back(throw_away=False)
    drop(batch, new)


def drop(batch: Batch, new: Sequence[Member]) -> None:
    """Forget what a run left behind of which nothing is committed."""
    batch.surplus = []
    for member in new:
        member.its_claim.drop_outgoing()
        member.its_claim.transaction = None


def hold_again(batch: Batch, new: Sequence[Member]) -> None:
    """Renew the claims on, whose commit had let go of them and made nothing true."""
    drop(batch, new)
    for member in new:
        if member.its_claim.ending is None:
            batch.services.heartbeat.hold(member.its_claim)


async def commit(batch: Batch, placed: Sequence[Member], transaction: BatchTransaction) -> bool:
    """Write all outcomes as the last thing in the handler's transaction, and commit once; False: nothing is committed.

    Begun again after an interruption it commits nothing a second time, but looks what became of the first.
    """
    refused, before = None, sys.exception()
    for member in placed:
        batch.services.heartbeat.let_go(member.its_claim.lease.owner)
    if not transaction.commit_begun:
        try:
            kept = [keep_all(member.its_call, member.its_claim, member.returned) for member in placed]
            if all(await transaction.commit_all(kept)):
                note(placed, [Recorded()] * len(placed))
                return True
        except Exception as error:
            if interruption_in(error, before) is not None:
                raise
            if not transaction.may_be_committed:
                if isinstance(error, IdemTasksError) or transaction.is_conflict(error):
                    raise
                # What one message wrote is refused, by a constraint, say: apart, it is refused alone (F38).
                await transaction.roll_back(throw_away=False)
                return False
            refused = error
    elif not transaction.may_be_committed:
        return False  # struck before the commit was sent
    await transaction.roll_back(throw_away=transaction.may_be_committed)
    answers = await look_at_all(placed, transaction)
    committed = are_recorded(answers)
    if refused is not None and not committed:
        raise refused
    note(placed, answers)
    if refused is not None and not isinstance(refused, StoreError):
        raise refused  # not of the database: all is committed, and a listener of the user's raised after it
    return committed


async def look_at_all(
    placed: Sequence[Member], transaction: BatchTransaction
) -> list[Recorded | Finished | Lost | None]:
    """Tell what became of a commit; while the store is away, try again as long as the first lease lives.

    After that nobody knows: nothing is released, and the next deliveries find what there is.
    """
    soonest = min(placed, key=lambda member: member.its_claim.deadline)
    try:
        return await look(soonest.its_call, soonest.its_claim, transaction.look_all)
    except StoreUnavailableError:
        for member in placed:
            member.its_claim.ending = Lost()
        raise


def note(placed: Sequence[Member], answers: Sequence[Answer]) -> None:
    """Note, and announce, how the claims ended of which that is known."""
    for member, answer in zip(placed, answers, strict=True):
        if answer is not None and member.its_claim.ending is None:
            end(member.its_call, member.its_claim, answer)


def are_recorded(answers: Sequence[object]) -> bool:
    """Tell whether all is committed."""
    return not [answer for answer in answers if not isinstance(answer, Recorded)]


def are_ended(members: Sequence[Member]) -> bool:
    """Tell whether nothing is to be rolled back any more."""
    return None not in [member.its_claim.ending for member in members]


def has_failed(outcomes: Sequence[Any]) -> bool:
    """Tell whether one of these is an exception."""
    return [outcome for outcome in outcomes if isinstance(outcome, BaseException)] != []


def handler_of_one(batch: Batch, member: Member) -> Callable[..., Any]:
    """Return the handler as one of this message alone: it returns the message's outcome, or raises its exception."""

    def outcome(returned: Any) -> Any:
        [ended], surplus = outcomes_in([member], returned)
        if isinstance(ended, BaseException):
            raise ended
        batch.surplus += surplus
        return ended

    async def awaited(returned: Awaitable[Any]) -> Any:
        return outcome(await returned)

    def handler(**session: Any) -> Any:
        returned = batch.handler(*batch.leading, [member.message], **session)
        return awaited(returned) if inspect.isawaitable(returned) else outcome(returned)

    return handler


class NoSteps:
    """Refuses the steps of a batch whose messages share a transaction."""

    running: str | None = None

    def take(
        self, claim: Claim, name: str, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Raise `ConfigurationError`."""
        raise ConfigurationError(
            f"step {name!r} of {claim.scope} {claim.key!r}: a batch with session= has no steps, because what is written"
            " for one of its messages is undone with the others; take one of the two"
        )
