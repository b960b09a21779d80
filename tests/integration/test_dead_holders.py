"""Who is dead is told by the lease and the fencing token alone, whatever became of the process that held the key."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from idem_tasks.claims import Finished, Granted, InProgress
from idem_tasks.stores.redis import RedisStore
from idem_tasks.stores.sql import SQLStore
from idem_tasks.testing.driver import Driver
from idem_tasks.testing.store_in_use import DONE, StoreInUse

LEASE = 2.0
"""Seconds: longer than it takes to see that a process has died."""

HOLDER = """
import sys
from idem_tasks.claims import process_name
from idem_tasks.stores.redis import RedisStore
from idem_tasks.stores.sql import SQLStore
from idem_tasks.testing.driver import Driver
from idem_tasks.testing.store_in_use import StoreInUse

url, scope, lease = sys.argv[1:]
with Driver("blocking") as driver:
    use = StoreInUse(RedisStore(url) if url.startswith("redis") else SQLStore(url), driver)
    use.scope = scope
    lease = use.granted(lease=float(lease), holder=process_name())
    print("holds", flush=True)
    sys.stdin.readline()
    print(type(use.finish(lease)).__name__, flush=True)
    driver(use.store.close())
"""


@pytest.fixture(params=["sqlite_url", "postgres_url", "mariadb_url", "redis_url"])
def url(request: pytest.FixtureRequest) -> str:
    found: str = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def use(url: str) -> Iterator[StoreInUse]:
    with Driver("blocking") as driver:
        store: Any = RedisStore(url) if url.startswith("redis") else SQLStore(url, create_schema=True)
        use = StoreInUse(store, driver)
        driver(use.store.prepare())
        yield use
        driver(use.store.close())


@pytest.fixture
def holder(url: str, use: StoreInUse) -> Iterator[subprocess.Popen[str]]:
    """A process on this host that holds the key, renews nothing, and finishes when it is told to."""
    command = [sys.executable, "-c", HOLDER, url, use.scope, str(LEASE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holds\n"
        yield process
        process.terminate()


def test_a_dead_process_keeps_its_key_until_its_lease_is_over(use: StoreInUse, holder: subprocess.Popen[str]) -> None:
    """That it was killed is nobody's guess: its key is in progress, then taken over, and one crash counted (F23)."""
    holder.kill()
    holder.wait(timeout=10)
    answer = use.claim()
    assert isinstance(answer, InProgress)
    assert 0 < answer.retry_after <= LEASE
    lease = use.taken_over()
    assert (lease.taken_over, lease.crashes) == (True, 1)


def test_a_living_process_keeps_nothing_beyond_its_lease(use: StoreInUse, holder: subprocess.Popen[str]) -> None:
    """Its key is taken over although it is alive and on this very host, and its late finish changes nothing (F23)."""
    lease = use.taken_over()
    assert holder.poll() is None
    use.finish(lease, DONE)
    said, _ = holder.communicate("go on\n", timeout=20)
    assert said == "Finished\n"
    found = use.claim()
    assert isinstance(found, Finished)
    assert isinstance(use.claim("another"), Granted)
