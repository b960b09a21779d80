"""What `assert_idempotent` found: what happened at each crash point, and how to mend it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReportedPoint:
    """What came of a message at one crash point."""

    name: str
    """What happened to its first delivery; "undisturbed" for the run that all others are compared with."""
    runs: int
    """How often the handler ran."""
    effects: Mapping[str, int]
    """How many effects there were, by name."""
    outcome: str
    """What the caller got, in short."""
    repeated: tuple[str, ...] = ()
    """The effects that were there more often than undisturbed."""
    missing: tuple[str, ...] = ()
    """The effects that were there less often than undisturbed, though nobody was told to look."""
    faults: tuple[str, ...] = ()
    """What else was wrong, in words."""

    @property
    def passed(self) -> bool:
        """Whether it ended as it should."""
        return not (self.repeated or self.missing or self.faults)


@dataclass(frozen=True, slots=True)
class IdempotencyReport:
    """What `assert_idempotent` saw; `str` of it is a table for people."""

    call: str
    """The call that was delivered."""
    points: tuple[ReportedPoint, ...]
    """The undisturbed run, then each crash point."""

    @property
    def passed(self) -> bool:
        """Whether every crash point ended as it should."""
        return all(point.passed for point in self.points)

    def __str__(self) -> str:
        bad = sum(not point.passed for point in self.points)
        crash_points = len(self.points) - 1
        if bad:
            verdict = f"is not idempotent at {bad} of {crash_points} crash points"
        elif any(point.effects for point in self.points):
            verdict = f"is idempotent at all {crash_points} crash points"
        else:
            verdict = f"has one outcome at all {crash_points} crash points; its effects were not counted"
        parts = [f"{self.call} {verdict}\n", self._table()]
        if bad:
            parts += ["", *self._findings(), "", *self._mending()]
        return "\n".join(parts)

    def _table(self) -> str:
        every = dict.fromkeys(name for point in self.points for name in point.effects)
        names = [name for name in every if any(point.effects.get(name) for point in self.points)]
        rows = [["", "runs ", *(f"{name} " for name in names), "outcome"]]
        for point in self.points:
            counted = [f"{point.effects.get(name, 0)}{'!' if name in _wrong(point) else ' '}" for name in names]
            rows.append([point.name, f"{point.runs} ", *counted, point.outcome])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        marks = [" ", *("  " if point.passed else "! " for point in self.points)]
        lines = []
        for mark, row in zip(marks, rows, strict=True):
            cells = [row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, len(row) - 1)), row[-1]]
            lines.append(f"{mark:2}{'  '.join(cells)}".rstrip())
        return "\n".join(lines)

    def _findings(self) -> list[str]:
        found: dict[str, list[str]] = {}
        for point in self.points:
            for name in _wrong(point):
                expected = self.points[0].effects.get(name, 0)
                found.setdefault(f"{name}: {point.effects[name]} instead of {expected}", []).append(point.name)
            for fault in point.faults:
                found.setdefault(fault, []).append(point.name)
        return [f"{what}\n    when {', '.join(names)}" for what, names in found.items()]

    def _mending(self) -> list[str]:
        lines: list[str] = []
        if any(point.repeated and point.runs > self.points[0].runs for point in self.points):
            lines += _REPEATED
        if any(point.missing for point in self.points):
            lines += _MISSING
        return lines


_REPEATED = [
    "A worker can die between an effect and its record; then the handler runs again. Mend each effect in one way:",
    "  - give the provider an idempotency key that is the same in every run, such as the order's id",
    "  - write rows under a business key that is unique, as an upsert or with ON CONFLICT DO NOTHING",
    '  - on_crash="hold": the handler does not run again, and a person decides',
]
_MISSING = [
    "An effect is missing where the message was acknowledged: a run that began again took an earlier run's trace",
    "for the whole work. Look for each effect by itself, not for the first of them.",
]


def _wrong(point: ReportedPoint) -> tuple[str, ...]:
    return point.repeated + point.missing
