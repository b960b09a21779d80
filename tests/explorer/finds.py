"""What a test says when an exploration found something: the words of the find, and nothing around them."""

from __future__ import annotations

import pytest

from idem_tasks.testing.explorer.search import Explored


def assert_no_find(explored: Explored, note: str = "") -> None:
    """Fail with the find in words, if there is one; `note` goes before them."""
    if explored.find is not None:
        pytest.fail(f"{note}{explored.find}", pytrace=False)
