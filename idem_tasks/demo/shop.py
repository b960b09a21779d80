"""The shop: the handler, and the Celery app of each side, which differ in one decorator."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from celery import Celery, signals
from kombu import Exchange, Queue

from idem_tasks.decorator import idempotent_task
from idem_tasks.demo import broker
from idem_tasks.demo.ledger import Ledger
from idem_tasks.demo.orders import make_orders, victim_of
from idem_tasks.demo.settings import LEASE, SCOPE, WORKER_LOST_WAIT, Settings, Side
from idem_tasks.events import Event, log_event
from idem_tasks.idempotency import Idempotency
from idem_tasks.stores.redis import RedisStore
from idem_tasks.stores.sql import SQLStore
from idem_tasks.stores.tiered import TieredStore

_QUEUE_ENDS = 600_000
"""Milliseconds after which RabbitMQ removes a queue that nobody reads, should the demo itself be killed."""

_UNANSWERED = 120.0
"""Seconds that the provider keeps silent. The kill comes within one."""


class Shop:
    """One side's handler, with what it needs; made once in each worker."""

    def __init__(self, settings: Settings, side: Side) -> None:
        self._settings = settings
        self._side = side
        self._ledger = Ledger(settings.database_url, settings.table_prefix)
        self._victim = victim_of(make_orders(settings.orders))

    def charge(self, order_id: str, customer: str, cents: int) -> str:
        """Charge a customer, and return the receipt. This is the handler of both sides."""
        self._ask_card_provider(order_id)
        number = self._ledger.charge(self._side, order_id, customer, cents)
        return f"R-{number:06}"

    def _ask_card_provider(self, order_id: str) -> None:
        """Wait for the provider's answer; the first call for one order never gets any, and is killed waiting."""
        time.sleep(self._settings.seconds_of_a_charge)
        if order_id == self._victim.order_id and self._is_first_call():
            self._ledger.note(self._side, "unanswered", order_id=order_id)
            time.sleep(_UNANSWERED)
            raise TimeoutError("the card provider does not answer, and nobody killed this process")

    def _is_first_call(self) -> bool:
        try:
            Path(self._settings.folder, f"called-{self._side}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def open(self) -> Celery:
        """Return the app that a worker runs, with the handler as its one task."""
        app = celery_app(self._settings, self._side)
        handler = self.charge
        if self._side == "with":
            idempotency = Idempotency(store=store_for(self._settings), observers=[log_event, self._observe])
            handler = idempotent_task(key="{order_id}", scope=SCOPE, lease=LEASE, idempotency=idempotency)(self.charge)
        app.task(name=SCOPE, acks_late=True, reject_on_worker_lost=True)(handler)
        signals.worker_ready.connect(self._ready, weak=False)
        signals.task_prerun.connect(self._delivered, weak=False)
        signals.task_success.connect(self._settled, weak=False)
        return app

    def _observe(self, event: Event) -> None:
        self._ledger.note(self._side, event.name.value, order_id=event.key)

    def _ready(self, **_: Any) -> None:
        self._ledger.note(self._side, "ready")

    def _delivered(self, *, task_id: str, kwargs: dict[str, Any], **_: Any) -> None:
        self._ledger.note(self._side, "delivered", order_id=kwargs["order_id"], message=task_id)

    def _settled(self, *, sender: Any, **_: Any) -> None:
        self._ledger.note(self._side, "settled", order_id=sender.request.kwargs["order_id"], message=sender.request.id)


def store_for(settings: Settings) -> TieredStore:
    """Return the store of the protected side: a marker in Redis in front of records in SQL."""
    record = SQLStore(settings.database_url, table_prefix=settings.table_prefix)
    return TieredStore(RedisStore(settings.redis_url, prefix=settings.redis_prefix), record)


def queue_for(settings: Settings, side: Side) -> Queue:
    """Return the queue that this side's messages are published to."""
    name = settings.queue(side)
    return Queue(name, Exchange(name), routing_key=name, queue_arguments={"x-expires": _QUEUE_ENDS})


def celery_app(settings: Settings, side: Side) -> Celery:
    """Return an app without tasks: all that is needed to publish."""
    app = Celery("idem_tasks_demo", set_as_current=False)
    app.conf.update(
        task_queues=[queue_for(settings, side)],
        task_default_queue=settings.queue(side),
        task_default_exchange=settings.queue(side),
        task_default_routing_key=settings.queue(side),
        task_ignore_result=True,
        worker_prefetch_multiplier=1,
        worker_lost_wait=WORKER_LOST_WAIT,
        worker_enable_remote_control=False,
        broker_connection_retry_on_startup=True,
        **_broker(settings, side),
    )
    return app


def _broker(settings: Settings, side: Side) -> dict[str, Any]:
    if settings.broker_url is None:
        messages, exchanges = settings.folder / f"queue-{side}", settings.folder / f"exchange-{side}"
        messages.mkdir(exist_ok=True)
        exchanges.mkdir(exist_ok=True)
        options: dict[str, Any] = {
            "data_folder_in": str(messages),
            "data_folder_out": str(messages),
            "control_folder": str(exchanges),
            "polling_interval": 0.05,
        }
        return {"broker_url": broker.URL, "broker_transport_options": options}
    if settings.broker_url.startswith("redis"):
        options = {"global_keyprefix": settings.redis_prefix}
    else:
        options = {"confirm_publish": True}
    return {"broker_url": settings.broker_url, "broker_transport_options": options}
