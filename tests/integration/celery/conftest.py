"""A Celery shop on Redis and on RabbitMQ: its workers are processes of their own, killed by pid."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from sqlalchemy import make_url

from tests.integration.celery.workers import Shop, logs_of
from tests.services import finding
from tests.services.fixtures import found
from tests.services.run import Run

BROKERS = ("redis", "rabbitmq")
FIRST_DATABASE = 4  # of Redis; those before it are the `redis_url` of other tests, which they flush


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Clients of Celery 5.5 leave sockets of their results to the garbage collector, and no way to close them.
    left_open = pytest.mark.filterwarnings(
        "ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"
    )
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(left_open)


@pytest.fixture(scope="session")
def celery_redis(service_run: Run, worker_number: int) -> Iterator[str]:
    """`redis://…/N` for brokers, results and markers of this xdist worker's Celery tests."""
    url = make_url(found(finding.REDIS, service_run).url)
    number = int(url.database or 0) + FIRST_DATABASE + worker_number
    database = url.set(database=str(number)).render_as_string(hide_password=False)
    with Redis.from_url(database) as client:
        client.flushdb()
        yield database
        client.flushdb()


@pytest.fixture(scope="session")
def broker_urls(service_run: Run, worker_number: int, celery_redis: str) -> Callable[[str], str]:
    """The URL of a broker by its name."""

    def url_of(broker: str) -> str:
        if broker == "redis":
            return celery_redis
        server = found(finding.RABBITMQ, service_run)
        return server.url.removesuffix("0") + str(worker_number) if server.started_here else server.url

    return url_of


@pytest.fixture(scope="session")
def all_shops() -> Iterator[list[Shop]]:
    shops: list[Shop] = []
    yield shops
    for shop in shops:
        shop.close()


@pytest.fixture(params=BROKERS)
def broker(request: pytest.FixtureRequest) -> str:
    """Each test runs on both."""
    name: str = request.param
    return name


@pytest.fixture
def shop(
    broker: str,
    broker_urls: Callable[[str], str],
    celery_redis: str,
    service_run: Run,
    all_shops: list[Shop],
    worker_number: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Shop]:
    """A shop with one prefork worker of three processes, shared with the other tests: do not hurt it."""
    name = f"shared_{broker}_{worker_number}"
    shared = next((shop for shop in all_shops if shop.name == name), None)
    if shared is None:
        url = broker_urls(broker)
        folder = tmp_path_factory.mktemp(name)
        store = {"database_url": f"sqlite:///{folder / 'records.db'}", "redis_url": celery_redis}
        shared = Shop(service_run, name, url, celery_redis, store, folder)
        all_shops.append(shared)
        shared.start()
    with logs_of([shared]):
        yield shared


@pytest.fixture
def own_shop(
    broker: str,
    broker_urls: Callable[[str], str],
    celery_redis: str,
    service_run: Run,
    unique_name: str,
    tmp_path: Path,
) -> Iterator[Callable[..., Shop]]:
    """`own_shop(visibility_timeout=2)` makes a shop of the test's own, without a worker."""
    shops: list[Shop] = []

    def make(*, transport: dict[str, Any] | None = None, store: dict[str, Any] | None = None, **config: Any) -> Shop:
        store = {"database_url": f"sqlite:///{tmp_path / 'records.db'}", "redis_url": celery_redis} | (store or {})
        config["transport"] = transport or {}
        made = Shop(service_run, unique_name, broker_urls(broker), celery_redis, store, tmp_path, config)
        shops.append(made)
        return made

    with logs_of(shops):
        try:
            yield make
        finally:
            for made in shops:
                made.close()
            gc.collect()  # in this test, not in another's
