"""Tells of a run of chaos in Markdown, with a picture beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.chaos import timeline
from tests.chaos.explained import Explained
from tests.chaos.history import FAULT_KINDS, Effect, Fault, History
from tests.chaos.verdict import Verdict

REPORT = "report.md"
PICTURE = "timeline.png"


def write(history: History, verdict: Verdict, folder: Path) -> Path:
    """Write both into the folder, and return the report's path; the same history makes the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    timeline.draw(history, verdict, folder / PICTURE)
    report = folder / REPORT
    report.write_text("\n".join(_lines(history, verdict)) + "\n", encoding="utf-8")
    return report


def _lines(history: History, verdict: Verdict) -> Iterator[str]:
    kept = "every promise was kept" if verdict.good else "promises were broken"
    yield f"# Chaos, seed {history.seed}: {kept}"
    yield ""
    yield from _facts(history, verdict)
    yield ""
    yield f"![Rates, faults and what came of them, over the seconds of the run]({PICTURE})"
    yield from _section("Broken promises", _problems(verdict))
    yield from _section("Totals", _totals(verdict))
    yield from _section("Faults", _faults(history, verdict))
    yield from _section("Explained repeats", _repeats(history, verdict))


def _section(title: str, lines: Iterator[str]) -> Iterator[str]:
    yield ""
    yield f"## {title}"
    yield ""
    yield from lines


def _facts(history: History, verdict: Verdict) -> Iterator[str]:
    yield f"- seed: {history.seed}"
    yield f"- seconds of faults: {history.seconds:g}"
    yield f"- seconds until everything was settled: {history.ended - history.began:.1f}"
    yield f"- lease: {history.lease:g} s"
    yield f"- shops: {', '.join(verdict.shops)}"


def _problems(verdict: Verdict) -> Iterator[str]:
    if verdict.good:
        yield "None."
    for problem in verdict.problems:
        yield f"- {problem}"


def _totals(verdict: Verdict) -> Iterator[str]:
    columns = [verdict.totals(), *(verdict.totals(shop) for shop in verdict.shops)]
    rows = [(name, *(str(column.get(name, 0)) for column in columns)) for name in columns[0]]
    yield from _table(("", "all", *verdict.shops), rows)


def _faults(history: History, verdict: Verdict) -> Iterator[str]:
    rows = []
    for kind in FAULT_KINDS:
        found = [fault for fault in history.faults if fault.kind == kind]
        by_shop = (str(sum(timeline.is_at(fault, shop) for fault in found)) for shop in verdict.shops)
        seconds = sum(fault.until - fault.at for fault in found)
        rows.append((kind, str(len(found)), *by_shop, f"{seconds:.1f}"))
    by_shop = (str(sum(timeline.is_at(fault, shop) for fault in history.faults)) for shop in verdict.shops)
    seconds = sum(fault.until - fault.at for fault in history.faults)
    rows.append(("all", str(len(history.faults)), *by_shop, f"{seconds:.1f}"))
    yield from _table(("kind", "all", *verdict.shops, "seconds"), rows)


def _repeats(history: History, verdict: Verdict) -> Iterator[str]:
    if not verdict.explained:
        yield "None."
        return
    yield "An effect of `charge` or `ship` that happened again, as `docs/guarantees.md` says it may after such a fault."
    yield ""
    yield from _table(
        ("order", "first effect", "fault", "second effect"),
        [_repeat(history, repeat) for repeat in verdict.explained],
        numbers=False,
    )


def _repeat(history: History, repeat: Explained) -> tuple[str, ...]:
    first = repeat.first
    return (
        f"{first.order} ({first.task}, {first.shop})",
        _effect(history, first),
        "; ".join(_fault(history, fault) for fault in repeat.faults),
        _effect(history, repeat.second),
    )


def _effect(history: History, effect: Effect) -> str:
    return f"{effect.at - history.began:.3f} s, process {effect.pid}, attempt {effect.attempt}"


def _fault(history: History, fault: Fault) -> str:
    begin, end = fault.at - history.began, fault.until - history.began
    when = f"at {begin:.3f} s" if end - begin < 0.001 else f"{begin:.3f} s to {end:.3f} s"
    return f"{fault.kind} of {fault.target}, {when}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|---|{('---:|' if numbers else '---|') * (len(head) - 1)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
