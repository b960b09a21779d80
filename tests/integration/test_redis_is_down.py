"""Redis is killed, and started again: what the policy says happens, and no effect happens twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from idem_tasks import Idempotency, StoreUnavailableError, idempotent_task
from idem_tasks.events import Event, EventName
from idem_tasks.policy import OnMarkerUnavailable
from tests.services.redis_server import RedisServer
from tests.services.waiting import wait_until


class Till:
    """A handler over a record in PostgreSQL and a Redis of its own."""

    def __init__(self, redis: RedisServer, postgres_url: str) -> None:
        self.redis = redis
        self.charged: list[str] = []
        self.events: list[EventName] = []
        self.idempotency = Idempotency.from_urls(
            database_url=postgres_url, redis_url=redis.url, create_schema=True, observers=[self._heard]
        )

    def _heard(self, event: Event) -> None:
        self.events.append(event.name)

    def charge(self, order: str, while_redis_is_away: OnMarkerUnavailable) -> None:
        @idempotent_task(
            key="{order}", scope="charge", idempotency=self.idempotency, on_marker_unavailable=while_redis_is_away
        )
        def charge(order: str) -> None:
            self.charged.append(order)

        charge(order)

    def marker_stands(self) -> bool:
        with self.redis.client() as client:
            return bool(client.keys("*"))


@pytest.fixture
def till(private_redis: Callable[..., RedisServer], postgres_url: str) -> Iterator[Till]:
    till = Till(private_redis(), postgres_url)
    yield till
    till.idempotency.close()


def test_bypass_lets_sql_alone_decide(till: Till) -> None:
    """With a killed Redis orders are charged, once each; when it is back, markers answer again (F7)."""
    till.charge("before", "bypass")
    till.redis.kill()
    for _ in range(3):
        till.charge("before", "bypass")
        till.charge("meanwhile", "bypass")
    assert till.charged == ["before", "meanwhile"]
    assert EventName.MARKER_UNAVAILABLE in till.events
    till.redis.start()
    assert not till.marker_stands()  # it lost everything

    def answered_by_a_marker() -> bool:
        till.charge("before", "bypass")
        return till.marker_stands()

    wait_until(answered_by_a_marker, seconds=30, what="Redis being asked again")
    assert till.charged == ["before", "meanwhile"]


def test_raise_puts_everything_off(till: Till) -> None:
    """With a killed Redis nothing runs and SQL is not asked; when it is back, all goes on where it was (F7)."""
    till.charge("before", "raise")
    till.redis.kill()
    for order in ("before", "meanwhile"):
        with pytest.raises(StoreUnavailableError, match="on_marker_unavailable='raise'"):
            till.charge(order, "raise")
    assert till.charged == ["before"]
    assert till.idempotency.get("charge", "meanwhile") is None
    till.redis.start()

    def runs() -> bool:
        try:
            till.charge("meanwhile", "raise")
        except StoreUnavailableError:
            return False
        return True

    wait_until(runs, seconds=30, what="Redis being asked again")
    till.charge("before", "raise")
    assert till.charged == ["before", "meanwhile"]
