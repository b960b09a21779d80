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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import Parameter, Signature
from typing import Any

from idem_tasks.call import Call, Services
from idem_tasks.claims import Claim, EncodedOutcome, Finished, Granted, State, enter, leave
from idem_tasks.endings import end, give_back, keep_all, never_began
from idem_tasks.errors import (
    PUT_BACK,
    BatchError,
    ConfigurationError,
    DuplicateError,
    FingerprintMismatchError,
    InvalidKeyError,
    StoreError,
    StoreUnavailableError,
)
from idem_tasks.events import EventName
from idem_tasks.hosts import Host
from idem_tasks.keys import KeyPlan, check_key
from idem_tasks.policy import Policy
from idem_tasks.replay import DOUBTFUL_SIZE, outcome_of_another, replay
from idem_tasks.runtime import (
    FIRST_PAUSE,
    LONGEST_PAUSE,
    HandlerStopIteration,
    deadline_clock,
    interruption_in,
    is_interruption,
)
from idem_tasks.session_argument import SessionOfCall
from idem_tasks.stores.base import batch_store_of
from idem_tasks.task import Answer, give_up, open_claim, record, take_up_in_time, unprotected, withdraw

_AT_LEAST = 2
"""Messages for which a verb of many is asked: one alone has a verb of its own."""

_NAMED = 10
"""Keys that an error names, at most."""

_ONE_MESSAGE = Signature([Parameter("message", Parameter.POSITIONAL_OR_KEYWORD)])


@dataclass(slots=True, eq=False)
class Member:
    """One message of a batch, and how far it has come."""

    message: Any
    call: Call | None = None
    """None: it has no usable key."""
    first: Member | None = None
    """The message before it in this batch that has the same scope and key."""
    asked: bool = False
    """Whether its claim was asked for, and the answer is not known."""
    claim: Claim | None = None
    told: Answer | None = None
    """What the store answered when it was asked for all claims at once, other than to grant it."""
    returned: Any = None
    """What the handler returned for it, or the exception by which it failed."""
    settled: bool = False
    """Whether `value` or `error` says how it ended."""
    value: Any = None
    error: BaseException | None = None

    @property
    def its_call(self) -> Call:
        """Its delivery; only of one with a key."""
        assert self.call is not None
        return self.call

    @property
    def its_claim(self) -> Claim:
        """Its claim; only of one that the handler was given."""
        assert self.claim is not None
        return self.claim

    @property
    def place(self) -> tuple[bytes, bytes]:
        """Where it stands in the order in which all batches lock their records."""
        return self.its_call.request.scope.encode(), self.its_call.request.key.encode()

    def end(self, value: Any) -> None:
        """Say that this is its outcome."""
        self.value, self.settled = value, True

    def fail(self, error: BaseException) -> None:
        """Say that it has none, and why."""
        self.error, self.settled = error, True


@dataclass(slots=True, eq=False)
class Batch:
    """What was delivered together, and the handler of the messages in it that are new."""

    members: list[Member]
    services: Services
    handler: Callable[..., Any]
    leading: tuple[Any, ...] = ()
    """The handler's arguments before its messages: `self`."""
    host: Host | None = None
    session: SessionOfCall | None = None
    surplus: list[str] = field(default_factory=list)
    """The keys for which the handler returned an outcome, though it was given no such message."""

    def announce(self, name: EventName, **details: Any) -> None:
        """Tell the observers what happened to the messages that have to come again."""
        for member in self.members:
            if member.call is not None and isinstance(member.error, PUT_BACK):
                member.call.announce(name, **details)


def message_plan(
    handler: Callable[..., object],
    key: str | Callable[[Any], object],
    scope: str | Callable[[Any], object] | None,
    fingerprint: str | Callable[[Any], object] | None,
) -> KeyPlan:
    """Say which scope, key and fingerprint each message of a batch has; `ConfigurationError` for what cannot work."""
    if isinstance(fingerprint, str):
        if fingerprint != "message":
            raise ConfigurationError(
                f'the fingerprint of a batch is "message", a callable of one message, or None; not {fingerprint!r}'
            )
        fingerprint = "arguments"  # of which a message is the only one
    elif fingerprint is not None and not callable(fingerprint):
        raise ConfigurationError('the fingerprint of a batch is "message", a callable of one message, or None')
    return KeyPlan(handler, key=key, scope=scope, fingerprint=fingerprint, signature=_ONE_MESSAGE)


def refuse_waiting(policy: Policy) -> None:
    """Raise `ConfigurationError` for a policy under which one message in progress would hold up all the others."""
    if policy.on_in_progress == "wait":
        raise ConfigurationError(
            'on_in_progress="wait" is not for a batch: it would hold the leases of all its messages while it waits '
            'for one; take on_in_progress="raise", and put back the messages that BatchError names as in progress'
        )


def members_of(messages: Iterable[Any], call_of: Callable[[Any], Call]) -> list[Member]:
    """Step 0: freeze the key of each message, before the handler can change one; one without a key fails alone."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise ConfigurationError(f"the messages of a batch are a list, not {type(messages).__name__}")
    members: list[Member] = []
    firsts: dict[tuple[str, str], Member] = {}
    for message in messages:
        member, before = Member(message), sys.exception()
        members.append(member)
        try:
            member.call = call = call_of(message)
        except Exception as error:
            if interruption_in(error, before) is not None:
                raise
            member.fail(error)
        else:
            request = call.request
            if request.key and call.policy.active:
                first = firsts.setdefault((request.scope, request.key), member)
                member.first = None if first is member else first
    return members


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
    asked = [member for member in batch.members if member.call is not None and member.first is None]
    asked.sort(key=lambda member: member.place)
    try:
        await claim_together(batch, asked)
        for member in asked:
            await open_one(member)
            if isinstance(member.error, StoreUnavailableError):
                fail_the_rest(asked, member.error)
        for member in batch.members:
            if member.first is not None and member.its_call.policy.shadow:
                member.its_call.announce(EventName.SHADOW_DUPLICATE, found="same_batch")
                member.claim = unprotected(member.its_call)
    except BaseException as struck:
        runtime = batch.services.runtime
        if runtime.can_wait(after=struck):
            await runtime.shield(lambda: give_back_all(asked))
        if batch.host is not None and is_interruption(struck):
            raise never_began(asked[0].its_call, struck) from struck
        raise
    return [member for member in batch.members if member.claim is not None and not member.settled]


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
                member.fail(late)
        else:
            member.told, member.call = answer, replace(call, request=call.request.again())
        member.asked = False


async def open_one(member: Member) -> None:
    """Claim the key of this message, if that is not done yet, or end it by the outcome that there is, or its error."""
    if member.claim is not None or member.settled:
        return
    before = sys.exception()
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


def fail_the_rest(members: Sequence[Member], error: StoreUnavailableError) -> None:
    """Ask for no more claims: each would wait for a store that is away, while those that were granted grow old."""
    for member in members:
        if member.claim is None and member.told is None and not member.settled:
            request = member.its_call.request
            member.fail(StoreUnavailableError(f"{request.scope} {request.key!r} was not claimed: {error}"))


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
    enter(claims_of(new))
    try:
        returned = await runtime.invoke(batch.handler, (*batch.leading, [member.message for member in new]), {})
    except BaseException as raised:
        error = raised.error if isinstance(raised, HandlerStopIteration) else raised
        if runtime.can_wait(after=raised):
            await runtime.shield(lambda: fail_all(new, error))
        if not is_of_the_messages(batch, error):
            raise
        if any(member.error is error for member in new):
            raise BatchError(results=results_of(batch), errors=errors_of(batch)) from error
    else:
        await runtime.shield(lambda: end_all(batch, new, returned))


def claims_of(members: Sequence[Member]) -> tuple[Claim, ...]:
    """Return the claims of these messages, for their handler."""
    return tuple(member.its_claim for member in members)


def is_of_the_messages(batch: Batch, error: BaseException) -> bool:
    """Tell a handler's failure from what struck it, and from its framework's control flow: those go on unchanged."""
    if not isinstance(error, Exception) or is_interruption(error):
        return False
    return batch.host is None or isinstance(error, PUT_BACK) or batch.host.is_failure(error)


async def fail_all(members: Sequence[Member], error: BaseException) -> None:
    """The handler raised: that is the failure of each message."""
    for member in members:
        member.returned = error
        await settle(member)


# Step 4


async def end_all(batch: Batch, members: Sequence[Member], returned: Any) -> None:
    """End each message by its own outcome, or its own failure; may be begun again.

    From here on nothing releases a claim any more but the failure of its own message.
    """
    outcomes, batch.surplus = outcomes_in(members, returned)
    for member, outcome in zip(members, outcomes, strict=True):
        member.returned = outcome
    await finish_together(batch, members)
    for member in members:
        await settle(member)


async def finish_together(batch: Batch, members: Sequence[Member]) -> None:
    """Bring the outcomes to their records in one step; while the store is away, try again as long as the leases live.

    What is not recorded then is finished by itself: that tells why, and keeps what has to be kept.
    """
    store = batch_store_of(batch.services.store)
    plain = [member for member in members if is_plain(member)]
    if store is None or len(plain) < _AT_LEAST:
        return
    for member in plain:
        batch.services.heartbeat.let_go(member.its_claim.lease.owner)
    kept = [(member, keep_all(member.its_call, member.its_claim, member.returned)) for member in plain]
    kept.sort(key=lambda pair: pair[0].place)
    until, pause = min(member.its_claim.deadline for member in plain), FIRST_PAUSE
    for group in groups_of(kept):
        answers = None
        while answers is None:
            try:
                answers = await store.finish_batch([(member.its_claim.lease, outcome) for member, outcome in group])
            except StoreError:
                if plain[0].its_call.policy.shadow or deadline_clock() + pause >= until:
                    return
                await batch.services.runtime.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE)
        for (member, _), answer in zip(group, answers, strict=True):
            if answer is not None:
                end(member.its_call, member.its_claim, answer)


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


async def settle(member: Member) -> None:
    """End this message as a handler of it alone would have ended: by its outcome, or by its exception."""
    if member.settled:
        return
    call, claim, returned = member.its_call, member.its_claim, member.returned
    before = returned if isinstance(returned, BaseException) else sys.exception()
    try:
        if not isinstance(returned, BaseException):
            member.end(await record(call, claim, returned))
            return
        recorded = await give_up(call, claim, returned)
        if recorded is None:
            member.fail(returned)
        else:
            member.end(outcome_of_another(call, recorded))
    except Exception as error:
        if interruption_in(error, before) is not None:
            raise
        member.fail(error)


# What the handler returned


def outcomes_in(members: Sequence[Member], returned: Any) -> tuple[list[Any], list[str]]:
    """Say which outcome each message has, and for which keys there is one too many.

    What says nothing of a message is that message's failure.
    """
    before = sys.exception()
    try:
        if isinstance(returned, Mapping):
            return _by_key(members, returned)
        if isinstance(returned, Sequence) and not isinstance(returned, str | bytes) and len(returned) == len(members):
            return list(returned), []
    except Exception as error:  # a mapping or sequence of the user's own may raise anything
        if interruption_in(error, before) is not None:
            raise
        return [error] * len(members), []
    kind = "None" if returned is None else type(returned).__name__
    if isinstance(returned, Sequence) and not isinstance(returned, str | bytes):
        kind = f"{kind} of {len(returned)}"
    wrong = ConfigurationError(
        f"the handler of {len(members)} messages returned {kind}; it returns a list with one outcome for each message, "
        "in their order, or a dict from key to outcome, with an exception in the place of an outcome for what failed"
    )
    return [wrong] * len(members), []


def _by_key(members: Sequence[Member], returned: Mapping[Any, Any]) -> tuple[list[Any], list[str]]:
    """Match outcomes by the key that a record has: 12 and "12" are one."""
    found: dict[str, Any] = {}
    surplus: list[str] = []
    scopes: dict[str, set[str]] = {}
    for member in members:
        scopes.setdefault(member.its_claim.key, set()).add(member.its_claim.scope)
    for written, outcome in returned.items():
        try:
            key = check_key(written)
        except InvalidKeyError:
            surplus.append(f"<{type(written).__name__}>")
            continue
        if key in found or key not in scopes:
            surplus.append(key)
        else:
            found[key] = outcome
    return [_outcome_for(member.its_claim, found, scopes) for member in members], surplus


def _outcome_for(claim: Claim, found: Mapping[str, Any], scopes: Mapping[str, set[str]]) -> Any:
    name = f"{claim.scope} {claim.key!r}"
    if len(scopes[claim.key]) > 1:
        return ConfigurationError(f"a dict cannot tell {name} from the same key in another scope; return a list")
    if claim.key not in found:
        return ConfigurationError(f"the handler's dict has no outcome for {name}")
    return found[claim.key]


# What is returned


def outcomes_of(batch: Batch) -> list[Any]:
    """Return the outcome of each message; raises `BatchError` if one has none."""
    results, errors = results_of(batch), errors_of(batch)
    if batch.surplus:
        keys = ", ".join(map(repr, batch.surplus[:_NAMED]))
        raise BatchError(
            f"the handler returned outcomes for keys that none of its messages has, or has twice: {keys}; "
            f"{len(errors)} of {len(results)} messages have no outcome",
            results=results,
            errors=errors,
        )
    if errors:
        raise BatchError(results=results, errors=errors)
    return results


def results_of(batch: Batch) -> list[Any]:
    """Return the outcomes, with its own error in the place of each message that has none."""
    for member in batch.members:
        if member.first is not None and not member.settled:
            follow(member, member.first)
    return [member.value if member.error is None else member.error for member in batch.members]


def errors_of(batch: Batch) -> list[int]:
    """Return the places of the messages that have no outcome."""
    return [place for place, member in enumerate(batch.members) if member.error is not None]


def follow(member: Member, first: Member) -> None:
    """End a message as the one before it of the same key ended: it is a duplicate of that."""
    call, before = member.its_call, first.its_call.request
    if not call.request.matches(before.fingerprint):
        call.announce(EventName.MISMATCHED)
        member.fail(FingerprintMismatchError(scope=before.scope, key=before.key))
    elif first.error is not None:
        member.fail(first.error)
    else:
        call.announce(EventName.REPLAYED, state=State.COMPLETED.value)
        match call.policy.on_duplicate:
            case "skip":
                member.end(None)
            case "raise":
                member.fail(DuplicateError(scope=before.scope, key=before.key, outcome=first.value))
            case _:
                member.end(first.value)
