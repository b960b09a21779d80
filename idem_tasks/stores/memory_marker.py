"""Markers in this process's memory: the shield without Redis, for tests of the two tiers."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from idem_tasks.claims import ClaimRequest, EncodedOutcome, Finished, Lease
from idem_tasks.events import Announcer
from idem_tasks.stores.base import (
    MarkerAnswer,
    MarkerFinished,
    MarkerPending,
    MarkerRunning,
    MarkerTaken,
    RuntimeName,
)

_SWEEP_FLOOR = 1000
"""Markers below which nothing is swept."""


@dataclass(frozen=True, slots=True)
class _Running:
    owner: str
    expires_at: float
    take: int | None
    """The take that set it; None: a renewal put it back."""


@dataclass(frozen=True, slots=True)
class _Finished:
    finished: Finished
    published_at: float
    expires_at: float


@dataclass(frozen=True, slots=True)
class _Pending:
    lease: Lease
    outcome: EncodedOutcome
    expires_at: float


class MemoryMarker:
    """Keeps markers in this process's memory, each with an expiry, for both runtimes and any number of threads.

    Memory is bounded: expired markers are dropped when their number has doubled since the last such sweep, and not
    below 1,000. `clock` returns seconds since the epoch and may be given to move time in tests.
    """

    runtimes: frozenset[RuntimeName] = frozenset({"blocking", "asyncio"})

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self._clock = time.time if clock is None else clock
        self._lock = threading.Lock()
        self._markers: dict[tuple[str, str], _Running | _Finished | _Pending] = {}
        self._sweep_at = _SWEEP_FLOOR

    def on(self, runtime: RuntimeName, announce: Announcer) -> MemoryMarker:
        """Return this very marker tier: memory is the same for both runtimes."""
        return self

    async def take(self, request: ClaimRequest) -> MarkerAnswer:
        """Set our running marker if there is none, else tell what stands there."""
        place = (request.scope, request.key)
        with self._lock:
            now = self._clock()
            match self._standing(place, now):
                case None:
                    self._sweep(now)
                    self._markers[place] = _Running(request.owner, now + request.policy.lease, request.take)
                    return MarkerTaken()
                case _Running(owner, expires_at):
                    # Ours already: the answer to our first try did not arrive (F22).
                    return MarkerTaken() if owner == request.owner else MarkerRunning(expires_at - now)
                case _Finished(finished, published_at):
                    left = max(finished.expires_in - (now - published_at), 0.0)
                    return MarkerFinished(dataclasses.replace(finished, expires_in=left))
                case _Pending(lease, outcome) as raw:  # pragma: no branch - there is no other marker
                    return MarkerPending(lease.owner, lease.fencing_token, lease.request.fingerprint, outcome, raw)

    async def give_back(self, scope: str, key: str, owner: str) -> None:
        """Delete our own running marker, and nobody else's."""
        with self._lock:
            match self._markers.get((scope, key)):
                case _Running(holder) if holder == owner:
                    del self._markers[scope, key]

    async def take_batch(self, requests: Sequence[ClaimRequest]) -> list[MarkerAnswer | None]:
        """As `take` for each."""
        return [await self.take(request) for request in requests]

    async def give_back_batch(self, requests: Sequence[ClaimRequest]) -> None:
        """As `give_back` for each."""
        for request in requests:
            await self.give_back(request.scope, request.key, request.owner)

    async def publish_batch(self, finished: Sequence[tuple[ClaimRequest, Finished, float]]) -> None:
        """As `publish` for each."""
        for request, outcome, ttl in finished:
            await self.publish(request, outcome, ttl)

    async def renew_markers(self, leases: Sequence[Lease]) -> None:
        """Extend our own running markers and put back those that are gone; leave everybody else's."""
        with self._lock:
            now = self._clock()
            for lease in leases:
                take: int | None
                match self._standing((lease.scope, lease.key), now):
                    case None:
                        take = None
                    case _Running(owner, _, take) if owner == lease.owner:
                        pass
                    case _:
                        continue
                self._markers[lease.scope, lease.key] = _Running(lease.owner, now + lease.policy.lease, take)

    async def publish(self, request: ClaimRequest, finished: Finished, ttl: float) -> None:
        """Replace the marker that this take set by the outcome for `ttl` seconds; delete any other of ours (F53)."""
        place = (request.scope, request.key)
        with self._lock:
            now = self._clock()
            match self._standing(place, now):
                case _Running(owner, _, take) if owner == request.owner and take is not None and take == request.take:
                    self._markers[place] = _Finished(finished, now, now + ttl)
                case _Running(owner) | _Pending(Lease(ClaimRequest(owner=owner))) if owner == request.owner:
                    del self._markers[place]

    async def keep(self, lease: Lease, outcome: EncodedOutcome) -> bool:
        """Keep a pending outcome for the retention, over our own marker or none; False if it was not kept."""
        with self._lock:
            now = self._clock()
            match self._standing((lease.scope, lease.key), now):
                case None:
                    pass
                case _Running(owner) if owner == lease.owner:
                    pass
                case _Pending(kept) if kept.owner == lease.owner:
                    pass
                case _:
                    return False
            self._markers[lease.scope, lease.key] = _Pending(lease, outcome, now + lease.policy.retention)
            return True

    async def drop_pending(self, scope: str, key: str, pending: MarkerPending) -> None:
        """Delete exactly this pending marker."""
        with self._lock:
            if self._markers.get((scope, key)) is pending.raw:
                del self._markers[scope, key]

    async def drop(self, keys: Sequence[tuple[str, str]]) -> None:
        """Delete whatever markers stand at these scopes and keys."""
        with self._lock:
            for place in keys:
                self._markers.pop(place, None)

    async def close(self) -> None:
        """Do nothing: there are no connections, and the markers stay."""

    def _standing(self, place: tuple[str, str], now: float) -> _Running | _Finished | _Pending | None:
        marker = self._markers.get(place)
        return None if marker is None or marker.expires_at <= now else marker

    def _sweep(self, now: float) -> None:
        if len(self._markers) < self._sweep_at:
            return
        self._markers = {place: marker for place, marker in self._markers.items() if now < marker.expires_at}
        self._sweep_at = max(_SWEEP_FLOOR, 2 * len(self._markers))
