"""The states on the guarantees page are those of the code."""

from tests.documents.states import PAGE, page


def test_the_page_draws_what_a_store_does() -> None:
    """It was drawn after the last change of what a verb makes of a state."""
    assert PAGE.read_text() == page(), "draw it anew: python -m tests.documents.states"
