"""The explorer is itself tested: it finds what is wrong with a protocol that was broken on purpose."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from idem_tasks.testing.explorer.search import explore, explore_at_random
from tests.explorer.finds import assert_no_find
from tests.explorer.mutant import Mutant
from tests.explorer.mutant_run import run
from tests.explorer.mutant_scenarios import SCENARIOS
from tests.explorer.mutants import MUTANTS

_EXPLORED = list(dict.fromkeys((mutant.scenario, mutant.seed) for mutant in MUTANTS))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_change_fits_what_is_shipped(mutant: Mutant) -> None:
    """None has lost its place in the source, which would be noticed only where all of them are tried."""
    origin = importlib.util.find_spec(mutant.module)
    assert origin is not None
    assert origin.origin is not None
    shipped = Path(origin.origin).read_text(encoding="utf-8")
    assert mutant.broken(shipped) != shipped


@pytest.mark.large
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_broken_protocol_breaks_a_law(mutant: Mutant, record_property: Callable[[str, object], None]) -> None:
    """A protocol that is broken in one place is caught by the law that is meant for it, in seconds."""
    report = run(mutant.name)
    sys.stdout.write(str(report))
    record_property("mutant", mutant.name)
    record_property("law", report.law)
    record_property("states", report.states)
    record_property("trace_lines", len(report.trace.splitlines()))
    assert report.diff, "the library was not broken"
    assert report.law in mutant.laws
    assert report.ran, "the law was broken elsewhere: what was changed did not run"


@pytest.mark.parametrize("name, seed", _EXPLORED, ids=lambda part: "all of it" if part is None else str(part))
def test_the_shipped_protocol_breaks_no_law_where_the_broken_ones_do(name: str, seed: int | None) -> None:
    """Where a broken protocol is caught, the shipped one is not: the laws ask for no more than is promised."""
    if seed is None:
        explored = explore(SCENARIOS[name], seconds=2)
    else:
        explored = explore_at_random(SCENARIOS[name], seed, executions=1000, seconds=2)
    assert_no_find(explored)


@pytest.mark.parametrize("text", ["stands nowhere in it", "return "])
def test_a_change_that_does_not_fit_is_refused(text: str) -> None:
    """A mutant whose text is gone from the shipped source, or stands there twice, fails with its name and that text."""
    mutant = Mutant(name="does not fit", module="m", before=text, after="", laws=(), scenario="")
    with pytest.raises(ValueError, match=f"does not fit: in m this stands . times instead of once:\n{text}"):
        mutant.broken("return 1\nreturn 2\n")
