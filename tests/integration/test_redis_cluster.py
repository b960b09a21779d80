"""The whole story with markers in a Redis Cluster: keys of every node, batches over slots, a node that dies."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from redis import Redis

from idem_tasks import Idempotency, InProgressError, idempotent_task
from idem_tasks.events import Event, EventName
from tests.integration.sql_proxy import Proxy
from tests.services.redis_server import RedisCluster, RedisServer
from tests.services.waiting import wait_until

ORDERS = [f"A-{number}" for number in range(40)]
"""Enough to meet every node."""

CALLERS = 8


class Shop:
    """A handler over records in PostgreSQL, behind a proxy that counts, and markers in a cluster."""

    def __init__(self, cluster: RedisCluster, database_url: str) -> None:
        self.cluster = cluster
        self.sold: list[str] = []
        self.events: list[EventName] = []
        self.idempotency = Idempotency.from_urls(
            database_url=database_url, redis_url=cluster.cluster_url, observers=[self._heard]
        )
        self.sell = idempotent_task(key="{order}", scope="sell", idempotency=self.idempotency)(self._sell)

    def _heard(self, event: Event) -> None:
        self.events.append(event.name)

    def _sell(self, order: str) -> str:
        self.sold.append(order)
        return f"sold {order}"

    def sell_all(self) -> None:
        for order in ORDERS:
            assert self.sell(order) == f"sold {order}"

    def markers_of(self, node: RedisServer) -> list[str]:
        with node.client() as client:
            return [str(key) for key in client.keys("*")]


@pytest.fixture
def proxy(postgres_tables_url: str) -> Iterator[Proxy]:
    with Proxy(postgres_tables_url) as proxy:
        yield proxy


@pytest.fixture
def shop(redis_cluster: RedisCluster, proxy: Proxy) -> Iterator[Shop]:
    shop = Shop(redis_cluster, proxy.url)
    yield shop
    shop.idempotency.close()


def test_duplicates_are_answered_by_their_keys_node(shop: Shop, proxy: Proxy) -> None:
    """Each key runs once, its marker is on one node, and no duplicate comes to the database."""
    shop.sell_all()
    before = proxy.round_trips
    shop.sell_all()
    assert proxy.round_trips == before
    assert shop.sold == ORDERS
    markers = [shop.markers_of(node) for node in shop.cluster.nodes]
    assert all(markers)
    assert sum(map(len, markers)) == len(ORDERS)


def test_one_of_many_at_once_runs(shop: Shop) -> None:
    """Whoever takes the marker runs; the others are told that it is in progress, or get its outcome."""
    with ThreadPoolExecutor(CALLERS) as callers:

        def call(order: str) -> object:
            try:
                return shop.sell(order)
            except InProgressError:
                return None

        for order in ORDERS:
            answers = set(callers.map(call, [order] * CALLERS))
            assert f"sold {order}" in answers
            assert answers <= {f"sold {order}", None}
    assert shop.sold == ORDERS


def test_a_batch_over_all_slots(shop: Shop, proxy: Proxy) -> None:
    """One handler gets what is new of all nodes; the rest is answered, and then all of it is."""
    first = ORDERS[::2]
    for order in first:
        shop.sell(order)

    def sell_all(orders: list[str]) -> list[str]:
        shop.sold += orders
        return [f"sold {order}" for order in orders]

    def batch() -> list[Any]:
        return shop.idempotency.run_batch(sell_all, ORDERS, scope="sell", key="{message}", fingerprint=None)

    assert batch() == [f"sold {order}" for order in ORDERS]
    assert sorted(shop.sold) == sorted(ORDERS)
    before = proxy.round_trips
    assert batch() == [f"sold {order}" for order in ORDERS]
    assert proxy.round_trips == before
    assert len(shop.sold) == len(ORDERS)


def test_coroutines_share_the_cluster(shop: Shop, proxy: Proxy) -> None:
    """Markers of blocking calls answer coroutines, and the other way round."""
    half = len(ORDERS) // 2
    for order in ORDERS[:half]:
        shop.sell(order)

    async def main() -> None:
        @idempotent_task(key="{order}", scope="sell", idempotency=shop.idempotency)
        async def sell(order: str) -> str:
            return shop._sell(order)

        assert await asyncio.gather(*map(sell, ORDERS)) == [f"sold {order}" for order in ORDERS]
        await shop.idempotency.aclose()

    asyncio.run(main())
    before = proxy.round_trips
    shop.sell_all()
    assert proxy.round_trips == before
    assert sorted(shop.sold) == sorted(ORDERS)


def test_a_node_dies_and_its_replica_takes_over(private_redis_cluster: RedisCluster, proxy: Proxy) -> None:
    """Until it is replaced SQL decides; the replica has its markers, and they answer. Nothing runs twice."""
    dying = private_redis_cluster.nodes[1]
    replica = private_redis_cluster.add_replica(dying)
    shop = Shop(private_redis_cluster, proxy.url)

    def are_answered_by_markers() -> bool:
        before = proxy.round_trips
        shop.sell_all()
        return proxy.round_trips == before

    try:
        shop.sell_all()
        markers = set(shop.markers_of(dying))
        assert markers
        wait_until(lambda: markers <= set(shop.markers_of(replica)), seconds=20, what="the replica to have them all")
        dying.kill()
        shop.sell_all()
        assert shop.sell("meanwhile") == "sold meanwhile"
        assert EventName.MARKER_UNAVAILABLE in shop.events
        wait_until(lambda: serves(replica), seconds=60, what="the replica to take over")
        assert markers <= set(shop.markers_of(replica))
        wait_until(are_answered_by_markers, seconds=90, what="markers to answer again")
        assert shop.sold == [*ORDERS, "meanwhile"]
    finally:
        shop.idempotency.close()


def serves(replica: RedisServer) -> bool:
    """Tell whether the replica is a primary now, of a cluster that all slots are served in."""
    with Redis(port=replica.port, decode_responses=True, socket_timeout=5) as client:
        is_primary = client.info("replication")["role"] == "master"
        return bool(is_primary and client.cluster("INFO")["cluster_state"] == "ok")


def test_a_node_dies_that_has_no_replica(private_redis_cluster: RedisCluster, postgres_tables_url: str) -> None:
    """Its keys are decided by SQL alone; when it is back, empty, its keys get their markers again."""
    cluster = private_redis_cluster
    shop = Shop(cluster, postgres_tables_url)
    try:
        shop.sell_all()
        dying = cluster.nodes[2]
        dying.kill()
        shop.sell_all()
        assert EventName.MARKER_UNAVAILABLE in shop.events
        dying.start()
        wait_until(lambda: serves_all(cluster.nodes), seconds=60, what="the cluster to serve all slots again")

        def is_marked_again() -> bool:
            shop.sell_all()
            return bool(shop.markers_of(dying))

        wait_until(is_marked_again, seconds=60, what="markers on the node that is back")
        assert shop.sold == ORDERS
    finally:
        shop.idempotency.close()


def serves_all(nodes: list[RedisServer]) -> bool:
    return all(serves(node) for node in nodes)
