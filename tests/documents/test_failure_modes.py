"""The page of failure modes tells what the tests prove, no more and no less."""

from tests.documents.failure_modes import PAGE, not_built_any_more, page
from tests.documents.modes import FEATURES, LAST, MODES
from tests.documents.proofs import proofs


def test_the_page_is_what_the_tests_say() -> None:
    """It was written after the last test that names a mode was added, changed or taken away."""
    assert PAGE.read_text() == page(), "write it anew: python -m tests.documents.failure_modes"


def test_every_mode_is_there_once() -> None:
    """Numbers have no gaps, and a test names none that does not exist."""
    assert list(MODES) == sorted(MODES) == [*range(1, LAST + 1)]
    assert {number for test in proofs() for number in test.numbers} <= set(MODES)


def test_a_mode_without_a_test_is_not_built() -> None:
    """What is prevented here is proved here; the others say what they wait for."""
    tested = {number for test in proofs() for number in test.numbers}
    assert [mode.name for mode in MODES.values() if mode.number not in tested and not mode.lacks] == []


def test_what_is_called_missing_is_missing() -> None:
    """A feature that was built is not called missing any more, and none is listed that no mode waits for."""
    assert not_built_any_more() == []
    assert set(FEATURES) == {feature for mode in MODES.values() for feature in mode.lacks}
