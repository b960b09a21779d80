"""What is asked of a store, what it answers, and what a record holds.

A claim is asked for with a `ClaimRequest`. The store answers with one of `Granted`, `Finished`, `InProgress`,
`InDoubt` or `Parked`: an answer is data, never an exception. A granted claim is a `Lease`; whoever holds it
finishes or releases it, and the store says `Recorded`, `Released`, `Finished` (somebody else was first) or `Lost`.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import socket
from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from hashlib import sha256
from typing import Any, Literal, ParamSpec, Protocol, TypeVar

import msgspec

from idem_tasks.errors import ConfigurationError, StepsChangedError, StoreError
from idem_tasks.policy import Policy
from idem_tasks.runtime import deadline_clock
from idem_tasks.values import value

P = ParamSpec("P")
T = TypeVar("T")

HANDLER_HAS_ENDED = "the handler has ended: what it publishes now would never be sent"

STEP_NAME_BYTES = 255
"""Longest name of a step in UTF-8."""


class State(StrEnum):
    """The states of a record."""

    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    RELEASED = "released"
    IN_DOUBT = "in_doubt"
    PARKED = "parked"


NotKept = Literal["too_large", "skipped", "not_encodable"]
"""Why a completed record has no outcome."""


class _Content(msgspec.Struct, frozen=True):
    """A message as it is kept: JSON whose parts are read when they are asked for."""

    body: msgspec.Raw
    headers: dict[str, Any] = {}
    options: dict[str, Any] = {}


_read_content = msgspec.json.Decoder(_Content).decode


@dataclass(frozen=True, slots=True)
class OutboxMessage:
    """A message that a handler published, as it is kept until it is sent, and as its sender gets it.

    `id` is the same however often it is sent: the receiver knows it by that again. `number` counts the messages of
    one run of a handler from 0; `attempts` counts the sends that failed.
    """

    id: str
    scope: str
    key: str
    fencing_token: int
    number: int
    to: str
    content: bytes = field(repr=False)
    attempts: int = 0

    @property
    def json(self) -> bytes:
        """The body as JSON, as it is to be sent."""
        return bytes(_read_content(self.content).body)

    @property
    def body(self) -> Any:
        """The body as dicts, lists, texts and numbers."""
        return msgspec.json.decode(self.json)

    @property
    def headers(self) -> dict[str, Any]:
        """The headers that `publish_message` was given."""
        return _read_content(self.content).headers

    @property
    def options(self) -> dict[str, Any]:
        """The options of the sender, such as a routing key, that `publish_message` was given."""
        return _read_content(self.content).options


@value(frozen=True, slots=True)
class EncodedOutcome:
    """How a handler ended, as a store keeps it: a value in bytes, the reason why not, or a failure.

    `messages` are written with it, in one transaction, and sent once it is recorded.
    """

    state: Literal[State.COMPLETED, State.FAILED] = State.COMPLETED
    body: bytes | None = None
    codec: str | None = None
    not_kept: NotKept | None = None
    error_type: str | None = None
    error_message: str | None = None
    messages: tuple[OutboxMessage, ...] = ()

    def __repr__(self) -> str:
        size = "none" if self.body is None else f"{len(self.body)} bytes"
        return f"<EncodedOutcome {self.state.value}, {size}, codec {self.codec}>"


@value(frozen=True, slots=True)
class ClaimRequest:
    """One delivery's wish to run a handler; frozen before the handler can change its arguments.

    `owner` is random and new for every delivery, also of the same message to the same worker: two live copies
    of one message must not pass each other's fence.
    """

    scope: str
    key: str
    fingerprint: str | None
    owner: str
    policy: Policy
    holder: str = ""
    traceparent: str | None = None
    take: int | None = 1
    """Which of this owner's takes of the marker this is; None: nobody heard that the marker was taken."""
    marked: bool = field(default=False, compare=False)
    """Whether a marker is held for it, which keeps others off also while its record could be lost."""

    def again(self) -> ClaimRequest:
        """Return the same request for another try."""
        return replace(self, take=None if self.take is None else self.take + 1)

    def matches(self, fingerprint: str | None) -> bool:
        """Tell whether the arguments are the same, as far as both sides know them."""
        return self.fingerprint is None or fingerprint is None or self.fingerprint == fingerprint


@value(frozen=True, slots=True)
class Lease:
    """A granted claim: the right to run the handler and to record its outcome, until it expires."""

    request: ClaimRequest
    fencing_token: int
    attempts: int = 1
    failures: int = 0
    crashes: int = 0
    generation: int = 1
    taken_over: bool = False

    @property
    def scope(self) -> str:
        """The scope of the record."""
        return self.request.scope

    @property
    def key(self) -> str:
        """The idempotency key of the record."""
        return self.request.key

    @property
    def owner(self) -> str:
        """The random id of this claim."""
        return self.request.owner

    @property
    def policy(self) -> Policy:
        """The policy it was asked for with."""
        return self.request.policy


# What a claim is answered with.


@value(frozen=True, slots=True)
class Granted:
    """Run the handler."""

    lease: Lease


@value(frozen=True, slots=True)
class Finished:
    """Completed or failed before; `expires_in` is what is left of its retention in seconds."""

    outcome: EncodedOutcome
    fingerprint: str | None
    expires_in: float
    fencing_token: int | None = None
    traceparent: str | None = None


@dataclass(frozen=True, slots=True)
class InProgress:
    """Runs elsewhere; its lease ends in `retry_after` seconds unless it is renewed."""

    retry_after: float


@dataclass(frozen=True, slots=True)
class InDoubt:
    """Waits for a person to say whether its effect happened. `new`: this very claim found the dead holder.

    `dead` is that holder's claim, by which `Store.decide` knows the record again; only with `new`, and None where a
    store cannot decide: then no function is asked. Its request is the asker's, but for the owner.
    """

    new: bool = False
    dead: Lease | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Parked:
    """Waits for a person after too many crashes or failures. `new`: this very claim parked it."""

    crashes: int
    failures: int
    new: bool = False


ClaimAnswer = Granted | Finished | InProgress | InDoubt | Parked


# What a finish or a release is answered with; both may also answer `Finished`.


@dataclass(frozen=True, slots=True)
class Recorded:
    """The outcome is recorded."""


@dataclass(frozen=True, slots=True)
class Released:
    """The record was left in `state`: released, in doubt or parked."""

    state: State


@dataclass(frozen=True, slots=True)
class Lost:
    """The claim is somebody else's now, and no outcome is recorded yet."""


# What beginning a step is answered with; both beginning and finishing one may also be answered `Lost`.


@dataclass(frozen=True, slots=True)
class StepBegun:
    """Run it: no outcome of it is recorded yet."""


@dataclass(frozen=True, slots=True)
class StepFinished:
    """This outcome of it is recorded, by an earlier attempt or by an earlier try of the same write."""

    outcome: EncodedOutcome


@dataclass(frozen=True, slots=True)
class StepsDiffer:
    """Another step was begun at this position by an earlier attempt; `names` are those of all its steps."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Release:
    """How a claim is given up without an outcome.

    `failed` counts a handler's failure, which parks the record once `max_attempts` is reached; a shutdown or
    Celery's own Retry does not count. `in_doubt` leaves it for a person, because its effect may have happened.
    `parked`: its steps are others than at an earlier attempt; asked only of a store that keeps a journal of them.
    """

    failed: bool = False
    in_doubt: bool = False
    parked: bool = False
    error_type: str | None = None
    error_message: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One row as people see it; datetimes are aware, in UTC, by the store's clock."""

    scope: str
    key: str
    state: State
    fencing_token: int
    owner: str
    fingerprint: str | None
    attempts: int
    failures: int
    crashes: int
    generation: int
    lease_expires_at: datetime
    outcome: bytes | None
    codec: str | None
    not_kept: str | None
    error_type: str | None
    error_message: str | None
    holder: str
    created_at: datetime
    updated_at: datetime
    completed_at: datetime | None
    expires_at: datetime
    attention: str | None
    traceparent: str | None

    def __repr__(self) -> str:
        size = "none" if self.outcome is None else f"{len(self.outcome)} bytes"
        return (
            f"<Record {self.scope} {self.key!r} {self.state.value}, fencing token {self.fencing_token}, outcome {size}>"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One step of a record as people see it; of its outcome only the size and the codec.

    `finished_at` is None for a step that was begun, and of which nobody knows what came. `outcome_bytes` is None where
    no outcome is kept; `not_kept` then says why, if it is finished. Datetimes are aware, in UTC, by the store's clock.
    """

    position: int
    name: str
    started_at: datetime
    finished_at: datetime | None
    outcome_bytes: int | None
    codec: str | None
    not_kept: NotKept | None


Action = Literal["resolve", "fail", "rerun", "forget", "answer"]
"""What a person does with a record; `answer` is what a function given as `on_crash` does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """What a person, or a function given as `on_crash`, did to a record; `at` is by the store's clock.

    None as `state_after` and `token_after`: the record is gone. None as `state_before` and `token_before`: it was done
    by an earlier try, whose reply was lost.
    """

    at: datetime
    actor: str
    action: Action
    scope: str
    key: str
    state_before: State | None
    state_after: State | None
    token_before: int | None
    token_after: int | None
    reason: str | None

    def details(self) -> dict[str, object]:
        """Return all but where and when, as the details of an event."""
        return {
            "action": self.action,
            "actor": self.actor,
            "reason": self.reason,
            "state_before": None if self.state_before is None else self.state_before.value,
            "state_after": None if self.state_after is None else self.state_after.value,
            "token_before": self.token_before,
            "token_after": self.token_after,
        }


def action_of(outcome: EncodedOutcome | None) -> Action:
    """Name what `Store.resolve` does with this."""
    if outcome is None:
        return "rerun"
    return "fail" if outcome.state is State.FAILED else "resolve"


class StepTaker(Protocol):
    """What runs a handler's steps; see `idem_tasks.steps`."""

    @property
    def running(self) -> str | None:
        """The name of the step that runs now."""

    def take(
        self, claim: Claim, name: str, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Return the step's value, or what an asyncio handler awaits for it."""


class Outgoing(Protocol):
    """Where the messages of one claim wait for its outcome, in the order in which they were published."""

    def add_task(self, task: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """Keep a framework's task or signature; returns its message's id."""
        ...

    def add_message(self, body: Any, to: str, headers: Mapping[str, Any], options: Mapping[str, Any]) -> str:
        """Keep a message for a sender; returns its id."""
        ...

    def close(self) -> tuple[OutboxMessage, ...]:
        """Refuse every further message, and return those there are."""
        ...

    def drop(self) -> None:
        """Forget all messages, and take others again."""
        ...


class Claim:
    """A granted claim as its handler sees it; `current_claim()` returns it."""

    __slots__ = (
        "_finish_in",
        "_gone",
        "_make_outgoing",
        "_outgoing",
        "_process",
        "deadline",
        "ending",
        "held_since",
        "lease",
        "parked_by",
        "refused",
        "renew_at",
        "steps",
        "transaction",
        "written",
    )

    def __init__(
        self,
        lease: Lease,
        steps: StepTaker,
        *,
        asked_at: float,
        outgoing: Callable[[Lease], Outgoing] | None = None,
        finish_in: Callable[[Claim, Any, Any], None] = lambda *_: None,
    ) -> None:
        """`asked_at` is `deadline_clock()` before the claim was sent: its lease cannot have begun earlier.

        `outgoing` makes what keeps its messages, once there is one. `finish_in` does what the method of that name is
        for, given the claim too.
        """
        self.lease = lease
        self._make_outgoing = outgoing
        self._outgoing: dict[Literal["made"], Outgoing | None] = {}
        """What keeps its messages, once there is one; None if it is closed before that. A dict sets it in one step."""
        self.held_since = asked_at
        self.ending: Recorded | Released | Finished | Lost | None = None
        """How the record was left, once that is known; from then on nothing is recorded or released any more."""
        self.written: tuple[Any, EncodedOutcome] | None = None
        """What `finish_in` wrote last in a transaction of the user's: the value, and how it was encoded."""
        self._finish_in = finish_in
        self.refused: StoreError | None = None
        """Why the store did not grant it, or does not know how its handler ended."""
        self.parked_by: StepsChangedError | None = None
        """Why a step of it parked the record."""
        self.steps = steps
        self._gone = False
        self.transaction: Any = None
        """That of `session=`, while the handler runs in it."""
        self._process = _process_name
        self.extend(asked_at)

    def extend(self, asked_at: float) -> None:
        """Move the local deadline after a renewal that was sent at `asked_at`."""
        lease = self.lease.request.policy.lease
        self.deadline = asked_at + lease
        self.renew_at = asked_at + lease / 3

    def mark_lost(self) -> None:
        """Say `lost` from now on."""
        self._gone = True

    @property
    def scope(self) -> str:
        """The scope of the record."""
        return self.lease.scope

    @property
    def key(self) -> str:
        """The idempotency key of the record."""
        return self.lease.key

    @property
    def protected(self) -> bool:
        """Whether a store granted it to this process.

        Not so while the library is disabled, in shadow, or runs without its store; nor in a child that was forked
        within the handler, where the claim is still the parent's.
        """
        return self.lease.fencing_token > 0 and self._process is _process_name

    @property
    def is_here(self) -> bool:
        """Whether this is the process in which the handler was called, and no child that it forked."""
        return self._process is _process_name

    @property
    def session(self) -> Any:
        """The session whose commit records the outcome; `ConfigurationError` without `session=`, and in a step."""
        if self.transaction is None:
            raise ConfigurationError(
                f"{self.scope} has no session: give one to its decorator, idempotent_task(..., session=sessionmaker)"
            )
        if self.step_running is not None:
            raise ConfigurationError(
                f"step {self.step_running!r} must not use the session: what it writes would be missing where the step "
                "is replayed, because its outcome is committed apart from the session; write it outside of the step"
            )
        return self.transaction.session

    def finish_in(self, connection: Any, value: Any = None) -> None:
        """Write the outcome through a database connection of yours, within your own transaction, which you commit.

        For those without SQLAlchemy: a connection of psycopg, sqlite3, PyMySQL or mysqlclient, or Django's
        `django.db.connection`, to the database of the records. Call it last in the transaction; `value` is then the
        outcome, whatever the handler returns. Blocking only: there is no form of it that is awaited.

        Raises `LeaseLostError` if the claim was taken over, so that the transaction is rolled back;
        `ConfigurationError` for a connection in autocommit or of another kind. A handler that ends without a commit
        of what was written here fails with `ConfigurationError`. Where nothing is recorded (disabled, in shadow) it
        does nothing.
        """
        self._finish_in(self, connection, value)

    @property
    def fencing_token(self) -> int:
        """Rises with every claim granted for this key; hand it to systems that can refuse an older one."""
        return self.lease.fencing_token

    @property
    def attempt(self) -> int:
        """How many claims were granted for this key, this one included."""
        return self.lease.attempts

    @property
    def crashes(self) -> int:
        """How often a holder of this key died or was paused past its lease."""
        return self.lease.crashes

    @property
    def taken_over(self) -> bool:
        """Whether this claim took over from such a holder, whose effects may have happened."""
        return self.lease.taken_over

    @property
    def lost(self) -> bool:
        """Whether the lease could not be renewed in time.

        A hint for long handlers to stop early. It decides nothing: the fence at the finish does.
        """
        return self._gone or deadline_clock() > self.deadline

    def provider_key(self, step: str) -> str:
        """Return an idempotency key for a provider, to send with this step's request: `idem-` and 32 hex digits.

        The same at every attempt of this key, and another one for every other step, key and scope, and once the
        record's retention is over. So the provider does the same request once, for as long as it remembers the key
        (Stripe: 24 hours or more) and the body is identical. An empty step is a `ConfigurationError`.
        """
        return _provider_key(self.lease, step)

    def step(self, name: str, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `fn(*args, **kwargs)` as a step of the handler, and return its value; a later attempt gets that again.

        In an `async def` handler await it; `fn` may be a coroutine function or a plain one. The outcome is recorded
        once, `fn` itself runs at least once: a crash between its effect and its record runs it again, unless
        `on_crash` forbids that. Give a provider `provider_key(name)`.

        A handler begins the same steps in the same order each time, one after another. Raises what `fn` raises, and
        nothing of that is recorded; `StepsChangedError` where an earlier attempt did another step here;
        `LeaseLostError` and `StoreUnavailableError`, to let through, so that the message comes again; `OutcomeError`
        where the outcome of an earlier attempt was not kept; `ConfigurationError` before anything ran.
        """
        value: T = self.steps.take(self, name, fn, args, kwargs)
        return value

    @property
    def step_running(self) -> str | None:
        """The name of the step that runs now."""
        return self.steps.running

    def publish(self, task: Any, /, *args: Any, **kwargs: Any) -> str:
        """Send this Celery task once the outcome is recorded, and never if it is not; returns the id of the task.

        A task is called with `args` and `kwargs`; a signature, chain, group or chord is taken as it is. It is kept
        with the outcome, in one transaction, and sent at least once, always with the same id; in the order of all
        messages of this key. Raises `ConfigurationError` where there is no outbox (records in Redis), after the
        handler's end, and for what is no task; `MessageError` for arguments that cannot be kept as JSON, or not in
        1 MiB; `TypeError` for arguments that the task does not take, as `delay` does.
        """
        return self._open_outgoing().add_task(task, args, kwargs)

    def publish_message(self, body: Any, *, to: str, headers: Mapping[str, Any] | None = None, **options: Any) -> str:
        """Send this message once the outcome is recorded, and never if it is not; returns its id.

        `to` names one of the `senders` of the `Idempotency`; `options` are what that one understands, such as
        `routing_key`. `body` is anything that msgspec writes as JSON. The same is promised and raised as by `publish`.
        """
        return self._open_outgoing().add_message(body, to, headers or {}, options)

    def _open_outgoing(self) -> Outgoing:
        if self._make_outgoing is None or not self.is_here:
            raise ConfigurationError("a process that was forked within a handler publishes nothing under its claim")
        if self.step_running is not None:
            raise ConfigurationError(
                f"step {self.step_running!r} must not publish: the message would be missing where it is replayed; "
                "publish it outside of the step"
            )
        outgoing = self._outgoing.setdefault("made", self._make_outgoing(self.lease))
        if outgoing is None:
            raise ConfigurationError(HANDLER_HAS_ENDED)
        return outgoing

    def drop_outgoing(self) -> None:
        """Forget what was published: all that the handler did is undone, and it runs again."""
        outgoing = self._outgoing.get("made")
        if outgoing is None:
            self._outgoing.clear()
        else:
            outgoing.drop()

    def close_outgoing(self) -> tuple[OutboxMessage, ...]:
        """Return what was published, to be kept with the outcome; from now on nothing is any more."""
        if self._process is not _process_name:
            return ()  # in a child that was forked within the handler the messages are the parent's
        outgoing = self._outgoing.setdefault("made", None)
        return () if outgoing is None else outgoing.close()

    def __repr__(self) -> str:
        return f"<Claim {self.scope} {self.key!r} fencing token {self.fencing_token}, attempt {self.attempt}>"


def _provider_key(lease: Lease, step: str) -> str:
    # Without a usable key (in shadow, say) nothing is known to be the same: then it is new for every delivery.
    parts = (lease.scope, lease.key or lease.owner, str(lease.generation), step_name(step))
    digest = sha256()
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(4) + encoded)  # with its length, so that "a", "bc" is not "ab", "c"
    return f"idem-{digest.hexdigest()[:32]}"


def step_name(name: object) -> str:
    """Return the name of a step; raises `ConfigurationError` for one that a database cannot keep as it is."""
    if isinstance(name, str) and "\0" not in name:
        with contextlib.suppress(UnicodeEncodeError):
            if 0 < len(name.encode()) <= STEP_NAME_BYTES:
                return name
    raise ConfigurationError(
        f"a step is named by a text of 1 to {STEP_NAME_BYTES} bytes without NUL, such as 'charge', not {name!r:.99}"
    )


class DeadClaim:
    """The claim of a holder that died or was paused past its lease, as a function given as `on_crash` sees it.

    The function only looks: it renews, records and releases nothing. Whether the holder is dead nobody can know.
    """

    __slots__ = ("_lease",)

    def __init__(self, lease: Lease) -> None:
        self._lease = lease

    @property
    def scope(self) -> str:
        """The scope of the record."""
        return self._lease.scope

    @property
    def key(self) -> str:
        """The idempotency key of the record."""
        return self._lease.key

    @property
    def fencing_token(self) -> int:
        """That of the dead claim."""
        return self._lease.fencing_token

    @property
    def attempt(self) -> int:
        """How many claims were granted for this key, the dead one included."""
        return self._lease.attempts

    @property
    def crashes(self) -> int:
        """How often a holder of this key died or was paused past its lease, this time included."""
        return self._lease.crashes

    @property
    def taken_over(self) -> bool:
        """True: its holder did not end it."""
        return True

    def provider_key(self, step: str) -> str:
        """Return the idempotency key that the dead claim gave its provider for this step, to look it up there."""
        return _provider_key(self._lease, step)

    def __repr__(self) -> str:
        return f"<DeadClaim {self.scope} {self.key!r} fencing token {self.fencing_token}, attempt {self.attempt}>"


_Current = Claim | tuple[Claim, ...] | None
_current: ContextVar[_Current] = ContextVar("idem_tasks_current_claim", default=None)


def current_claim() -> Claim:
    """Return the claim of the handler that runs here; raises `ConfigurationError` outside of one, and in a batch."""
    claim = _current.get()
    if isinstance(claim, tuple):
        raise ConfigurationError(
            f"current_claim() was called in the handler of a batch, which has {len(claim)} claims: "
            "current_claims() returns them, in the order of the messages that the handler was given"
        )
    if claim is None:
        raise ConfigurationError(
            "current_claim() was called outside of an idempotent handler; threads that a handler starts "
            "do not inherit it: pass the claim, or start them with contextvars.copy_context().run"
        )
    return claim


def current_claims() -> list[Claim]:
    """Return the claims of the messages that the handler of this batch was given, one for each, in their order.

    Raises `ConfigurationError` outside of the handler of a batch.
    """
    claims = _current.get()
    if isinstance(claims, tuple):
        return list(claims)
    raise ConfigurationError(
        "current_claims() was called outside of the handler of a batch (idempotent_batch, run_batch); "
        "a handler of one message has current_claim()"
    )


enter: Callable[[_Current], Token[_Current]] = _current.set
"""Makes a claim, those of a batch, or none, current; `leave` with the token makes the one before current again."""


def leave(token: Token[_Current]) -> None:
    """End what `enter` began."""
    try:  # noqa: SIM105 - suppress() takes longer than all the rest
        _current.reset(token)
    except ValueError:
        pass  # in another context than it began in, as a FastAPI dependency ends; that one never had the claim


def new_owner() -> str:
    """Return 32 random hex digits: 16 bytes from the system, so that no two claims ever meet."""
    return os.urandom(16).hex()


def process_name() -> str:
    """Return `host:pid`, for people who look for the process that holds a claim."""
    return _process_name


def person_name() -> str:
    """Return `user@host`, for who did something on this machine without saying who it was."""
    try:
        user = getpass.getuser()
    except (ImportError, KeyError, OSError):
        user = str(os.getuid())  # of a container, say, whose user has no name
    return f"{user}@{_HOST}"


_HOST = socket.gethostname()[:64]
_process_name = f"{_HOST}:{os.getpid()}"
"""Another text in each process: by this very object a claim knows that it is in a child which its handler forked."""


def _name_child() -> None:
    global _process_name  # noqa: PLW0603 - one name a process
    _process_name = f"{_HOST}:{os.getpid()}"


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_name_child)
