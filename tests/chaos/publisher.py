"""Publishes a shop's orders, steadily, a third of them more than once; each message with the broker's confirmation."""

from __future__ import annotations

import contextlib
import heapq
import random
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

from celery import Celery

from tests.chaos.faults import LEASE
from tests.chaos.history import TASKS, Published

LATEST = 30.0
"""Seconds after which the last duplicate of an order comes."""


@dataclass(order=True)
class Due:
    """One message to be published."""

    at: float
    order: str
    task: str = field(compare=False)
    work: tuple[float, float] = field(compare=False)


class Publisher:
    """A thread that publishes `rate` orders a second, for some seconds and then what is still due."""

    def __init__(
        self,
        shop: str,
        settings: dict[str, Any],
        *,
        seed: int,
        seconds: float,
        rate: float,
        tasks: Sequence[str] = TASKS,
    ) -> None:
        self.published: list[Published] = []
        self._shop = shop
        self._settings = settings
        self._chance = random.Random(f"orders of {shop} {seed}")
        self._seconds, self._rate, self._tasks = seconds, rate, tasks
        self._stopped = threading.Event()
        self._asked: SimpleQueue[str | None] = SimpleQueue()  # None: look whether it is over
        self._failed: Exception | None = None
        self._thread = threading.Thread(target=self._work, name=f"publisher of {shop}")

    def ask_again(self, orders: Iterable[str]) -> None:
        """Publish these once more, at once."""
        for order in orders:
            self._asked.put(order)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Return when everything is published; raises if that failed."""
        self._thread.join(timeout=self._seconds + LATEST)
        if self._thread.is_alive():
            raise TimeoutError(f"the publisher of {self._shop} does not end")
        if self._failed is not None:
            raise self._failed

    def stop(self) -> None:
        """End at once."""
        self._stopped.set()
        self._asked.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout=30)

    def _work(self) -> None:
        try:
            with Celery("publisher", set_as_current=False) as app:
                app.conf.update(self._settings)
                app.conf.broker_transport_options |= {"confirm_publish": True}  # Redis confirms by its reply
                self._publish_all(app)
        except Exception as error:  # noqa: BLE001 - raised again where the run waits for its end
            self._failed = error

    def _publish_all(self, app: Celery) -> None:
        began = time.monotonic()
        due = self._orders()
        by_order = {message.order: message for message in due}
        heapq.heapify(due)
        while due and not self._stopped.is_set():
            message = heapq.heappop(due)
            # What would come later than the run lasts comes at its end, and is a duplicate of something old.
            for order in self._asked_until(began + min(message.at, self._seconds)):
                self._publish(app, by_order[order])
            self._publish(app, message)

    def _asked_until(self, at: float) -> Iterator[str]:
        while not self._stopped.is_set() and (left := at - time.monotonic()) > 0:
            with contextlib.suppress(Empty):
                order = self._asked.get(timeout=left)
                if order is not None:
                    yield order

    def _publish(self, app: Celery, due: Due) -> None:
        at = time.time()
        sent = app.send_task(due.task, args=(due.order, *due.work), retry=True)
        self.published.append(Published(at, self._shop, due.order, due.task, sent.id))

    def _orders(self) -> list[Due]:
        chance, found = self._chance, list[Due]()
        for number in range(int(self._seconds * self._rate)):
            at = (number + chance.random()) / self._rate
            order, task = f"{number:05d}", chance.choice(self._tasks)
            # A few run longer than their lease, which has to be renewed.
            whole = chance.uniform(1.1, 1.8) * LEASE if chance.random() < 0.06 else chance.uniform(0, 0.3)
            before = round(whole * chance.random(), 3)
            copies = chance.choice((1, 2)) if chance.random() < 1 / 3 else 0
            times = [at, *(at + self._lateness() for _ in range(copies))]
            found += [Due(when, order, task, (before, round(whole - before, 3))) for when in times]
        return found

    def _lateness(self) -> float:
        """At once, while the first is likely to run, or much later."""
        return self._chance.choice((0.0, self._chance.uniform(0.0, 2 * LEASE), self._chance.uniform(5.0, LATEST)))
