"""The contract of a store, in words; `idem_tasks.testing` turns it into tests.

A store keeps one record per `(scope, key)` and arbitrates claims on it. Every verb is one atomic step: of any
number of simultaneous claims one is granted. Answers are data (`idem_tasks.claims`); a verb raises only
`StoreUnavailableError` (cannot be reached), `StoreConfigurationError` (is not set up for us: says how to mend it)
or another `StoreError` (answered with an error).

All verbs are written as coroutines and serve both runtimes. A blocking store awaits nothing that waits, so that
`runtime.run_sync` can drive it on its caller's thread; an asyncio store belongs to the running event loop.
`on(runtime)` gives the store as that runtime uses it.

A store holds no state of a call (F26). Its clock decides about leases and retention, never a worker's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from idem_tasks.claims import (
    ClaimAnswer,
    ClaimRequest,
    EncodedOutcome,
    Finished,
    Lease,
    Lost,
    Record,
    Recorded,
    Release,
    Released,
    State,
)
from idem_tasks.events import Announcer

RuntimeName = Literal["blocking", "asyncio"]


class Store(Protocol):
    """Keeps records and arbitrates claims."""

    @property
    def runtimes(self) -> frozenset[RuntimeName]:
        """The runtimes it can serve."""
        ...

    def on(self, runtime: RuntimeName, announce: Announcer) -> Store:
        """Return this store as `runtime` uses it; raises `ConfigurationError` if it cannot serve it.

        The same store is returned for the same runtime, so that connections are shared. `announce` hears what
        the store meets on its way and survives, such as a marker that cannot be reached.
        """
        ...

    async def claim(self, request: ClaimRequest) -> ClaimAnswer:
        """Claim the record, or tell why not, in one atomic step.

        Granted when there is no record, it was released, its retention is over, or its holder's lease ran out
        and the policy says rerun. A request whose own earlier attempt took effect, though the reply was lost, is
        granted again with the same fencing token (F21, F22). The fencing token rises with every other grant.
        """
        ...

    async def renew(self, leases: Sequence[Lease], still_held: Callable[[str], bool]) -> frozenset[str]:
        """Extend these leases by their policy's `lease` from now; return the owners of those extended.

        One that is missing was not extended now: it may be lost, or only locked for the moment. One round trip
        per tier for all of them. `still_held(owner)` turns false when that claim's finish begins.
        """
        ...

    async def finish(
        self, lease: Lease, outcome: EncodedOutcome, *, may_insert: bool = False
    ) -> Recorded | Finished | Lost:
        """Record the outcome, if the record is still under this lease's fencing token and owner.

        Also from `in_doubt`, when it was this very claim that was put in doubt. `Recorded` too when an earlier
        attempt took effect. `Finished`: somebody else's outcome stands. `Lost`: neither.

        `may_insert`: the lease is not over by the caller's own clock, so a record that is gone was lost with the
        database's last moments, and is written again. Never over a record that is there.
        """
        ...

    async def keep_pending(self, lease: Lease, outcome: EncodedOutcome) -> bool:
        """Keep an outcome that `finish` could not bring to the record for the next delivery to write through.

        Returns False where there is no place for it.
        """
        ...

    async def release(self, lease: Lease, release: Release) -> Released | Finished | Lost:
        """Give the claim up without an outcome, under the same fence as `finish`."""
        ...

    async def get(self, scope: str, key: str) -> Record | None:
        """Return the record, or None."""
        ...

    async def forget(self, scope: str, key: str) -> bool:
        """Delete the record and its marker; returns whether there was a record.

        Raises `InProgressError` while a holder's lease lives: its finish would bring the record back.
        """
        ...

    async def resolve(self, scope: str, key: str, outcome: EncodedOutcome | None) -> Record | None:
        """End `in_doubt`, `parked` or an overdue `running`: by this outcome, or (None) by releasing it.

        Sets a new fencing token in the same step, so that a late holder's finish misses. A release starts its
        failures and crashes again. Returns the record as it is now, or None if there is none. Raises
        `InProgressError` while a holder's lease lives, and `ConflictError` if the record has ended already.
        """
        ...

    async def records(
        self, *, state: State | None, scope: str | None, after: tuple[str, str] | None, limit: int
    ) -> list[Record]:
        """Return up to `limit` records in the order of scope and key, beginning after the given one."""
        ...

    async def stats(self) -> dict[State, int]:
        """Return how many records there are in each state."""
        ...

    async def purge(self, *, limit: int, grace: float) -> list[tuple[str, str]]:
        """Delete up to `limit` completed, failed or released records whose retention ended over `grace` seconds ago.

        Never touches running, in-doubt or parked ones. Returns the scope and key of each deleted record.
        """
        ...

    async def prepare(self) -> None:
        """Make what the store needs (tables); does nothing if it is there."""
        ...

    async def close(self) -> None:
        """Close this runtime's connections; the store opens new ones if it is used again."""
        ...


# The marker tier. A marker is a shield, never the truth: it may vanish at any moment.


@dataclass(frozen=True, slots=True)
class MarkerTaken:
    """Nobody had a marker; ours stands now (or it was ours already: the reply to our first try was lost)."""


@dataclass(frozen=True, slots=True)
class MarkerRunning:
    """Somebody else's marker stands; it expires in `retry_after` seconds unless it is renewed."""

    retry_after: float


@dataclass(frozen=True, slots=True)
class MarkerFinished:
    """The finished outcome, served without SQL."""

    finished: Finished


@dataclass(frozen=True, slots=True)
class MarkerPending:
    """An outcome that could not be brought to the record yet, with the fence of the claim that made it.

    `raw` is the marker as it stood, to replace exactly it.
    """

    owner: str
    fencing_token: int
    fingerprint: str | None
    outcome: EncodedOutcome
    raw: Any


MarkerAnswer = MarkerTaken | MarkerRunning | MarkerFinished | MarkerPending


class Marker(Protocol):
    """The shield in front of a record; raises `StoreError` where it cannot answer.

    Every key it writes has an expiry, after every operation.
    """

    @property
    def runtimes(self) -> frozenset[RuntimeName]:
        """The runtimes it can serve."""
        ...

    def on(self, runtime: RuntimeName, announce: Announcer) -> Marker:
        """Return this marker tier as `runtime` uses it."""
        ...

    async def take(self, request: ClaimRequest) -> MarkerAnswer:
        """Set our running marker if there is none, else tell what stands there; one round trip if it is ours."""
        ...

    async def give_back(self, scope: str, key: str, owner: str) -> None:
        """Delete our own running marker, and nobody else's."""
        ...

    async def renew_markers(self, leases: Sequence[Lease]) -> None:
        """Extend our own running markers and put back those that are gone; leave everybody else's."""
        ...

    async def publish(self, scope: str, key: str, owner: str, finished: Finished, ttl: float) -> None:
        """Replace our own running or pending marker by the finished outcome; leave anything else, or nothing.

        A marker that a renewal put back is deleted instead: that renewal may have been on its way while a person
        forgot the record, and an outcome in its place would answer for it (F53). The next duplicate asks the record.
        """
        ...

    async def keep(self, lease: Lease, outcome: EncodedOutcome) -> bool:
        """Keep a pending outcome for the retention, over our own running marker or none; False if it was not kept."""
        ...

    async def drop_pending(self, scope: str, key: str, pending: MarkerPending) -> None:
        """Delete exactly this pending marker."""
        ...

    async def drop(self, keys: Sequence[tuple[str, str]]) -> None:
        """Delete whatever markers stand at these scopes and keys."""
        ...

    async def close(self) -> None:
        """Close this runtime's connections."""
        ...


class RecordTier(Store, Protocol):
    """A store that can also stand behind a marker."""

    def on(self, runtime: RuntimeName, announce: Announcer) -> RecordTier:
        """Return this store as `runtime` uses it; see `Store.on`."""
        ...

    async def write_through(self, scope: str, key: str, pending: MarkerPending, retention: float) -> bool:
        """Record a pending outcome under the fence of the claim that made it; never inserts.

        Returns whether that outcome is recorded now (also if it was already).
        """
        ...
