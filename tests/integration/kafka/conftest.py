"""A topic and an `Idempotency` for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from idem_tasks import Idempotency
from tests.integration.kafka.topics import Topic


@pytest.fixture
def topic(kafka_bootstrap: str, unique_name: str) -> Iterator[Topic]:
    topic = Topic(kafka_bootstrap, unique_name)
    yield topic
    topic.close()


@pytest.fixture
def idem(sqlite_url: str) -> Iterator[Idempotency]:
    with Idempotency.from_urls(database_url=sqlite_url) as idem:
        yield idem
