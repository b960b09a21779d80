"""Worlds (scripted.py) in both runtimes, with records alone and with markers in front of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import pytest

from idem_tasks.stores.base import RuntimeName
from tests.unit.scripted import World, world_on


@pytest.fixture(params=["blocking", "asyncio"])
def runtime(request: pytest.FixtureRequest) -> RuntimeName:
    return cast(RuntimeName, request.param)


@pytest.fixture(params=[1, 2], ids=["memory", "tiered"])
def tiers(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, runtime: RuntimeName, tiers: int) -> Iterator[World]:
    with world_on(monkeypatch, runtime, tiers) as world:
        yield world


@pytest.fixture
def tiered(monkeypatch: pytest.MonkeyPatch, runtime: RuntimeName) -> Iterator[World]:
    with world_on(monkeypatch, runtime, 2) as world:
        yield world
