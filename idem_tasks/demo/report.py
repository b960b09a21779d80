"""What a run showed: counted from the ledger that the handlers wrote, and from the records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from idem_tasks.claims import State
from idem_tasks.demo.ledger import Ledger
from idem_tasks.demo.orders import Order, make_orders, messages_for
from idem_tasks.demo.settings import SCOPE, SIDES, Settings, Side
from idem_tasks.events import EventName
from idem_tasks.idempotency import Idempotency
from idem_tasks.stores.sql import SQLStore


@dataclass(frozen=True, slots=True)
class Tally:
    """One side's column."""

    deliveries: int
    """Messages handed to a worker process, redelivered ones and those put back counted each time."""
    effects: int
    """Charges in the ledger."""
    expected: int
    """Orders: each is to be charged once."""
    lost: int
    """Orders that were never charged."""
    duplicated: int
    """Charges beyond the first of an order."""
    cents: int
    """Money taken."""
    unsettled: int
    """Messages that were published and never settled."""


@dataclass(frozen=True, slots=True)
class Report:
    """Both columns, and how the protected side answered its deliveries."""

    messages: int
    owed: int
    sides: Mapping[Side, Tally]
    runs: int
    replays: int
    waits: int
    takeovers: int
    completed: int
    records: int

    @property
    def faults(self) -> list[str]:
        """Whatever is not exactly right with idem_tasks; empty, or the demo has failed."""
        tally = self.sides["with"]
        found = {
            f"{tally.lost} orders were never charged": tally.lost,
            f"{tally.duplicated} charges were duplicates": tally.duplicated,
            "the money taken is not the money owed": tally.cents != self.owed,
            f"{tally.unsettled} messages were never settled": tally.unsettled,
            f"{self.completed} of {self.records} records are completed, for {tally.expected} orders": not (
                self.completed == self.records == tally.expected
            ),
            "nobody took over the order whose charge was killed": not self.takeovers,
        }
        return [fault for fault, is_so in found.items() if is_so]


def count(settings: Settings, ledger: Ledger, published: Mapping[Side, set[str]]) -> Report:
    """Count what happened; the workers must have ended."""
    orders = make_orders(settings.orders)
    events = ledger.counts("with")
    with Idempotency(store=SQLStore(settings.database_url, table_prefix=settings.table_prefix)) as idempotency:
        states = Counter(record.state for record in idempotency.records(scope=SCOPE))
    return Report(
        messages=len(messages_for(orders)),
        owed=sum(order.cents for order in orders),
        sides={side: _tally(ledger, side, orders, published[side]) for side in SIDES},
        runs=events[EventName.GRANTED],
        replays=events[EventName.REPLAYED],
        waits=events[EventName.IN_PROGRESS],
        takeovers=events[EventName.TAKEN_OVER],
        completed=states[State.COMPLETED],
        records=states.total(),
    )


def _tally(ledger: Ledger, side: Side, orders: list[Order], published: set[str]) -> Tally:
    charges = ledger.charges(side)
    times = Counter(charge.order_id for charge in charges)
    return Tally(
        deliveries=ledger.counts(side)["delivered"],
        effects=len(charges),
        expected=len(orders),
        lost=sum(not times[order.order_id] for order in orders),
        duplicated=sum(number - 1 for number in times.values()),
        cents=sum(charge.cents for charge in charges),
        unsettled=len(published - ledger.messages(side, "settled")),
    )
