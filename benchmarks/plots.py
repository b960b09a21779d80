"""Draws what the table says: how far above the floor each call is, and what many at once bring."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.rows import Row

# Okabe and Ito's colours, which no common colour blindness confuses.
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#999999"
INK = "#333333"

PICTURES = {
    "latency": ("Duplicate", "First call", "Rows and outcome in one transaction"),
    "throughput": ("asyncio, first calls", "Threads, first calls", "Processes, first calls", "Celery, end to end"),
    "peers": ("Peers",),
}
"""The groups of each picture."""

IN_CALLS_A_SECOND = ("throughput",)
"""Pictures in which longer bars are better."""


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write the pictures that there are rows for; return their files."""
    drawn = []
    for name, groups in PICTURES.items():
        shown = [row for row in rows if row.group in groups and row.median is not None]
        if shown:
            file = folder / f"{name}.png"
            _draw(shown, per_second=name in IN_CALLS_A_SECOND, file=file)
            drawn.append(file)
    return drawn


def _draw(rows: Sequence[Row], *, per_second: bool, file: Path) -> None:
    """Give each case a scale of its own: a duplicate beside a first call would be a hair."""
    cases = [list(members) for _, members in groupby(rows, key=lambda row: (row.group, row.case))]
    heights = [len(members) + 1.4 for members in cases]
    figure = Figure(figsize=(10, 0.24 * sum(heights) + 0.5), dpi=110, facecolor="white", layout="constrained")
    what = "calls a second" if per_second else "µs a call, median"
    figure.suptitle(f"{what}; in brackets: the time against the floor's", x=0.01, ha="left", fontsize=10, color=INK)
    for axes, members in zip(
        figure.subplots(len(cases), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0], cases, strict=True
    ):
        _draw_case(axes, members, per_second=per_second)
    figure.savefig(file, format="png", metadata={"Software": None})


def _draw_case(axes: Axes, rows: Sequence[Row], *, per_second: bool) -> None:
    axes.set_title(f"{rows[0].group}: {rows[0].case}".replace("`", ""), loc="left", fontsize=8, color=INK)
    values = [(row.per_second if per_second else (row.median or 0.0) * 1e6) or 0.0 for row in rows]
    axes.barh(range(len(rows)), values, height=0.8, color=[_colour(row.way) for row in rows])
    for at, (row, value) in enumerate(zip(rows, values, strict=True)):
        ratio = "" if row.ratio is None else f" ({row.ratio:.2f})"
        axes.annotate(f" {value:,.0f}{ratio}", (value, at), va="center", fontsize=7, color=INK)
    axes.set_yticks(range(len(rows)), [row.way for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, max(values) * 1.15)
    axes.set_xticks([])
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)


def _colour(way: str) -> str:
    if way.startswith("ours"):
        return BLUE
    return ORANGE if way.startswith("by hand") else GREY
