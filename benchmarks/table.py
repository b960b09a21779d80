"""Writes `RESULTS.md`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby

from benchmarks.rows import Row

HEAD = "| case | way | µs a call | p99 | / floor | calls/s | CPU µs | Redis | SQL | commits |"
RULE = "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"
NOTHING = "-"

LEGEND = (
    "Medians, in microseconds on the clock for one call. / floor: the median of the ratios of turns taken side by "
    "side; the floor is the row with 1.00. CPU: of the client, with all its threads. Redis, SQL: round trips of one "
    "call, counted on the wire. Commits: those that took a transaction id (PostgreSQL) or a read-write transaction "
    "(MariaDB). How it is measured: `docs/benchmarks.md`."
)


def document(rows: Iterable[Row], sizes: Mapping[str, float], machine: Mapping[str, str], *, quick: bool) -> str:
    """Return the whole document."""
    command = "QUICK=1 make bench" if quick else "make bench"
    lines = ["# Results", "", f"Written by `{command}`; do not edit.", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in machine.items()]
    lines += ["", LEGEND]
    for group, members in groupby(rows, key=lambda row: row.group):
        lines += ["", f"## {group}", "", HEAD, RULE]
        lines += [line(row) for row in members]
    if sizes:
        lines += ["", "## Bytes", "", "| | bytes each | MiB for a million |", "|---|--:|--:|"]
        lines += [f"| {name} | {size:.0f} | {size * 1e6 / 2**20:.0f} |" for name, size in sizes.items()]
    return "\n".join(lines) + "\n"


def line(row: Row) -> str:
    """Return a row of the table; one without figures says why."""
    if row.absent:
        return f"| {row.case} | {row.way} | {row.absent} |" + " |" * 7
    count = row.count
    cells = [
        row.case,
        row.way,
        _microseconds(row.median),
        _microseconds(row.p99),
        NOTHING if row.ratio is None else f"{row.ratio:.2f}",
        NOTHING if row.per_second is None else f"{row.per_second:,.0f}",
        _microseconds(row.cpu),
        *([NOTHING] * 3 if count is None else [_counted(each) for each in (count.redis, count.sql, count.commits)]),
    ]
    return f"| {' | '.join(cells)} |"


def _microseconds(seconds: float | None) -> str:
    if seconds is None:
        return NOTHING
    value = seconds * 1e6
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _counted(number: float | None) -> str:
    return NOTHING if number is None else f"{number:.3g}"
