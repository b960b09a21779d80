"""Counts what one call sends and commits. Counts are exact where times are noise: a call that adds one is seen."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.case import Case
from benchmarks.measuring import SHORT_WARM_UP, Absent
from benchmarks.place import Counters, Place, counted_place

WARM_UP = 8
"""Calls before those that are counted: a driver prepares a statement in a round trip of its own, once."""

COUNTED = 5
"""Calls of which the smallest counts are taken: servers commit, and heartbeats renew, for themselves now and then."""


@dataclass(frozen=True)
class Count:
    """Round trips to Redis and to the database, and commits that wrote something; None: nobody can tell."""

    redis: float
    sql: float
    commits: float | None


def count(case: Case, place: Place) -> dict[str, Count]:
    """Return the counts of each way, for one call."""
    counts = {}
    with counted_place(place) as (behind, counters), case.make(behind) as ways:
        for name, way in ways.items():
            if isinstance(way, Absent):
                continue
            way.take(SHORT_WARM_UP if case.calls > 1 else WARM_UP)
            seen = []
            for _ in range(COUNTED):
                before = _read(counters)
                way.take(1)
                seen.append([_difference(*each) for each in zip(_read(counters), before, strict=True)])
            redis, sql, commits = (_smallest(each, case.calls) for each in zip(*seen, strict=True))
            counts[name] = Count(redis or 0.0, sql or 0.0, commits)
    return counts


def _read(counters: Counters) -> tuple[int | None, ...]:
    return counters.redis(), counters.sql(), counters.commits()


def _difference(after: int | None, before: int | None) -> int | None:
    return None if after is None or before is None else after - before


def _smallest(counts: tuple[int | None, ...], calls: int) -> float | None:
    known = [each for each in counts if each is not None]
    return min(known) / calls if known else None
