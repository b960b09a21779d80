"""The faults of a run can be had again by its seed."""

from itertools import islice

import pytest

from tests.chaos.history import FAULT_KINDS
from tests.chaos.plan import DECK, planned


def test_a_seed_gives_the_same_faults() -> None:
    """The same seed, the same faults in the same order; another seed, others."""
    assert list(islice(planned(7), 100)) == list(islice(planned(7), 100))
    assert list(islice(planned(7), 100)) != list(islice(planned(8), 100))


def test_every_kind_comes_before_any_place_is_struck_twice() -> None:
    """A run of one deck has met every kind of fault."""
    assert {fault.kind for fault in islice(planned(7), len(DECK))} == set(FAULT_KINDS)


def test_only_the_kinds_that_are_asked_for() -> None:
    """A run can be of kills alone; a kind that does not exist is an error."""
    assert {fault.kind for fault in islice(planned(7, ["child_killed"]), 50)} == {"child_killed"}
    with pytest.raises(ValueError, match="no fault is of these kinds: nothing"):
        next(planned(7, ["nothing"]))
