"""A cache in the process, on real servers: what it costs them, and what is given up for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from typing import Any

import pytest

from idem_tasks import Idempotency, RedisStore, SQLStore, TieredStore
from idem_tasks.events import Announcer
from idem_tasks.runtime import run_sync
from idem_tasks.stores.base import RuntimeName, Store
from idem_tasks.testing import Driver
from tests.integration.sql_proxy import Proxy

SCOPE = "shop.charge"

Opened = Callable[..., AbstractContextManager["Shop"]]


class Shop:
    """Charges through a cache; `round_trips` are those to all servers."""

    def __init__(self, driver: Driver, store: Store, proxies: list[Proxy], **options: Any) -> None:
        self.driver = driver
        self.idem = Idempotency(store=store, observers=[], **{"local_cache": 100, **options})
        self.effects: list[str] = []
        self._proxies = proxies

    @property
    def round_trips(self) -> int:
        return sum(proxy.round_trips for proxy in self._proxies)

    def ended(self, awaitable: Any) -> Any:
        async def end() -> Any:
            return await awaitable

        return self.driver(end()) if inspect.isawaitable(awaitable) else awaitable

    def charge(self, order: str) -> Any:
        def charge(order: str) -> str:
            self.effects.append(order)
            return f"charged {order}"

        async def acharge(order: str) -> str:
            return charge(order)

        if self.driver.runtime == "blocking":
            return self.idem.run(charge, order, scope=SCOPE, key=order)
        return self.ended(self.idem.arun(acharge, order, scope=SCOPE, key=order))

    def charge_all(self, *orders: str) -> Any:
        def charge(new: list[str]) -> list[str]:
            self.effects.extend(new)
            return [f"charged {order}" for order in new]

        async def acharge(new: list[str]) -> list[str]:
            return charge(new)

        if self.driver.runtime == "blocking":
            return self.idem.run_batch(charge, orders, scope=SCOPE, key="{message}", fingerprint=None)
        return self.ended(self.idem.arun_batch(acharge, orders, scope=SCOPE, key="{message}", fingerprint=None))

    def forget(self, order: str) -> bool:
        if self.driver.runtime == "blocking":
            return self.idem.forget(SCOPE, order)
        return bool(self.ended(self.idem.aforget(SCOPE, order)))

    def close(self) -> None:
        if self.driver.runtime == "blocking":
            self.idem.close()
        else:
            self.ended(self.idem.aclose())


@pytest.fixture(params=["blocking", "asyncio"])
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    runtime: RuntimeName = request.param
    with Driver(runtime) as driver:
        yield driver


@pytest.fixture(params=["postgresql", "redis", "redis and postgresql"])
def opened(request: pytest.FixtureRequest, driver: Driver) -> Opened:
    """Open a shop on these servers, each behind a proxy that counts."""
    names = {"postgresql": "postgres_url", "redis": "redis_url"}
    urls = [request.getfixturevalue(fixture) for name, fixture in names.items() if name in request.param]

    @contextmanager
    def opened(**options: Any) -> Iterator[Shop]:
        with ExitStack() as proxied:
            proxies = [proxied.enter_context(Proxy(url)) for url in urls]
            tiers: list[Any] = [
                RedisStore(proxy.url) if proxy.url.startswith("redis") else SQLStore(proxy.url, create_schema=True)
                for proxy in proxies
            ]
            store = TieredStore(tiers[1], tiers[0]) if len(tiers) == 2 else tiers[0]
            with closing(Shop(driver, store, proxies, **options)) as shop:
                yield shop

    return opened


def test_a_duplicate_of_what_is_known_here_is_no_round_trip(opened: Opened) -> None:
    """Neither one that this process has recorded nor one that it has replayed; without a cache it is one at least."""
    with opened() as shop:
        for _ in range(3):
            assert shop.charge("A-1") == "charged A-1"
        with opened() as other:
            other.charge("A-1")
            sums = shop.round_trips, other.round_trips
            assert shop.charge("A-1") == other.charge("A-1") == "charged A-1"
            assert (shop.round_trips, other.round_trips) == sums
    with opened(local_cache=0) as without:
        without.charge("A-1")
        before = without.round_trips
        without.charge("A-1")
        assert without.round_trips > before
    assert shop.effects == ["A-1"]
    assert other.effects == without.effects == []


def test_a_batch_of_what_is_known_here_is_no_round_trip(opened: Opened) -> None:
    """And a batch with something new costs what that costs."""
    with opened() as shop:
        charged = [f"charged {order}" for order in ("A-1", "A-2", "A-3")]
        assert shop.charge_all("A-1", "A-2", "A-3") == charged
        before = shop.round_trips
        assert shop.charge_all("A-3", "A-2", "A-1") == charged[::-1]
        assert shop.charge("A-2") == "charged A-2"
        assert shop.round_trips == before
        assert shop.charge_all("A-1", "A-4") == ["charged A-1", "charged A-4"]
        assert shop.effects == ["A-1", "A-2", "A-3", "A-4"]


def test_what_is_forgotten_elsewhere_is_answered_for_its_time(opened: Opened) -> None:
    """What is given up, and that it ends: with the time of the cache, or by forgetting it here too."""
    with opened() as shop, opened(local_cache_ttl=0.5) as brief:
        assert shop.charge("A-1") == brief.charge("A-1") == "charged A-1"
        elsewhere = shop.idem.store.on("blocking", Announcer(()))
        assert run_sync(elsewhere.forget(SCOPE, "A-1"))
        run_sync(elsewhere.close())
        assert shop.charge("A-1") == "charged A-1"
        shop.driver.pause(0.6)
        assert brief.charge("A-1") == "charged A-1"
        assert brief.effects == ["A-1"]
        assert shop.forget("A-1")
        assert shop.charge("A-1") == "charged A-1"
        assert shop.effects == ["A-1", "A-1"]
