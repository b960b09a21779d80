"""A run of endurance: messages that come twice and more, consumers that are killed, and a verdict at the end."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

from sqlalchemy import Engine, create_engine

from idem_tasks import Idempotency
from tests.consumers import brokers
from tests.consumers.consumer import DELIVERIES
from tests.consumers.fleet import Fleet
from tests.consumers.ledger import Table, effects, handled
from tests.consumers.plan import REFUSED, Plan
from tests.consumers.verdict import Verdict

_LOOK = 0.2
"""Seconds between two looks at how far it is."""

_AT_REST = 1.0
"""Seconds for which nothing is to be left before the consumers are taken away to see what they hold."""


def endure(plan: Plan) -> Verdict:
    """Let consumers handle all messages while they are killed one after another, and say what became of them."""
    engine = create_engine(plan.database_url)
    try:
        Table.metadata.create_all(engine)
        with Idempotency.from_urls(database_url=plan.database_url, redis_url=plan.redis_url) as idem:
            idem.prepare()
        return _endure(plan, engine)
    finally:
        engine.dispose()


def _endure(plan: Plan, engine: Engine) -> Verdict:
    broker, deliveries = brokers.module(plan.broker), plan.deliveries()
    broker.declare(plan)
    broker.publish(plan, deliveries)
    fleet, began = Fleet(plan), time.monotonic()
    try:
        while time.monotonic() < began + plan.seconds:
            fleet.start()
            _kill_until_all_are_handled(plan, engine, fleet, began + plan.seconds)
            _until_at_rest(plan, broker, fleet, began + plan.seconds)
            fleet.kill_all()
            if not broker.left(plan, running=False):
                break
    finally:
        fleet.close()
    return Verdict(
        keys=plan.all_keys(),
        published=len(deliveries),
        effects=effects(engine),
        dead=broker.dead_letters(plan),
        events=_events(plan),
        kills=fleet.kills,
        left=broker.left(plan, running=False),
        seconds=time.monotonic() - began,
    )


def _kill_until_all_are_handled(plan: Plan, engine: Engine, fleet: Fleet, until: float) -> None:
    """Return once each effect has happened, or it took too long."""
    expected = len([key for key in plan.all_keys() if not key.startswith(REFUSED)])
    done = at_kill = handled(engine)
    while time.monotonic() < until and done < expected:
        fleet.check()
        # Where a group takes longer to find together again than from kill to kill, nothing would ever be handled.
        if done > at_kill and fleet.kill_one_if_it_is_time():
            at_kill = done
        time.sleep(_LOOK)
        done = handled(engine)


def _until_at_rest(plan: Plan, broker: brokers.Broker, fleet: Fleet, until: float) -> None:
    """Return once nothing was left for a while, or it took too long."""
    busy = time.monotonic()
    while (now := time.monotonic()) < until and now < busy + _AT_REST:
        fleet.check()
        if broker.left(plan, running=True):
            busy = now
        time.sleep(_LOOK)


def _events(plan: Plan) -> Counter[str]:
    files = Path(plan.folder).glob(f"*.{DELIVERIES}")
    return Counter(line for file in files for line in file.read_text().splitlines())
