"""Consumers of RabbitMQ by each of its clients, with records in PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest

from idem_tasks import Idempotency
from tests.chaos.proxy import Proxies, Proxy
from tests.integration.consumers.queues import Queues
from tests.integration.consumers.rigs import RIGS, Heard, Rig


@pytest.fixture(params=RIGS)
def client(request: pytest.FixtureRequest) -> str:
    """Each test runs with each client."""
    name: str = request.param
    return name


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def idem(postgres_url: str, heard: Heard) -> Iterator[Idempotency]:
    with Idempotency.from_urls(database_url=postgres_url, create_schema=True, observers=[heard]) as idem:
        idem.prepare()
        yield idem


@pytest.fixture
def queues(rabbitmq_url: str, unique_name: str) -> Iterator[Queues]:
    """A queue and one for its dead letters, both of this test's own."""
    queues = Queues(rabbitmq_url, unique_name)
    queues.declare()
    yield queues
    queues.delete()


@pytest.fixture
def rig(client: str, queues: Queues, idem: Idempotency) -> Callable[..., Rig]:
    """`rig(work, **options)` makes a consumer, which `with` starts and stops; dead letters go to the second queue."""

    def make(work: Callable[..., Any] = lambda _: None, *, url: str = queues.url, **options: Any) -> Rig:
        road = {"dead_letter_exchange": "", "dead_letter_routing_key": queues.dead}
        return RIGS[client](url, queues.name, idem, work, **{**road, **options})

    return make


@dataclass(frozen=True)
class Proxied:
    """RabbitMQ behind a proxy that can cut its connections."""

    url: str
    proxy: Proxy


@pytest.fixture
def proxied(rabbitmq_url: str) -> Iterator[Proxied]:
    proxies = Proxies()
    server = urlsplit(rabbitmq_url)
    proxy = proxies.to(server.port or 5672)
    yield Proxied(rabbitmq_url.replace(f":{server.port}/", f":{proxy.port}/"), proxy)
    proxies.close()
