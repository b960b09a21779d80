"""Draws a run of chaos over its seconds: what flowed, what was done to it, what came of that."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from tests.chaos.history import FAULT_KINDS, Fault, History
from tests.chaos.verdict import Verdict

# Okabe and Ito's colours, which no common colour blindness confuses; lines and marks differ in shape as well.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
INK, FAINT = "#333333", "#E4E4E4"

SHOP_COLOURS = (BLUE, ORANGE, SKY)

BINS = 75
"""Points of a line, at most; and each tells of `SHORTEST` seconds at least."""

SHORTEST = 2.0

NARROWEST = 0.003
"""Of the whole width: what an instant is drawn as."""


def draw(history: History, verdict: Verdict, file: Path) -> None:
    """Write the picture as a PNG, the same bytes for the same history."""
    kinds = [kind for kind in FAULT_KINDS if any(fault.kind == kind for fault in history.faults)]
    marks = _marks(history, verdict)
    heights = (2.4, 0.34 * max(len(kinds), 1) + 0.1, 0.34 * len(marks) + 0.1)
    figure = Figure(figsize=(12, 1.75 + sum(heights)), dpi=110, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.06)  # type: ignore[union-attr,call-arg]
    rates, faults, events = figure.subplots(3, 1, sharex=True, gridspec_kw={"height_ratios": heights})
    figure.suptitle(_title(history, verdict), x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    _draw_rates(rates, history)
    _draw_faults(faults, history, kinds, verdict.shops)
    _draw_marks(events, marks)
    for axes in (rates, faults, events):
        _tidy(axes)
        axes.axvline(history.seconds, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    rates.annotate(
        "no new faults", (history.seconds, 1.0), xycoords=("data", "axes fraction"), xytext=(-4, -9), ha="right",
        textcoords="offset points", fontsize=8, color=INK,
    )  # fmt: skip
    events.set_xlim(0, max(_width(history), history.seconds) * 1.005)
    events.set_xlabel("seconds since the run began", color=INK)
    events.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    figure.savefig(file, format="png", metadata={"Software": None})


def _title(history: History, verdict: Verdict) -> str:
    kept = "every promise was kept" if verdict.good else "promises were broken"
    return f"Chaos, seed {history.seed}: {kept}"


def _width(history: History) -> float:
    return max(history.ended - history.began, 1.0)


def _draw_rates(axes: Axes, history: History) -> None:
    width = _width(history)
    step = max(SHORTEST, round(width / BINS))
    lines: tuple[tuple[str, Sequence[Any], str, Any], ...] = (
        ("messages published", history.published, BLACK, (0, (1, 1))),
        ("outcomes given", [row for row in history.answered if row.outcome is not None], GREEN, "solid"),
        ("effects", history.effects, VERMILION, (0, (5, 1.5))),
    )
    for label, rows, colour, style in lines:
        counts = [0] * (int(width / step) + 1)
        for row in rows:
            counts[min(max(int((row.at - history.began) / step), 0), len(counts) - 1)] += 1
        middles = [(number + 0.5) * step for number in range(len(counts))]
        axes.plot(
            middles, [count / step for count in counts], color=colour, linestyle=style, linewidth=1.7, label=label
        )
    axes.set_ylim(0, axes.get_ylim()[1] * 1.08)  # with room for a word above
    axes.set_ylabel("a second", color=INK)
    axes.set_title("What flowed", loc="left", fontsize=10, color=INK)
    axes.grid(axis="y", color=FAINT)
    _legend(axes)


def _draw_faults(axes: Axes, history: History, kinds: Sequence[str], shops: Sequence[str]) -> None:
    """One row for each kind, within it one lane for each shop."""
    narrowest = NARROWEST * _width(history)
    lane = 0.8 / max(len(shops), 1)
    for row, kind in enumerate(kinds):
        for number, shop in enumerate(shops):
            spans = [
                (fault.at - history.began, max(fault.until - fault.at, narrowest))
                for fault in history.faults
                if fault.kind == kind and is_at(fault, shop)
            ]
            colour = SHOP_COLOURS[number % len(SHOP_COLOURS)]
            axes.broken_barh(spans, (row - 0.4 + number * lane, lane * 0.88), facecolors=colour, linewidth=0)
    counts = [sum(fault.kind == kind for fault in history.faults) for kind in kinds]
    _rows(axes, [f"{kind.replace('_', ' ')}  {count}" for kind, count in zip(kinds, counts, strict=True)])
    axes.set_title("What was done", loc="left", fontsize=10, color=INK)
    if kinds:
        patches = [Patch(color=SHOP_COLOURS[i % len(SHOP_COLOURS)], label=shop) for i, shop in enumerate(shops)]
        _legend(axes, patches)


Mark = tuple[str, list[float], str, str]


def _marks(history: History, verdict: Verdict) -> list[Mark]:
    """What came of it: name, times, colour and shape of each row."""
    first_heard: dict[str, dict[tuple[str, str, str], float]] = {"InDoubtError": {}, "ParkedError": {}}
    last_seen: dict[tuple[str, str, str], float] = {}
    told: list[Any] = [*history.published, *history.started, *history.effects, *history.answered]
    for row in sorted(told, key=lambda row: row.at):
        last_seen[row.shop, row.order, row.task] = row.at
        heard = first_heard.get(getattr(row, "error", None) or "")
        if heard is not None:
            heard.setdefault((row.shop, row.order, row.task), row.at)
    broken = [judged for judged in verdict.orders if judged.problems]
    rows: list[Mark] = [
        ("taken over", [row.at for row in history.started if row.taken_over], INK, "|"),
        ("effect repeated, explained", [repeat.second.at for repeat in verdict.explained], PURPLE, "D"),
        ("put in doubt", list(first_heard["InDoubtError"].values()), BLACK, "s"),
        ("parked", list(first_heard["ParkedError"].values()), BLUE, "^"),
        (
            "promise broken",
            [last_seen.get((judged.shop, judged.order, judged.task), history.ended) for judged in broken],
            VERMILION,
            "X",
        ),
    ]
    return [
        (name, [at - history.began for at in times], colour, shape)
        for name, times, colour, shape in rows
        if times or name != "parked"
    ]


def _draw_marks(axes: Axes, marks: Sequence[Mark]) -> None:
    for row, (_, times, colour, shape) in enumerate(marks):
        if shape == "|":
            axes.scatter(times, [row] * len(times), color=colour, marker=shape, s=90, linewidths=1.3)
        else:
            axes.scatter(
                times, [row] * len(times), color=colour, marker=shape, s=34, linewidths=0.4, edgecolors="white"
            )
    _rows(axes, [f"{name}  {len(times)}" for name, times, _, _ in marks])
    axes.set_title("What came of it", loc="left", fontsize=10, color=INK)


def _rows(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.set_ylim(max(len(labels), 1) - 0.5, -0.5)
    axes.hlines([row + 0.5 for row in range(len(labels) - 1)], 0, 1, FAINT, transform=axes.get_yaxis_transform())
    axes.tick_params(axis="y", length=0)


def _legend(axes: Axes, handles: Sequence[Any] | None = None) -> None:
    places: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 0.98), "ncols": 3, "frameon": False}
    if handles is None:
        axes.legend(fontsize=9, labelcolor=INK, **places)
    else:
        axes.legend(handles=list(handles), fontsize=9, labelcolor=INK, **places)


def _tidy(axes: Axes) -> None:
    axes.set_facecolor("white")
    axes.set_axisbelow(True)
    axes.grid(axis="x", color=FAINT)
    axes.tick_params(colors=INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#BBBBBB")


def is_at(fault: Fault, shop: str) -> bool:
    """Tell whether this fault struck this shop."""
    return fault.target.startswith(f"{shop} ")
