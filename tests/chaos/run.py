"""Workers, brokers and stores under faults: `python -m tests.chaos.run --seconds 600 --seed 7 --folder /tmp/chaos`.

Exit code 1: a promise was broken. The folder then holds the history, the report and the workers' logs.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from idem_tasks import Idempotency
from idem_tasks.outcomes import JsonCodec, OutcomeContext
from tests.chaos import history, report, sales, verdict
from tests.chaos.faults import LEASE, Faults, Shop
from tests.chaos.history import (
    FAULT_KINDS,
    TASKS,
    Answered,
    Effect,
    Fault,
    History,
    Kept,
    Published,
    Sent,
    Started,
    Stepped,
)
from tests.chaos.ledger import Ledger
from tests.chaos.plan import planned
from tests.chaos.proxy import Proxies
from tests.chaos.publisher import Publisher
from tests.chaos.queues import celery_settings, unsettled
from tests.chaos.servers import Premises, Servers, start_servers
from tests.chaos.workers import Worker
from tests.services.run import Run

WORKERS = 2
"""Trees of processes of each shop."""

RATE = 4.0
"""Orders a second of each shop."""

SECONDS_TO_SETTLE = 240.0
SECONDS_WITHOUT_PROGRESS = 30.0
SECONDS_UNTIL_ALL_IS_SENT = 90.0
"""A sender that dies has its messages for a minute more."""

SECONDS_OF_CALM = 3.0
"""Before the first fault, so that there is something to strike."""

SECONDS_BETWEEN_LINES = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.run", description="Break everything, lose nothing.")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long faults happen (default: 600)")
    parser.add_argument("--seed", type=int, default=None, help="of faults and orders (default: a random one)")
    parser.add_argument("--folder", type=Path, default=None, help="for what is left of it (default: a temporary one)")
    parser.add_argument("--rate", type=float, default=RATE, help=f"orders a second of each shop (default: {RATE:g})")
    parser.add_argument("--tasks", default=",".join(TASKS), help=f"which of {', '.join(TASKS)} are published")
    parser.add_argument("--faults", default=",".join(FAULT_KINDS), help=f"which of {', '.join(FAULT_KINDS)} happen")
    given = parser.parse_args(arguments)
    tasks, kinds = chosen(parser, given.tasks, TASKS), chosen(parser, given.faults, FAULT_KINDS)
    seed = random.SystemRandom().randrange(10**6) if given.seed is None else given.seed
    folder = given.folder or Path(tempfile.mkdtemp(prefix="idem-tasks-chaos-"))
    (folder / "workers").mkdir(parents=True, exist_ok=True)
    say(f"seed {seed}, {given.seconds:g} s of faults, everything is kept in {folder}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that everything is stopped then too
    try:
        told, failed = chaos(Plan(seed, given.seconds, given.rate, tasks, kinds), folder)
    except KeyboardInterrupt:
        say(f"seed {seed}: interrupted; everything is stopped")
        return 130
    history.write(told, folder / "history.jsonl")
    judged = verdict.judge(told)
    say(report.write(told, judged, folder).read_text())
    say("".join(f"could not be done: {fault}\n" for fault in failed))
    say(f"seed {seed}: {'every promise was kept' if judged.good else 'A PROMISE WAS BROKEN'}; see {folder}")
    return 0 if judged.good and not failed else 1


def chosen(parser: argparse.ArgumentParser, given: str, known: Sequence[str]) -> tuple[str, ...]:
    found = tuple(given.split(","))
    unknown = [name for name in found if name not in known]
    if unknown:
        parser.error(f"not known: {', '.join(unknown)}; known: {', '.join(known)}")
    return found


@dataclass(frozen=True)
class Plan:
    """What a run is to be."""

    seed: int
    seconds: float
    rate: float
    tasks: tuple[str, ...]
    kinds: tuple[str, ...]


def chaos(plan: Plan, folder: Path) -> tuple[History, list[str]]:
    """Run it all, stop it all; returns what happened, and which faults failed as such."""
    with contextlib.ExitStack() as cleaning:
        run = Run.begin()
        cleaning.callback(run.end)
        proxies = Proxies()
        cleaning.callback(proxies.close)
        servers = start_servers(run, proxies)
        ledger = cleaning.enter_context(Ledger(servers.ledger.url))
        ledger.prepare()
        prepare_records(servers.premises)
        publishers = [new_publisher(premises, plan) for premises in servers.premises]
        shops = [
            new_shop(run, servers, premises, publisher, folder)
            for premises, publisher in zip(servers.premises, publishers, strict=True)
        ]
        for shop in shops:
            for worker in shop.workers:
                cleaning.callback(worker.kill)
                worker.start()
        for worker in workers_of(shops):
            worker.wait_until_ready()
        for publisher in publishers:
            cleaning.callback(publisher.stop)
        faults = Faults(shops, servers.ledger.url)
        cleaning.callback(faults.end)  # before the rest, or it would start again what is stopped
        cleaning.callback(ignore_interruptions)
        return Show(plan, shops, publishers, faults, ledger).play(), faults.failed


def ignore_interruptions() -> None:
    """What is being stopped is stopped to the end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def new_shop(run: Run, servers: Servers, premises: Premises, publisher: Publisher, folder: Path) -> Shop:
    settings = {
        "name": premises.name,
        "ledger": servers.ledger.url,
        "store": {
            "database_url": premises.database.url,
            "redis_url": premises.markers.url,
            "create_schema": False,
            "lease": LEASE,
            "max_crashes": None,
        },
        "engine": premises.database.engine_options,
        "celery": celery_settings(premises.broker, url=premises.broker.url),
    }
    workers = [Worker(run, premises.name, number, settings, folder / "workers") for number in range(WORKERS)]
    return Shop(premises, workers, publisher.ask_again)


def new_publisher(premises: Premises, plan: Plan) -> Publisher:
    settings = celery_settings(premises.broker, url=premises.broker.direct_url)
    return Publisher(premises.name, settings, seed=plan.seed, seconds=plan.seconds, rate=plan.rate, tasks=plan.tasks)


class Show:
    """One run, from the first order until everything is settled."""

    def __init__(
        self,
        plan: Plan,
        shops: Sequence[Shop],
        publishers: Sequence[Publisher],
        faults: Faults,
        ledger: Ledger,
    ) -> None:
        self._plan = plan
        self._shops, self._publishers, self._faults, self._ledger = shops, publishers, faults, ledger
        self._began = time.time()
        self._next_line = 0.0

    def play(self) -> History:
        for publisher in self._publishers:
            publisher.start()
        self._strike()
        self._faults.end()
        for publisher in self._publishers:
            publisher.end()
        left = self._settled()
        ended = time.time()
        for worker in workers_of(self._shops):
            worker.kill()
        for shop in self._shops:
            send_the_rest(shop.premises, self._ledger)
        return self._history(ended, left)

    def _strike(self) -> None:
        deadline = self._began + self._plan.seconds
        at = self._began + SECONDS_OF_CALM
        for fault in planned(self._plan.seed, self._plan.kinds):
            at += fault.after
            while (now := time.time()) < min(at, deadline):
                self._say_how_it_goes()
                time.sleep(min(at - now, 0.5) if at > now else 0)
            if now >= deadline:
                return
            self._faults.begin(fault)

    def _settled(self) -> dict[str, int]:
        """Wait until no message is left; returns how many are left in spite of it."""
        deadline, progress_at = time.monotonic() + SECONDS_TO_SETTLE, time.monotonic()
        left, quiet = self._left(), 0
        while (any(left.values()) or quiet < 2) and time.monotonic() < deadline:
            self._say_how_it_goes(left)
            time.sleep(1.0)  # brokers tell of their queues only when asked
            before, left = left, self._left()
            quiet = quiet + 1 if not any(left.values()) else 0
            if left != before or not any(left.values()):
                progress_at = time.monotonic()
            elif time.monotonic() - progress_at > SECONDS_WITHOUT_PROGRESS:
                self._replace_workers([shop for shop in self._shops if left[shop.name]])
                progress_at = time.monotonic()
        return left

    def _left(self) -> dict[str, int]:
        return {shop.name: unsettled(shop.premises.broker) for shop in self._shops}

    def _replace_workers(self, shops: Sequence[Shop]) -> None:
        """Where nothing moves any more, a worker may have lost sight of its messages: Celery's do now and then."""
        for worker in workers_of(shops):
            at = time.time()
            pids = worker.kill()
            details = "nothing moved at the end"
            self._faults.told.append(Fault("worker_killed", at, time.time(), worker.name, tuple(pids), details))
            worker.start()

    def _history(self, ended: float, left: dict[str, int]) -> History:
        published = tuple(sorted((row for one in self._publishers for row in one.published), key=lambda row: row.at))
        return History(
            seed=self._plan.seed,
            seconds=self._plan.seconds,
            began=self._began,
            ended=ended,
            lease=LEASE,
            published=published,
            started=self._ledger.rows(Started),
            effects=(*self._ledger.rows(Effect), *(row for shop in self._shops for row in sold_by(shop.premises))),
            stepped=self._ledger.rows(Stepped),
            sent=self._ledger.rows(Sent),
            answered=self._ledger.rows(Answered),
            faults=tuple(sorted(self._faults.told, key=lambda fault: fault.at)),
            kept=tuple(kept for shop in self._shops for kept in kept_by(shop.premises, published)),
            left_in_queues=left,
        )

    def _say_how_it_goes(self, left: dict[str, int] | None = None) -> None:
        if time.monotonic() < self._next_line:
            return
        self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
        counts = self._ledger.counts()
        published = sum(len(publisher.published) for publisher in self._publishers)
        effects, answered = counts.get("effects", 0), counts.get("answered", 0)
        line = f"{time.time() - self._began:4.0f} s: {published} messages, {effects} effects, {answered} answers"
        line += f", {len(self._faults.told)} faults"
        say(line + (f", to settle: {', '.join(f'{count} at {shop}' for shop, count in left.items())}" if left else ""))


def workers_of(shops: Sequence[Shop]) -> list[Worker]:
    return [worker for shop in shops for worker in shop.workers]


def prepare_records(all_premises: Sequence[Premises]) -> None:
    for premises in all_premises:
        with direct(premises) as idem:
            idem.prepare()
        sales.prepare(premises.database.direct_url)


def sold_by(premises: Premises) -> Iterator[Effect]:
    return sales.sold(premises.database.direct_url, premises.name)


def send_the_rest(premises: Premises, ledger: Ledger) -> None:
    """Let a relay send what crashes left behind, as soon as nobody has it leased any more."""
    with direct(premises, senders={"post": sales.post_office(ledger, premises.name)}) as idem:
        deadline = time.monotonic() + SECONDS_UNTIL_ALL_IS_SENT
        while idem.relay().left and time.monotonic() < deadline:
            time.sleep(1.0)  # nobody tells when a dead sender's lease is over


def kept_by(premises: Premises, published: Sequence[Published]) -> Iterator[Kept]:
    """The record of every order, whether there is one or not."""
    with direct(premises) as idem:
        records = {(record.scope, record.key): record for record in idem.records()}
    orders = {(row.task, row.order): None for row in published if row.shop == premises.name}
    for task, order in orders:
        record = records.get((task, order))
        if record is None:
            yield Kept(premises.name, order, task, None, None, 0, 0, 0, 0)
            continue
        context = OutcomeContext(task, order, record.fingerprint)
        outcome = None if record.outcome is None else JsonCodec().decode(record.outcome, str, context)
        yield Kept(
            shop=premises.name,
            order=order,
            task=task,
            state=record.state.value,
            outcome=outcome,
            attempts=record.attempts,
            crashes=record.crashes,
            failures=record.failures,
            fencing_token=record.fencing_token,
        )


def direct(premises: Premises, **options: Any) -> Idempotency:
    """The records, not through a proxy."""
    url = premises.database.direct_url
    return Idempotency.from_urls(database_url=url, create_schema=False, observers=[], **options)


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
