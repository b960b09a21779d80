"""`configure` makes the process-wide default, from its arguments or the environment."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from idem_tasks import Idempotency, MemoryStore, Policy, config, configure
from idem_tasks.errors import ConfigurationError


@pytest.fixture(autouse=True)
def unconfigured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing configured, nothing in the environment, an empty working directory."""
    monkeypatch.setattr(config, "_default", None)
    monkeypatch.delenv("IDEM_TASKS_DATABASE_URL", raising=False)
    monkeypatch.delenv("IDEM_TASKS_REDIS_URL", raising=False)
    monkeypatch.chdir(tmp_path)


def kind(idempotency: Idempotency) -> str:
    return type(idempotency.store).__name__


def test_without_anything_it_is_a_file_in_the_working_directory(tmp_path: Path) -> None:
    """SQLite, made at the first use and not before."""
    default = config.default_idempotency()
    assert kind(default) == "SQLStore"
    assert list(tmp_path.iterdir()) == []
    assert default.run(str, "a", scope="s", key="A-1") == "a"
    default.close()
    assert (tmp_path / "idem_tasks.db").exists()


def test_configure_makes_the_default() -> None:
    """The next one replaces it."""
    first = configure(store=MemoryStore())
    assert config.default_idempotency() is first
    second = configure(store=MemoryStore(), policy=Policy(lease=10), max_hold=20, observers=[])
    assert config.default_idempotency() is second
    assert second.policy == Policy(lease=10, max_hold=20)


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """One URL, the other, or both; an empty one is none; an argument stands over both."""
    monkeypatch.setenv("IDEM_TASKS_REDIS_URL", "redis://localhost:1/0")
    assert kind(configure()) == "RedisStore"
    monkeypatch.setenv("IDEM_TASKS_DATABASE_URL", "sqlite://")
    assert kind(configure()) == "TieredStore"
    assert kind(configure(database_url="sqlite://")) == "SQLStore"
    monkeypatch.setenv("IDEM_TASKS_REDIS_URL", "")
    assert kind(configure()) == "SQLStore"


def test_a_wrong_environment_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first use, without a default that hides it."""
    monkeypatch.setenv("IDEM_TASKS_DATABASE_URL", "oracle://x")
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="must begin with"):
            config.default_idempotency()


@pytest.mark.parametrize("extra", [{"database_url": "sqlite://"}, {"redis_url": "redis://x"}, {"create_schema": True}])
def test_a_store_or_urls(extra: dict[str, Any]) -> None:
    """Both is a contradiction."""
    with pytest.raises(ConfigurationError, match="not both"):
        configure(store=MemoryStore(), **extra)


def test_a_wrong_field_changes_nothing() -> None:
    """A `configure` that fails leaves the default as it was."""
    first = configure(store=MemoryStore())
    with pytest.raises(ConfigurationError):
        configure(store=MemoryStore(), lease=-1)
    assert config.default_idempotency() is first


def test_threads_that_race_the_default_get_one() -> None:
    """Two defaults would be two SQLite engines, two heartbeats."""
    barrier = threading.Barrier(16)

    def use(_: int) -> int:
        barrier.wait(30)
        return id(config.default_idempotency())

    with ThreadPoolExecutor(16) as threads:
        assert len(set(threads.map(use, range(16)))) == 1
