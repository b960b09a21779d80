"""Draws what `GROWTH.md` says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.growth.measures import DUPLICATE, RANDOM_KEYS, RISING_KEYS, Found
from benchmarks.plots import BLUE, GREY, INK, ORANGE

COLOURS = {RANDOM_KEYS: BLUE, RISING_KEYS: ORANGE, DUPLICATE: GREY}


def draw(found: Sequence[Found], file: Path) -> None:
    """Write the picture: what calls take, and what a record needs."""
    figure = Figure(figsize=(10, 3.6), dpi=110, facecolor="white", layout="constrained")
    calls, sizes = figure.subplots(1, 2)
    draw_calls(calls, found)
    draw_sizes(sizes, found)
    for axes in (calls, sizes):
        axes.tick_params(labelsize=7, colors=INK)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.savefig(file, format="png", metadata={"Software": None})


def draw_calls(axes: Axes, found: Sequence[Found]) -> None:
    """Draw a line for each kind of call; the one with dashes is within which 99 of 100 ended."""
    axes.set_title("µs a call by the number of records: median, and p99 with dashes", loc="left", fontsize=8, color=INK)
    rows = [each.rows for each in found]
    for kind, colour in COLOURS.items():
        took = [each.calls[kind] for each in found]
        axes.plot(rows, [each.median * 1e6 for each in took], "o-", color=colour, label=kind, markersize=4)
        axes.plot(rows, [each.p99 * 1e6 for each in took], "--", color=colour, linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(bottom=100)
    axes.set_xlabel("records", fontsize=7, color=INK)
    axes.legend(fontsize=7, frameon=False)


def draw_sizes(axes: Axes, found: Sequence[Found]) -> None:
    """Draw a bar for each number of records."""
    axes.set_title("bytes a record", loc="left", fontsize=8, color=INK)
    places = range(len(found))
    below = [0.0] * len(found)
    for number, name in enumerate(("table", *found[0].size.indexes)):
        heights = [each.size.table if name == "table" else each.size.indexes[name] for each in found]
        axes.bar(places, heights, 0.6, bottom=below, label=name, color=(BLUE, ORANGE, GREY, INK)[number % 4])
        below = [under + height for under, height in zip(below, heights, strict=True)]
    axes.set_xticks(places, [f"{each.rows:,}" for each in found])
    axes.set_xlabel("records", fontsize=7, color=INK)
    axes.set_ylim(top=1.35 * max(below))  # room for the legend
    axes.legend(fontsize=7, frameon=False, ncols=4, loc="upper left")
