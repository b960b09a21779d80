"""Endurance in short: a few hundred messages, and consumers that are killed; `tests.consumers.run` is the long form."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.consumers import brokers
from tests.consumers.endurance import endure
from tests.consumers.plan import Plan


@pytest.mark.timeout(240)  # a Kafka group takes its time to find together again after each kill
@pytest.mark.parametrize("broker", brokers.names())
def test_every_effect_happens_once_though_consumers_are_killed(
    broker: str, request: pytest.FixtureRequest, postgres_url: str, redis_url: str, unique_name: str, tmp_path: Path
) -> None:
    """Each message has one effect or is a dead letter, and none is left, whoever is killed with SIGKILL (F14, F31)."""
    plan = Plan(
        broker=broker,
        url=request.getfixturevalue(brokers.module(broker).FIXTURE),
        name=unique_name,
        database_url=postgres_url,
        redis_url=redis_url,
        folder=str(tmp_path),
        **{"messages": 200, "kill_every": 1.5, **brokers.pace(broker)},
    )
    verdict = endure(plan)
    assert verdict.good, verdict
    assert verdict.kills > 0
