"""A worker process that is killed in the midst of a batch, on each store, and the batch that is delivered again."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from idem_tasks import BatchError, Idempotency, InDoubtError, InProgressError, Policy
from tests.services.waiting import wait_until

LEASE = 2.0
"""Seconds that a dead worker keeps its keys; a claim that is granted after that long begins no handler."""

KEYS = ["c", "a", "d", "b"]

WORKER = """
import os, signal, sys
from idem_tasks import Idempotency, Policy
from idem_tasks.stores.sql import SQLStore
from idem_tasks.stores.redis import RedisStore
from idem_tasks.stores.tiered import TieredStore

database_url, redis_url, effects, place, on_crash, lease = sys.argv[1:]

def die_at(here):
    if here == place:
        os.kill(os.getpid(), signal.SIGKILL)

def ship(keys):
    for key in keys:
        if key == "d":
            die_at("in the handler")
        with open(effects, "a") as file:
            file.write(key + "\\n")
    return ["shipped " + key for key in keys]

finish_batch = (TieredStore if redis_url else SQLStore).finish_batch

async def killed_around(self, finished):
    die_at("before the record")
    answers = await finish_batch(self, finished)
    die_at("after the record")
    return answers

(TieredStore if redis_url else SQLStore).finish_batch = killed_around

idem = Idempotency.from_urls(database_url=database_url, redis_url=redis_url or None, observers=[])
idem.get("ship", "connect before the leases begin")
policy = Policy(lease=float(lease), on_crash=on_crash)
idem.run_batch(ship, ["c", "a", "d", "b"], scope="ship", key="{message}", policy=policy)
"""


@pytest.fixture(params=["sqlite", "mariadb", "postgres and redis"])
def urls(request: pytest.FixtureRequest) -> tuple[str, str | None]:
    """The database, made ready, and Redis in front of it or not."""
    database = request.getfixturevalue(f"{request.param.split()[0]}_url")
    redis_url = request.getfixturevalue("redis_url") if "redis" in request.param else None
    with Idempotency.from_urls(database_url=database, create_schema=True, observers=[]) as idem:
        idem.prepare()
    return database, redis_url


@pytest.fixture
def effects(tmp_path: Path) -> Path:
    file = tmp_path / "effects"
    file.touch()
    return file


def kill_at(place: str, urls: tuple[str, str | None], effects: Path, on_crash: str = "rerun") -> None:
    """Let a worker process handle the batch until it is killed at this place."""
    command = [sys.executable, "-c", WORKER, urls[0], urls[1] or "", str(effects), place, on_crash, str(LEASE)]
    with subprocess.Popen(command) as worker:
        assert worker.wait(60) == -signal.SIGKILL


def deliver(urls: tuple[str, str | None], effects: Path, on_crash: Any = "rerun") -> list[Any]:
    """Deliver the batch again, until none of it is in progress any more; returns what each message has."""

    def ship(keys: list[str]) -> list[str]:
        with effects.open("a") as file:
            file.writelines(f"{key}\n" for key in keys)
        return [f"shipped {key} again" for key in keys]

    results: list[Any] = []
    with Idempotency.from_urls(database_url=urls[0], redis_url=urls[1], observers=[]) as idem:
        idem.get("ship", "connect before the leases begin")

        def delivered() -> bool:
            try:
                results[:] = idem.run_batch(
                    ship, KEYS, scope="ship", key="{message}", policy=Policy(lease=LEASE, on_crash=on_crash)
                )
            except BatchError as error:
                results[:] = error.results
            return not any(isinstance(result, InProgressError) for result in results)

        wait_until(delivered, seconds=30, what="the leases of the dead worker to be over")
    return results


@pytest.mark.parametrize(
    "place, again",
    [("in the handler", Counter("cadbca")), ("before the record", Counter("cadb" * 2)), ("after the record", None)],
)
def test_a_killed_batch_runs_again_unless_it_is_recorded(
    urls: tuple[str, str | None], effects: Path, place: str, again: Counter[str] | None
) -> None:
    """At least once for each message (F1); once all are recorded, everybody gets those outcomes and nothing runs."""
    kill_at(place, urls, effects)
    word = "" if again is None else " again"
    for _ in range(2):
        assert deliver(urls, effects) == [f"shipped {key}{word}" for key in KEYS]
    assert Counter(effects.read_text().split()) == (again or Counter("cadb"))


def test_under_hold_no_message_of_a_killed_batch_runs_again(urls: tuple[str, str | None], effects: Path) -> None:
    """At most once: nobody knows which of them were done, so each waits for a person (F15)."""
    kill_at("in the handler", urls, effects, "hold")
    assert {type(result) for result in deliver(urls, effects, "hold")} == {InDoubtError}
    assert effects.read_text().split() == ["c", "a"]


def test_two_batches_of_the_same_keys_never_wait_for_each_other(urls: tuple[str, str | None]) -> None:
    """In opposite order, from two threads, with a key twice in each: no deadlock, and each key runs once (F66)."""
    effects: list[str] = []
    failed: list[Any] = []

    def ship(keys: list[str]) -> list[str]:
        effects.extend(keys)
        return keys

    with Idempotency.from_urls(database_url=urls[0], redis_url=urls[1], observers=[]) as idem:

        def work(order: Callable[[list[str]], list[str]]) -> None:
            for number in range(8):
                keys = order([f"{number}-{each:02}" for each in range(12)])
                for _ in range(500):
                    try:
                        assert idem.run_batch(ship, [*keys, keys[0]], scope="both", key=str) == [*keys, keys[0]]
                    except BatchError as error:
                        others = {type(error.results[place]) for place in error.errors}
                        if others == {InProgressError}:
                            continue
                        failed.append(error.results)
                    break

        threads = [threading.Thread(target=work, args=(order,)) for order in (sorted, lambda keys: keys[::-1])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert failed == []
    assert sorted(effects) == sorted(f"{number}-{each:02}" for number in range(8) for each in range(12))
