"""Which messages of which partition wait, run and are finished, and how far each may be committed; without any I/O.

A partition is worked on in the order of its offsets. What may be committed is the offset behind the last message of
the unbroken row of finished ones: a message that is not finished is never passed, whatever was finished behind it.
"""

from __future__ import annotations

import bisect
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Generic, TypeVar

from idem_tasks.integrations.settling import Acknowledge, PutBack

M = TypeVar("M")

Place = tuple[str, int]
"""A topic and the number of a partition."""


@dataclass(slots=True)
class Taken(Generic[M]):
    """A message with its offset, and how often it was put back before."""

    offset: int
    message: M
    since: float = 0.0
    """The moment at which it was fetched."""
    count: int = 0


class Partition(Generic[M]):
    """A partition for as long as it is assigned to this consumer.

    One that was revoked is closed: what still runs for it may end, and changes nothing here any more.
    """

    def __init__(self, place: Place, before: Partition[M] | None = None) -> None:
        """`before` is the same partition as it was assigned earlier, for which something may run still."""
        self.place = place
        self.closed = False
        self.paused = False
        """Whether the client was told to fetch nothing."""
        self.due_at = 0.0
        """Not before this moment does the next message run."""
        self._before = before
        self._waiting: list[Taken[M]] = []
        self._running: dict[int, Taken[M]] = {}
        self._unbroken: deque[int] = deque()  # delivered, and may not be committed yet
        self._finished: set[int] = set()  # those of them that are finished
        self._highest = -1
        self._position: int | None = None
        self._committed: int | None = None

    def add(self, offset: int, message: M, now: float = 0.0) -> None:
        """Let a message wait that the broker delivered; one that is here already is not taken twice."""
        if offset <= self._highest:
            if offset in self._unbroken:
                return
            self._begin_again()
        self._highest = offset
        self._unbroken.append(offset)
        self._waiting.append(Taken(offset, message, now))

    def _begin_again(self) -> None:
        """Forget all: somebody sought back, or the broker lost the end of its log, and all behind this comes again."""
        self._waiting.clear()
        self._unbroken.clear()
        self._finished.clear()
        self._position = None

    def take(self, now: float, limit: int = 1, wait: float = 0.0) -> list[Taken[M]]:
        """Return what is to run now, in order: nothing while something runs, is due later, or was revoked.

        `limit` are as many as run together; the first of fewer has waited `wait` seconds.
        """
        if self.closed or self._running or now < self.due_at or not self._waiting:
            return []
        if len(self._waiting) < limit and now < self._waiting[0].since + wait:
            return []
        if self._before is not None:
            if self._before.is_running:
                return []
            self._before = None
        taken, self._waiting = self._waiting[:limit], self._waiting[limit:]
        self._running = {each.offset: each for each in taken}
        return taken

    def finish(self, offset: int) -> None:
        """Note that the outcome of a running message is recorded, or that it is a dead letter in safety."""
        if self._running.pop(offset, None) is None or self.closed or offset not in self._unbroken:
            return
        self._finished.add(offset)
        while self._unbroken and self._unbroken[0] in self._finished:
            last = self._unbroken.popleft()
            self._finished.remove(last)
            self._position = last + 1

    def put_back(self, offset: int, due_at: float, count: int) -> None:
        """Let a running message be the next again, not before `due_at`, and with it all behind it."""
        taken = self._running.pop(offset, None)
        if taken is None or self.closed or offset not in self._unbroken:
            return
        if all(each.offset != offset for each in self._waiting):
            taken.count = count
            bisect.insort(self._waiting, taken, key=attrgetter("offset"))
        self.due_at = max(self.due_at, due_at)

    def settle(self, taken: Sequence[Taken[M]], settlements: Sequence[Acknowledge | PutBack], now: float) -> None:
        """Note what became of messages; those behind the last settlement did not run, and are the next again."""
        for each, settlement in itertools.zip_longest(taken, settlements):
            match settlement:
                case Acknowledge():
                    self.finish(each.offset)
                case PutBack(delay, count):
                    self.put_back(each.offset, now + delay, count)
                case None:
                    self.put_back(each.offset, now, each.count)

    @property
    def is_running(self) -> bool:
        """Whether a message of it runs, or of what it was before."""
        return bool(self._running) or (self._before is not None and self._before.is_running)

    @property
    def waiting(self) -> int:
        """How many messages wait here."""
        return len(self._waiting)

    def wants_pause(self, now: float, limit: int) -> bool:
        """Tell whether nothing more should be fetched: it is full, or waits. A full one goes on when half empty."""
        return now < self.due_at or len(self._waiting) >= (max(limit // 2, 1) if self.paused else limit)

    def to_commit(self) -> int | None:
        """Return the offset of the first message that is not finished, where that is not committed yet; else None."""
        return None if self._position == self._committed else self._position

    def committed(self, offset: int) -> None:
        """Note what the broker was told."""
        self._committed = offset

    def uncommitted(self) -> None:
        """Note that the broker may not have taken it, so that it is told again."""
        self._committed = None

    def close(self) -> None:
        """Forget what waits: its next owner gets it again."""
        self.closed = True
        self._waiting.clear()


class Partitions(Generic[M]):
    """The partitions that are assigned to one consumer."""

    def __init__(self) -> None:
        self._assigned: dict[Place, Partition[M]] = {}
        self._revoked: dict[Place, Partition[M]] = {}  # for which something runs still

    def __iter__(self) -> Iterator[Partition[M]]:
        return iter(list(self._assigned.values()))

    def assign(self, places: Iterable[Place]) -> None:
        """Begin with these partitions; one that is here already stays as it is."""
        for place in places:
            if place not in self._assigned:
                self._assigned[place] = Partition(place, self._revoked.pop(place, None))

    def revoke(self, places: Iterable[Place]) -> None:
        """End these partitions: what waits is forgotten, and what runs may end."""
        self._revoked = {place: each for place, each in self._revoked.items() if each.is_running}
        for place in places:
            if (partition := self._assigned.pop(place, None)) is not None:
                partition.close()
                if partition.is_running:
                    self._revoked[place] = partition

    def add(self, place: Place, offset: int, message: M, now: float = 0.0) -> None:
        """Let a message wait; one of a partition that is not assigned any more comes to its next owner."""
        if (partition := self._assigned.get(place)) is not None:
            partition.add(offset, message, now)

    def to_commit(self, places: Iterable[Place] | None = None) -> dict[Place, int]:
        """Return what may be committed of these partitions, or of all, and is not."""
        wanted = self._assigned if places is None else [place for place in places if place in self._assigned]
        found = {place: self._assigned[place].to_commit() for place in wanted}
        return {place: offset for place, offset in found.items() if offset is not None}

    def committed(self, offsets: Mapping[Place, int]) -> None:
        """Note what the broker was told."""
        for place, offset in offsets.items():
            if (partition := self._assigned.get(place)) is not None:
                partition.committed(offset)

    def uncommitted(self, places: Iterable[Place]) -> None:
        """Note that the broker may not have taken these."""
        for place in places:
            if (partition := self._assigned.get(place)) is not None:
                partition.uncommitted()

    @property
    def is_running(self) -> bool:
        """Whether a message of any of them runs, or of one that was revoked."""
        return any(each.is_running for each in (*self._assigned.values(), *self._revoked.values()))
