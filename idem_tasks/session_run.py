"""Steps 3 and 4 of the story as one: the handler writes in a transaction of the user's, and its outcome is part of it.

Whatever happens on the way, either all is committed or nothing. Read `run_in_session` first, which is for `session=`;
`finish_in` is for handlers that commit by themselves.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from idem_tasks.call import Call
from idem_tasks.claims import Claim, Finished, Lost, Recorded, Released, State
from idem_tasks.endings import end, give_back, is_fenced, keep_all, lease_lost, never_began
from idem_tasks.errors import ConfigurationError, IdemTasksError, StoreError, StoreUnavailableError
from idem_tasks.runtime import FIRST_PAUSE, LONGEST_PAUSE, deadline_clock, interruption_in, is_interruption
from idem_tasks.session_argument import SessionOfCall
from idem_tasks.steps import Steps
from idem_tasks.stores.base import Transaction, UserTransaction, sql_records, transaction_of

A = TypeVar("A")

RERUNS = 5
"""How often a handler runs again in one call whose transaction a deadlock or a serialization failure undid."""

CONFLICT_NOTE = (
    "other transactions stood in the way each time. A handler that takes longer than a third of its lease needs "
    "READ COMMITTED: above that, the renewal of its own lease is such a transaction"
)


inherited: list[UserTransaction] = []
"""Transactions of the parent's, in a child that its handler forked.

They are kept for as long as the child lives: a pool rolls back what is dropped, on the connection that both have.
"""


async def run_in_session(
    call: Call,
    claim: Claim,
    session: SessionOfCall,
    handler: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Run the handler and record its outcome in one transaction; `claim.ending` says then how that ended.

    A deadlock or a serialization failure undoes all that was written in the session, so the handler runs again.
    """
    runs = 0
    while True:
        runs += 1
        transaction = transaction_for(call, claim, session)
        try:
            return await run_once(call, claim, session, transaction, handler, args, kwargs)
        except Exception as raised:
            if not may_run_again(call, claim, transaction, raised):
                raise
            if runs > RERUNS:
                raised.add_note(CONFLICT_NOTE)
                raise
        claim.drop_outgoing()
        await call.services.runtime.sleep(random.uniform(0, FIRST_PAUSE))  # noqa: S311 - so that two do not meet again
        call.services.heartbeat.hold(claim)  # a commit that failed had let go of it


async def run_once(
    call: Call,
    claim: Claim,
    session: SessionOfCall,
    transaction: Transaction,
    handler: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Begin, run the handler, and commit what it wrote together with its outcome; or leave nothing of either."""
    runtime = call.services.runtime
    try:
        if not await begin(call, claim, transaction):
            return None
        claim.transaction, claim.steps = transaction, Steps(call)
        value = await runtime.invoke(handler, args, session.passed(kwargs, transaction.session))
        if claim.is_here and not await runtime.shield(lambda: commit(call, claim, transaction, value)):
            raise StoreUnavailableError(f"{claim.scope} {claim.key!r} was interrupted before anything was committed")
    except BaseException as raised:
        was_struck, is_cut_off = interruption_in(raised, None) is not None, transaction.is_cut_off
        if claim.is_here and claim.ending is None and runtime.can_wait(after=raised):
            await runtime.shield(lambda: transaction.roll_back(throw_away=was_struck))
        if is_cut_off and not was_struck and not isinstance(raised, IdemTasksError):
            # The records are out of reach with it. Nothing was written, so the message may as well come again (F59).
            raise StoreUnavailableError(
                f"{claim.scope} {claim.key!r} lost its database while its handler ran, so nothing is written"
            ) from raised
        raise
    else:
        return value
    finally:
        ended_by = sys.exception()
        if not claim.is_here:
            inherited.append(transaction)
        elif ended_by is None or runtime.can_wait(after=ended_by):
            await runtime.shield(transaction.close)


def transaction_for(call: Call, claim: Claim, session: SessionOfCall) -> Transaction:
    """Return the transaction in which the handler runs; not begun yet."""
    if is_fenced(call, claim):
        return transaction_of(call.services.store, claim.lease, session.source, session.given)
    return session.source.unfenced(session.given)


async def begin(call: Call, claim: Claim, transaction: Transaction) -> bool:
    """Begin the handler's transaction; False if the claim was lost before.

    Where it cannot be begun the claim is given back, whatever the policy says: nothing has run.
    """
    try:
        answer = await transaction.begin()
    except BaseException as error:
        if call.services.runtime.can_wait(after=error):
            was_struck = interruption_in(error, None) is not None
            await call.services.runtime.shield(lambda: end_before_it_began(call, claim, transaction, was_struck))
        if call.host is not None and is_interruption(error):
            raise never_began(call, error) from error
        raise
    if answer is not None:
        end(call, claim, answer)
    return answer is None


async def end_before_it_began(call: Call, claim: Claim, transaction: Transaction, was_struck: bool) -> None:
    """Give back the claim of a handler whose transaction could not be begun."""
    call.services.heartbeat.let_go(claim.lease.owner)
    await transaction.roll_back(throw_away=was_struck)
    if claim.protected:
        await give_back(call, claim.lease)
        claim.ending = Released(State.RELEASED)


async def commit(call: Call, claim: Claim, transaction: Transaction, value: Any) -> bool:
    """Step 4 in the handler's own transaction: the outcome is its last write, and one commit makes all of it true.

    Begun again after an interruption it commits nothing a second time, but looks what became of the first; it returns
    False if nothing is committed.
    """
    call.services.heartbeat.let_go(claim.lease.owner)
    refused, before = None, sys.exception()
    if not transaction.commit_begun:
        try:
            if await transaction.commit(keep_all(call, claim, value)):
                if is_fenced(call, claim):
                    end(call, claim, Recorded())
                return True
        except Exception as error:
            if not transaction.may_be_committed or interruption_in(error, before) is not None:
                raise
            refused = error
    elif not transaction.may_be_committed:
        return False  # struck before the commit was sent
    await transaction.roll_back(throw_away=transaction.may_be_committed)
    answer = await look(call, claim, transaction.look)
    if answer is None:
        if refused is not None:
            raise refused
        return False
    end(call, claim, answer)
    if refused is not None and not isinstance(refused, StoreError) and isinstance(answer, Recorded):
        raise refused  # not of the database: all is committed, and a listener of the user's raised after it
    return True


async def look(call: Call, claim: Claim, ask_store: Callable[[], Awaitable[A]]) -> A:
    """Tell what became of a commit; while the store is away, try again as long as the lease lives.

    After that nobody knows: nothing is released, and the next delivery finds what there is.
    """
    pause = FIRST_PAUSE
    while True:
        try:
            return await ask_store()
        except StoreError as unreachable:
            if deadline_clock() + pause >= claim.deadline:
                claim.ending = Lost()
                raise StoreUnavailableError(
                    f"it is not known whether {claim.scope} {claim.key!r} was committed while its lease lived "
                    f"({unreachable}); the message must be delivered again"
                ) from unreachable
        await call.services.runtime.sleep(pause)
        pause = min(pause * 2, LONGEST_PAUSE)


def may_run_again(call: Call, claim: Claim, transaction: UserTransaction, raised: Exception) -> bool:
    """Tell whether all that the handler did is undone; under `hold` it may have done something outside."""
    return (
        is_fenced(call, claim)
        and claim.ending is None
        and not call.policy.doubts
        and not claim.lost
        and transaction.is_conflict(raised)
    )


def finish_in(call: Call, claim: Claim, connection: Any, value: Any) -> None:
    """Step 4 in a transaction that the handler commits by itself: the outcome is its last write there."""
    if not is_fenced(call, claim):
        return
    if call.session is not None or claim.ending is not None:
        raise ConfigurationError("finish_in is for a handler without session=, whose claim has no outcome yet")
    if claim.step_running is not None:
        raise ConfigurationError(f"finish_in ends the handler, and step {claim.step_running!r} of it runs still")
    records, outcome = sql_records(call.services.store), keep_all(call, claim, value)
    if not records.finish_in(connection, claim.lease, outcome):
        lost = lease_lost(claim)
        if claim.written is not None:
            lost.add_note(
                "unless finish_in was called in this transaction before: it is called once, as the last thing"
            )
        raise lost
    call.services.heartbeat.let_go(claim.lease.owner)  # the record is locked until the commit
    claim.written = value, outcome


async def commit_of_handler(call: Call, claim: Claim) -> Recorded | Finished | Lost | None:
    """Tell what became of the transaction that `finish_in` wrote in; None: it was rolled back, and the claim stands.

    Waits for a commit that is under way.
    """
    assert claim.written is not None
    _, outcome = claim.written
    records = sql_records(call.services.store)
    answer = await call.services.runtime.shield(lambda: look(call, claim, lambda: records.look(claim.lease, outcome)))
    if answer is not None:
        end(call, claim, answer)
    return answer
