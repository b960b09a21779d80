"""What the consumers of Kafka make of how a batch ended."""

from __future__ import annotations

import logging

import pytest

from idem_tasks.errors import BatchError
from idem_tasks.integrations.kafka_handling import ends_of


def test_each_message_of_a_batch_ends_by_itself() -> None:
    """Those that have an outcome are settled as done, also where that is an exception."""
    failed, outcome = ValueError("failed"), ValueError("an outcome")
    error = BatchError(results=[1, failed, outcome], errors=[1])
    assert ends_of(error, 3, batch=True) == [None, failed, None]
    assert ends_of(None, 2, batch=True) == [None, None]
    assert ends_of(error, 1, batch=False) == [error]


def test_outcomes_of_other_messages_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """All messages have their outcomes, and are settled as done: nobody else would hear of the rest."""
    error = BatchError("outcomes for keys that none of its messages has: 'C'", results=[1, 2], surplus=["C"])
    with caplog.at_level(logging.ERROR, "idem_tasks"):
        assert ends_of(error, 2, batch=True) == [None, None]
    assert "'C'" in caplog.text
