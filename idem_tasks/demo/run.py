"""One run of the demo from start to end: what happens to the workers, and when it is over."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from kombu.exceptions import KombuError
from redis.exceptions import RedisError
from rich.console import Console
from sqlalchemy.exc import SQLAlchemyError

from idem_tasks.demo.ledger import Ledger
from idem_tasks.demo.orders import make_orders, messages_for, victim_of
from idem_tasks.demo.processes import DemoError, Processes
from idem_tasks.demo.report import Report, count
from idem_tasks.demo.servers import Servers, open_run
from idem_tasks.demo.settings import SCOPE, SIDES, Settings, Side
from idem_tasks.demo.shop import celery_app, queue_for
from idem_tasks.demo.talk import Step, Talk

_START = 60.0
"""Seconds that the workers may take to start, and one of them to come to the order whose charge is killed."""

_STILL = 30.0
"""Seconds without any event after which a run is over though messages are missing: six leases."""

_LONGEST = 300.0
"""Seconds after which it is over whatever still happens; and a second more for every order."""

_POLL = 0.2


def run_demo(
    servers: Servers, console: Console, *, orders: int = 10, keep: bool = False, animated: bool | None = None
) -> Report:
    """Play the demo and return what was counted; nothing is left behind, unless it is to be kept.

    `console` is told each step; `animated` is None for: if it is a terminal. Raises `ConfigurationError`,
    `StoreUnavailableError` or `DemoError` if it cannot be played.
    """
    talk = Talk(console, animated=animated)
    with ExitStack() as run:
        run.enter_context(_without_celery_variables())
        with talk.step("Starting the servers") as step:
            settings, processes = run.enter_context(open_run(servers, orders=orders, keep=keep))
            step.done = _what_is_used(servers)
        try:
            report = _Run(settings, processes, talk).play()
        except (SQLAlchemyError, KombuError, RedisError, OSError) as error:
            raise DemoError(f"a server failed in the middle of the demo: {type(error).__name__}: {error}") from error
        if keep:
            console.print(_what_is_kept(settings, servers), style="dim", highlight=False)
        return report


@contextmanager
def _without_celery_variables() -> Iterator[None]:
    """Hide the variables by which Celery would take the user's own broker instead of the demo's."""
    hidden = {name: os.environ.pop(name) for name in [*os.environ] if name.startswith("CELERY_")}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _what_is_used(servers: Servers) -> str:
    return (
        f"Records in {_kind(servers.database_url) or 'SQLite'}, "
        f"markers in {'Redis' if servers.redis_url else 'a Redis in memory'}, "
        f"messages in {_kind(servers.broker_url) or 'files'}"
    )


def _kind(url: str | None) -> str:
    """Return what a URL names, without anything that is secret."""
    return url.partition(":")[0].partition("+")[0] if url else ""


def _what_is_kept(settings: Settings, servers: Servers) -> str:
    places = [str(settings.folder)]
    if servers.database_url:
        places.append(f"tables {settings.table_prefix}*")
    if servers.redis_url:
        places.append(f"keys {settings.redis_prefix}*")
    if servers.broker_url:
        places.append(f"queues {settings.name}.*")
    return f"Kept: {', '.join(places)}"


class _Run:
    """The steps of a run, in their order."""

    def __init__(self, settings: Settings, processes: Processes, talk: Talk) -> None:
        self._settings = settings
        self._processes = processes
        self._talk = talk
        self._ledger = Ledger(settings.database_url, settings.table_prefix)
        self._orders = make_orders(settings.orders)
        self._published: dict[Side, set[str]] = {side: set() for side in SIDES}

    def play(self) -> Report:
        """Start the workers, publish, kill, wait until all is quiet, and count."""
        with self._talk.step("Starting two Celery workers") as step:
            self._start_workers()
            step.done = "Two Celery workers started, one without and one with idem_tasks"
        with self._talk.step("Publishing the orders") as step:
            self._publish()
            messages = len(self._published["with"])
            step.done = f"{len(self._orders)} orders published to each, in {messages} messages"
        victim = victim_of(self._orders)
        with self._talk.step(f"Waiting for {victim.order_id} to be charged") as step:
            self._kill()
            step.done = f"Killed in each worker the process that was charging {victim.order_id}"
        with self._talk.step("Waiting until every message is settled") as step:
            if self._wait_until_quiet(step):
                step.done = "All messages settled, all queues empty"
            else:
                step.done = "Gave up waiting: messages are missing"
        return count(self._settings, self._ledger, self._published)

    def _start_workers(self) -> None:
        for side in SIDES:
            self._processes.start_worker(self._settings, side)

        def all_ready() -> bool:
            return all(self._ledger.counts(side)["ready"] for side in SIDES)

        self._processes.wait_until(all_ready, timeout=_START, what="starting the workers")

    def _publish(self) -> None:
        """Publish the same messages to both sides; the broker has each of them when this returns."""
        for side in SIDES:
            with celery_app(self._settings, side) as app:
                for order in messages_for(self._orders):
                    message = str(uuid.uuid4())
                    app.send_task(
                        SCOPE,
                        kwargs={"order_id": order.order_id, "customer": order.customer, "cents": order.cents},
                        task_id=message,
                    )
                    self._published[side].add(message)

    def _kill(self) -> None:
        """Kill the process that waits for the card provider: in mid-charge, before anything is charged.

        It cannot go on by itself, so the kill strikes there however slow this machine is.
        """
        alive = list(SIDES)

        def all_killed() -> bool:
            for side in [*alive]:
                charging = self._ledger.processes(side, "unanswered")
                if charging:
                    self._processes.kill_child(side, charging[0])
                    alive.remove(side)
            return not alive

        self._processes.wait_until(all_killed, timeout=_START, what="coming to the first order")

    def _wait_until_quiet(self, step: Step) -> bool:
        """Wait until all messages are settled and no copy of one is queued; False if that does not come to pass."""
        until = time.monotonic() + _LONGEST + self._settings.orders
        seen, still_since = 0, time.monotonic()
        while True:
            self._processes.check()
            settled = {side: len(self._ledger.messages(side, "settled") & self._published[side]) for side in SIDES}
            expected = {side: len(self._published[side]) for side in SIDES}
            if settled == expected and not any(self._queued(side) for side in SIDES):
                return True
            step.say(
                "Settled messages: "
                + ", ".join(f"{settled[side]} of {expected[side]} {side} idem_tasks" for side in SIDES)
            )
            events = sum(self._ledger.counts(side).total() for side in SIDES)
            if events != seen:
                seen, still_since = events, time.monotonic()
            if time.monotonic() > min(until, still_since + _STILL):
                return False
            time.sleep(_POLL)

    def _queued(self, side: Side) -> int:
        with celery_app(self._settings, side).connection_for_read() as connection:
            queue = queue_for(self._settings, side)(connection.default_channel)
            try:
                return int(queue.queue_declare(passive=True).message_count)
            except connection.channel_errors:
                return 0  # on Redis an empty queue is none
