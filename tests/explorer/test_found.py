"""What explorations of the shipped protocol found, each with the scenario that shows it."""

from __future__ import annotations

import pytest

from idem_tasks.policy import OnCrash
from idem_tasks.testing.explorer.scenario import Scenario, policy
from idem_tasks.testing.explorer.search import explore
from tests.explorer.finds import assert_no_find


@pytest.mark.parametrize("on_crash", ["rerun", "hold"])
def test_a_grant_that_came_late_is_not_left_behind_another_marker(on_crash: OnCrash) -> None:
    """Whoever asks again after a late grant, and meets another's marker, gives back what it was granted (F33)."""
    scenario = Scenario(name="a late grant", policy=policy(on_crash), faults={"lease over": 1})
    explored = explore(scenario, seconds=20)
    assert_no_find(explored)
    assert explored.complete
