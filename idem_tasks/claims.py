"""What is asked of a store, what it answers, and what a record holds.

A claim is asked for with a `ClaimRequest`. The store answers with one of `Granted`, `Finished`, `InProgress`,
`InDoubt` or `Parked`: an answer is data, never an exception. A granted claim is a `Lease`; whoever holds it
finishes or releases it, and the store says `Recorded`, `Released`, `Finished` (somebody else was first) or `Lost`.
"""

from __future__ import annotations

import os
import socket
from contextvars import ContextVar, Token
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Literal

from idem_tasks.errors import ConfigurationError
from idem_tasks.policy import Policy
from idem_tasks.runtime import deadline_clock


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


@dataclass(frozen=True, slots=True)
class EncodedOutcome:
    """How a handler ended, as a store keeps it: a value in bytes, the reason why not, or a failure."""

    state: Literal[State.COMPLETED, State.FAILED] = State.COMPLETED
    body: bytes | None = None
    codec: str | None = None
    not_kept: NotKept | None = None
    error_type: str | None = None
    error_message: str | None = None

    def __repr__(self) -> str:
        size = "none" if self.body is None else f"{len(self.body)} bytes"
        return f"<EncodedOutcome {self.state.value}, {size}, codec {self.codec}>"


@dataclass(frozen=True, slots=True)
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

    def matches(self, fingerprint: str | None) -> bool:
        """Tell whether the arguments are the same, as far as both sides know them."""
        return self.fingerprint is None or fingerprint is None or self.fingerprint == fingerprint


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class Granted:
    """Run the handler."""

    lease: Lease


@dataclass(frozen=True, slots=True)
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
    """Waits for a person to say whether its effect happened. `new`: this very claim found the dead holder."""

    new: bool = False


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


@dataclass(frozen=True, slots=True)
class Release:
    """How a claim is given up without an outcome.

    `failed` counts a handler's failure, which parks the record once `max_attempts` is reached; a shutdown or
    Celery's own Retry does not count. `in_doubt` leaves it for a person, because its effect may have happened.
    """

    failed: bool = False
    in_doubt: bool = False
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


class Claim:
    """A granted claim as its handler sees it; `current_claim()` returns it."""

    __slots__ = ("_gone", "_pid", "deadline", "held_since", "lease", "renew_at")

    def __init__(self, lease: Lease, *, asked_at: float) -> None:
        """`asked_at` is `deadline_clock()` before the claim was sent: its lease cannot have begun earlier."""
        self.lease = lease
        self.held_since = asked_at
        self._gone = False
        self._pid = os.getpid()
        self.extend(asked_at)

    def extend(self, asked_at: float) -> None:
        """Move the local deadline after a renewal that was sent at `asked_at`."""
        self.deadline = asked_at + self.lease.policy.lease
        self.renew_at = asked_at + self.lease.policy.lease / 3

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
        return self.lease.fencing_token > 0 and self._pid == os.getpid()

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

    def __repr__(self) -> str:
        return f"<Claim {self.scope} {self.key!r} fencing token {self.fencing_token}, attempt {self.attempt}>"


_current: ContextVar[Claim | None] = ContextVar("idem_tasks_current_claim", default=None)


def current_claim() -> Claim:
    """Return the claim of the handler that runs here; raises `ConfigurationError` outside of one."""
    claim = _current.get()
    if claim is None:
        raise ConfigurationError(
            "current_claim() was called outside of an idempotent handler; threads that a handler starts "
            "do not inherit it: pass the claim, or start them with contextvars.copy_context().run"
        )
    return claim


def enter(claim: Claim | None) -> Token[Claim | None]:
    """Make `claim`, or none, the current one; `leave` with the token makes the one before current again."""
    return _current.set(claim)


def leave(token: Token[Claim | None]) -> None:
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
    return f"{_HOST}:{os.getpid()}"


_HOST = socket.gethostname()[:64]
