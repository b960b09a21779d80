"""What a worker says of its tasks as it starts."""

from collections.abc import Callable

import pytest

from tests.integration.celery.workers import Shop

pytestmark = pytest.mark.parametrize("broker", ["redis"])  # nothing of this has to do with it


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent"])
def test_a_worker_with_a_coroutine_task_does_not_start(own_shop: Callable[..., Shop], pool: str) -> None:
    """F65: no pool of Celery's awaits it, so the worker ends at once and names the task."""
    worker = own_shop().launch(pool, SHOP_COROUTINE="1")
    assert worker.wait_until_ended(40) != 0
    assert "ConfigurationError: shop.coroutine: an async def task" in worker.text()
    assert " ready." not in worker.text()


def test_a_pool_of_another_make_may_await_coroutines(own_shop: Callable[..., Shop]) -> None:
    """The worker starts: such pools exist, and a call that is not awaited is refused."""
    own_shop().start("custom", SHOP_COROUTINE="1", CELERY_CUSTOM_WORKER_POOL="pool_of_ours:TaskPool")


def test_a_worker_warns_of_tasks_whose_messages_can_be_lost(own_shop: Callable[..., Shop]) -> None:
    """F44: an early acknowledgement, and a killed process that counts as done, each with the setting that mends it."""
    text = own_shop().start("prefork", 1).text()
    assert text.count("shop.early is acknowledged before it runs") == 1
    assert text.count("shop.unsure counts as done when its process is killed") == 1
    assert "shop.charge is" not in text
    assert "shop.charge counts" not in text


def test_only_prefork_can_lose_a_process(own_shop: Callable[..., Shop]) -> None:
    """The other pools have none to lose: there acks_late is enough."""
    text = own_shop().start("threads", 1).text()
    assert "shop.early is acknowledged before it runs" in text
    assert "shop.unsure" not in text.replace(". shop.unsure", "")
