"""What was found, a row for each way of each case."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.case import Case
from benchmarks.counting import Count, count
from benchmarks.measuring import Absent, Effort, Measured, measure
from benchmarks.place import Place, new_place


@dataclass(frozen=True)
class Row:
    """What one way took; times are seconds for one call. What could not be told is None."""

    group: str
    case: str
    way: str
    median: float | None = None
    p99: float | None = None
    ratio: float | None = None
    """How many times the floor."""
    cpu: float | None = None
    count: Count | None = None
    absent: str = ""
    """Why there are no figures."""

    @property
    def per_second(self) -> float | None:
        """Calls a second."""
        return 1 / self.median if self.median else None


def rows_of(case: Case, servers: Place, effort: Effort) -> list[Row]:
    """Measure a case in a place of its own, then count it in another."""
    missing = [name for name in case.needs if not getattr(servers, name)]
    if missing:
        return [Row(case.group, case.name, "all", absent=f"this machine has no {' and no '.join(missing)}")]
    with new_place(servers, case.needs) as place, case.make(place) as ways:
        absent = {name: way.reason for name, way in ways.items() if isinstance(way, Absent)}
        here = {name: way for name, way in ways.items() if not isinstance(way, Absent)}
        measured = measure(here, effort, turn=case.turn, calls=case.calls)
    counts: dict[str, Count] = {}
    if case.counted and case.needs:
        with new_place(servers, case.needs) as place:
            counts = count(case, place)
    floor = measured.get(case.floor)
    return [_row(case, name, own, floor, counts.get(name)) for name, own in measured.items()] + [
        Row(case.group, case.name, name, absent=reason) for name, reason in absent.items()
    ]


def _row(case: Case, name: str, own: Measured, floor: Measured | None, counted: Count | None) -> Row:
    return Row(
        case.group,
        case.name,
        name,
        median=own.median,
        p99=own.p99 if case.calls == 1 else None,
        ratio=None if floor is None else own.ratio_to(floor),
        cpu=own.mean_cpu or None,
        count=counted,
    )
