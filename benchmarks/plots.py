"""Draws what the table says: how far above the floor each call is, and what many at once bring."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.rows import Row

# Okabe and Ito's colours, which no common colour blindness confuses.
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#999999"
INK, FAINT = "#333333", "#E4E4E4"

LATENCIES = ("Duplicate", "First call", "Rows and outcome in one transaction")
THROUGHPUTS = ("asyncio, first calls", "Threads, first calls", "Processes, first calls", "Celery, end to end")
PEERS = ("Peers",)


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write a picture for each kind of question that there are rows for; return the files."""
    drawn = []
    for name, groups, what in (
        ("latency", LATENCIES, "µs a call, median"),
        ("throughput", THROUGHPUTS, "calls a second"),
        ("peers", PEERS, "µs a call, median, logarithmic"),
    ):
        shown = [row for row in rows if row.group in groups and row.median is not None]
        if shown:
            file = folder / f"{name}.png"
            _draw_bars(shown, name == "throughput", name == "peers", what, file)
            drawn.append(file)
    return drawn


def _draw_bars(rows: Sequence[Row], per_second: bool, logarithmic: bool, what: str, file: Path) -> None:
    cases = list(dict.fromkeys((row.group, row.case) for row in rows))
    height = sum(0.24 * sum((row.group, row.case) == case for row in rows) + 0.35 for case in cases)
    figure = Figure(figsize=(10, height + 0.8), dpi=110, facecolor="white", layout="constrained")
    axes = figure.subplots()
    ticks, labels, at = [], [], 0.0
    for case in cases:
        for row in (row for row in rows if (row.group, row.case) == case):
            value = (row.per_second if per_second else (row.median or 0.0) * 1e6) or 0.0
            axes.barh(at, value, height=0.8, color=_colour(row.way))
            axes.annotate(f" {value:,.0f}", (value, at), va="center", fontsize=7, color=INK, annotation_clip=False)
            ticks.append(at)
            labels.append(f"{row.group}, {row.case}: {row.way}")
            at += 1.0
        at += 0.8
    axes.set_yticks(ticks, labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(what, color=INK)
    if logarithmic:
        axes.set_xscale("log")
    _tidy(axes)
    figure.savefig(file, format="png", metadata={"Software": None})


def _colour(way: str) -> str:
    if way.startswith("ours"):
        return BLUE
    if way == "by hand" or way.startswith("by hand,"):
        return ORANGE
    return GREY


def _tidy(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="x", color=FAINT)
    axes.set_axisbelow(True)
