"""The report of a run of chaos says what the verdict says, and shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import report
from tests.chaos.history import FAULT_KINDS, History
from tests.chaos.made import OTHER_SHOP, SHOP, Made, Order
from tests.chaos.timeline import draw
from tests.chaos.verdict import judge

PNG = b"\x89PNG\r\n\x1a\n"


def eventful() -> Made:
    """One order of each kind that the documents allow."""
    made = Made()
    for number, tell in enumerate(["once", "killed", "paused", "cut_off", "unrenewed", "in_doubt"]):
        order = Order(made, f"{number:05d}", "pay" if tell == "in_doubt" else "charge")
        order.publish(10.0 * number)
        if tell == "once":
            order.complete(1.0)
        else:
            getattr(order, tell)(10.0 * number + 1.0)
    elsewhere = Order(made, "00000", "pay", OTHER_SHOP)
    elsewhere.publish()
    elsewhere.complete(2.0)
    return made


def written(history: History, folder: Path) -> str:
    return report.write(history, judge(history), folder).read_text()


def cells(text: str, heading: str) -> dict[str, list[str]]:
    """The table under a heading: the cells of each row, by its first."""
    section = text.split(f"## {heading}\n")[1].split("\n## ", maxsplit=1)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows}


def test_numbers(tmp_path: Path) -> None:
    """Every total of the verdict is in the table, for all shops and for each."""
    history = eventful().history()
    verdict = judge(history)
    assert verdict.good, verdict.problems
    shown = cells(written(history, tmp_path), "Totals")
    assert shown.pop("") == ["all", SHOP, OTHER_SHOP]
    shown.pop("---")
    columns = [verdict.totals(), verdict.totals(SHOP), verdict.totals(OTHER_SHOP)]
    assert shown == {name: [str(column.get(name, 0)) for column in columns] for name in verdict.totals()}
    assert shown["orders"] == ["7", "6", "1"]
    assert shown["explained repeats"] == ["4", "4", "0"]


def test_facts(tmp_path: Path) -> None:
    """It says by which seed and for how long to do it again, and nothing of the machine."""
    text = written(eventful().history(), tmp_path)
    assert text.startswith("# Chaos, seed 7: every promise was kept\n")
    for fact in (
        "- seed: 7",
        "- seconds of faults: 60",
        "- seconds until everything was settled: 100.0",
        "- lease: 2 s",
    ):
        assert fact in text.splitlines()
    assert str(tmp_path) not in text


def test_faults(tmp_path: Path) -> None:
    """Every kind of fault has a row, also one that did not happen."""
    history = eventful().history()
    shown = cells(written(history, tmp_path), "Faults")
    assert [kind for kind in shown if kind in FAULT_KINDS] == list(FAULT_KINDS)
    assert shown["worker_paused"] == ["1", "1", "0", "2.9"]
    assert shown["sentinel_failover"] == ["0", "0", "0", "0.0"]
    assert shown["all"][0] == str(len(history.faults))


def test_repeats(tmp_path: Path) -> None:
    """Each explained repeat is told with its order, both effects and the faults between them."""
    history = eventful().history()
    text = written(history, tmp_path)
    for repeat in judge(history).explained:
        [line] = [line for line in text.splitlines() if line.startswith(f"| {repeat.first.order} ")]
        for effect in (repeat.first, repeat.second):
            assert f"{effect.at - history.began:.3f} s, process {effect.pid}" in line
        for fault in repeat.faults:
            assert f"{fault.kind} of {fault.target}" in line


def test_problems(tmp_path: Path) -> None:
    """Every broken promise is told in a sentence, and the first line says that there are some."""
    made = eventful()
    made.faults.clear()
    made.left[OTHER_SHOP] = 3
    history = made.history()
    text = written(history, tmp_path)
    verdict = judge(history)
    assert len(verdict.problems) > 4
    assert text.startswith("# Chaos, seed 7: promises were broken\n")
    assert [line[2:] for line in text.split("## Broken promises\n")[1].split("## ")[0].strip().splitlines()] == list(
        verdict.problems
    )


def test_picture(tmp_path: Path) -> None:
    """The report shows the picture, which lies beside it and is not empty."""
    text = written(eventful().history(), tmp_path)
    assert f"]({report.PICTURE})" in text
    picture = (tmp_path / report.PICTURE).read_bytes()
    assert picture.startswith(PNG)
    assert len(picture) > 20_000


def test_same_bytes(tmp_path: Path) -> None:
    """The same history makes the same report and the same picture."""
    made = eventful()
    for name in ("first", "second"):
        written(made.history(), tmp_path / name)
    for name in (report.REPORT, report.PICTURE):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


@pytest.mark.parametrize("left_out", ["faults", "effects", "answered", "started"])
def test_all_is_drawn(left_out: str, tmp_path: Path) -> None:
    """Faults, effects, outcomes and what came of them can each be seen in the picture."""
    history = eventful().history()
    verdict = judge(history)
    without = eventful().history(**{left_out: ()})
    draw(history, verdict, tmp_path / "all.png")
    draw(without, verdict, tmp_path / "less.png")
    assert (tmp_path / "all.png").read_bytes() != (tmp_path / "less.png").read_bytes()


def test_nothing_happened(tmp_path: Path) -> None:
    """A run in which nothing happened can be told and drawn too."""
    text = written(Made().history(), tmp_path)
    assert cells(text, "Totals")["orders"] == ["0", "0", "0"]
    assert (tmp_path / report.PICTURE).read_bytes().startswith(PNG)
