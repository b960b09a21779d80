"""The benchmarks run, and their table says what was found; how long anything takes is no matter here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks import plots, table
from benchmarks.case import Case
from benchmarks.counting import Count, count
from benchmarks.measuring import Absent, Effort, Here, Measured, Times, Way, measure
from benchmarks.place import Place
from benchmarks.rows import Row, rows_of
from benchmarks.run import all_cases, chosen

SHORT = Effort(seconds=0.0, turns=2)
HERE_ALONE = [case for case in all_cases() if not case.needs]


def way(name: str, done: list[str]) -> Here:
    def do() -> None:
        done.append(name)

    return Here(do)


def test_ways_take_turns() -> None:
    """After a warm-up the ways are done A B A B, in turns of the same length."""
    done: list[str] = []
    measured = measure({"a": way("a", done), "b": way("b", done)}, SHORT, turn=2)
    assert "".join(done[-8:]) == "aabbaabb"
    assert [len(each.all) for each in measured.values()] == [4, 4]
    assert [len(each.turns) for each in measured.values()] == [2, 2]


def test_what_comes_before_a_call_is_done_before_each() -> None:
    """`before` is done once for each call."""
    done: list[str] = []

    def before() -> None:
        done.append("before")

    def do() -> None:
        done.append("do")

    taken = Here(do, before).take(2)
    assert done == ["before", "do"] * 2
    assert len(taken.elapsed) == len(taken.cpu) == 2


def test_a_ratio_is_that_of_turns_side_by_side() -> None:
    """A machine that is slow for a while makes both ways slow, and leaves their ratio as it is."""
    ours, floor = Measured(turns=[2.0, 20.0, 2.0]), Measured(turns=[1.0, 10.0, 1.0])
    assert ours.ratio_to(floor) == 2.0


def test_calls_of_one_turn_share_its_time() -> None:
    """What holds many calls is divided by their number."""

    class Slow:
        def take(self, times: int) -> Times:
            return Times([10.0] * times, [5.0] * times)

    measured = measure({"a": Slow()}, SHORT, turn=1, calls=1000)["a"]
    assert (measured.median, measured.mean_cpu) == (0.01, 0.005)


@pytest.mark.parametrize("case", HERE_ALONE, ids=lambda case: f"{case.group}, {case.name}")
def test_cases_without_a_server_run(case: Case, tmp_path: Path) -> None:
    """Each has a floor, whose ratio is 1, and figures for every way."""
    rows = rows_of(case, Place(tmp_path), SHORT)
    assert {row.way for row in rows} >= {"ours", case.floor}
    assert [row.ratio for row in rows if row.way == case.floor] == [1.0]
    assert all(row.median and row.ratio and not row.absent for row in rows)


def test_what_no_server_hears_counts_nothing(tmp_path: Path) -> None:
    """In memory there are no round trips and no commits."""
    counts = count(HERE_ALONE[0], Place(tmp_path))
    assert counts["ours"] == Count(redis=0, sql=0, commits=0)


def test_a_server_that_is_not_there_is_a_row_that_says_so(tmp_path: Path) -> None:
    """Nothing is estimated."""
    case = next(case for case in all_cases() if case.needs == ("redis", "postgres"))
    [row] = rows_of(case, Place(tmp_path), SHORT)
    assert row.absent == "this machine has no redis and no postgres"
    assert row.median is None


def test_a_way_that_cannot_be_measured_is_a_row_that_says_so(tmp_path: Path) -> None:
    """A peer that cannot be installed keeps nobody else from being measured."""

    @contextmanager
    def make(_place: Place) -> Iterator[dict[str, Way | Absent]]:
        yield {"by hand": way("by hand", []), "theirs": Absent("cannot be installed")}

    rows = rows_of(Case("Group", "case", make), Place(tmp_path), SHORT)
    assert [(row.way, row.absent) for row in rows] == [("by hand", ""), ("theirs", "cannot be installed")]


def test_cases_are_known_apart() -> None:
    """No two cases have one name, those of a group stand together, and the quick run leaves out the largest."""
    cases = all_cases()
    assert len({(case.group, case.name) for case in cases}) == len(cases)
    groups = [case.group for case in cases]
    assert sorted(range(len(groups)), key=lambda at: groups.index(groups[at])) == list(range(len(groups)))
    quick = chosen(cases, quick=True, only="")
    assert 0 < len(quick) < len(cases)
    assert {case.name for case in chosen(cases, quick=False, only="beat of")} == {
        "1 claim",
        "100 claims",
        "10,000 claims",
    }


def test_the_table_and_its_pictures(tmp_path: Path) -> None:
    """Every row has a cell for each column, and what is not known is a dash."""
    rows = [
        Row("First call", "SQLite", "ours", median=100e-6, p99=2e-3, ratio=2.0, cpu=90e-6),
        Row("First call", "SQLite", "by hand", median=50e-6, p99=1e-3, ratio=1.0, count=Count(2.0, 0.02, None)),
        Row("Peers", "first call", "theirs", absent="cannot be installed"),
    ]
    text = table.document(rows, {"record": 250.0}, {"machine": "a small one"}, quick=True)
    assert "| SQLite | ours | 100 | 2,000 | 2.00 | 10,000 | 90.0 | - | - | - |" in text
    assert "| SQLite | by hand | 50.0 | 1,000 | 1.00 | 20,000 | - | 2 | 0.02 | - |" in text
    assert {table.line(row).count(" |") for row in rows} == {table.HEAD.count(" |")}
    assert "| record | 250 | 238 |" in text
    assert [file.name for file in plots.draw(rows, tmp_path)] == ["latency.png"]
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")
