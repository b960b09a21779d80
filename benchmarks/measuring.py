"""The frame: the ways to do one thing take turns, A B A B, and what each took is put beside the floor.

Only figures of one run can be compared: the machine is never the same twice. So each ratio is the median of those of
single turns, in which both ways met the same machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

Do = Callable[[], object]


@dataclass(slots=True)
class Times:
    """What calls took, in seconds: on the clock, and of the client's CPU."""

    elapsed: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


class Way(Protocol):
    """One way to do what a case is about."""

    def take(self, times: int) -> Times:
        """Do it so many times, one after another, and tell what each took."""
        ...


@dataclass(slots=True)
class Here:
    """A way within this process; `before` is called before each call and not timed."""

    do: Do
    before: Do | None = None

    def take(self, times: int) -> Times:
        """Do it so many times; the CPU is that of all threads of this process."""
        clock, cpu_clock, do, before = time.perf_counter, time.process_time, self.do, self.before
        taken = Times()
        for _ in range(times):
            if before is not None:
                before()
            cpu_begun = cpu_clock()
            begun = clock()
            do()
            ended = clock()
            taken.cpu.append(cpu_clock() - cpu_begun)
            taken.elapsed.append(ended - begun)
        return taken


@dataclass(frozen=True, slots=True)
class Absent:
    """A way that cannot be measured on this machine; `reason` says why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Effort:
    """How long is measured: each way of a case for `seconds`, and for `turns` turns at least."""

    seconds: float
    turns: int


FULL = Effort(seconds=5.0, turns=20)
QUICK = Effort(seconds=0.7, turns=5)

WARM_UP = 30
"""Calls before the first that counts: connections are made, and statements are prepared (psycopg: at the sixth)."""

SHORT_WARM_UP = 2
"""The same for turns that hold many calls."""


@dataclass(slots=True)
class Measured:
    """What a way took, for each call: `turns` are the medians of its turns, `all` are all calls."""

    turns: list[float] = field(default_factory=list)
    all: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds for one call."""
        return statistics.median(self.all)

    @property
    def p99(self) -> float:
        """Seconds within which 99 of 100 calls ended."""
        return sorted(self.all)[min(len(self.all) * 99 // 100, len(self.all) - 1)]

    @property
    def mean_cpu(self) -> float:
        """Seconds of the client's CPU for one call; 0 where it could not be told."""
        return statistics.fmean(self.cpu) if self.cpu else 0.0

    def ratio_to(self, floor: Measured) -> float:
        """Return how many times the floor it took: the median of the turns' ratios."""
        return statistics.median(own / its for own, its in zip(self.turns, floor.turns, strict=True))


def measure(ways: Mapping[str, Way], effort: Effort, *, turn: int, calls: int = 1) -> dict[str, Measured]:
    """Let the ways take turns of `turn` calls each until each had its time; what they do holds `calls` calls."""
    for way in ways.values():
        way.take(SHORT_WARM_UP if calls > 1 else max(WARM_UP, turn))
    measured = {name: Measured() for name in ways}
    until, turns = time.monotonic() + effort.seconds * len(ways), 0
    while turns < effort.turns or time.monotonic() < until:
        for name, way in ways.items():
            taken, own = way.take(turn), measured[name]
            own.turns.append(statistics.median(taken.elapsed) / calls)
            own.all.extend(each / calls for each in taken.elapsed)
            own.cpu.extend(each / calls for each in taken.cpu)
        turns += 1
    return measured
