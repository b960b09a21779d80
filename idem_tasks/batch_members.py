"""The messages of a batch: how far each has come, what the handler returned for it, and what its caller gets."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import Parameter, Signature
from typing import Any

from idem_tasks.call import Call, Services
from idem_tasks.claims import Claim, Finished, InDoubt, InProgress, Parked, State
from idem_tasks.errors import (
    BatchError,
    ConfigurationError,
    DuplicateError,
    FingerprintMismatchError,
    InvalidKeyError,
    comes_again,
)
from idem_tasks.events import EventName
from idem_tasks.hosts import Host
from idem_tasks.keys import KeyPlan, check_key
from idem_tasks.policy import Policy
from idem_tasks.runtime import interruption_in
from idem_tasks.session_argument import SessionOfCall

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
    told: Finished | InProgress | InDoubt | Parked | None = None
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
            again = not member.settled if member.error is None else comes_again(member.error)
            if again and member.call is not None:
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


def claims_of(members: Sequence[Member]) -> tuple[Claim, ...]:
    """Return the claims of these messages, for their handler."""
    return tuple([member.its_claim for member in members])


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
            surplus=batch.surplus,
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
