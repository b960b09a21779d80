"""Relays that take turns on an outbox keep the order of each key, whatever becomes of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from idem_tasks.claims import OutboxMessage, new_owner
from idem_tasks.stores.base import FailedSend, Store
from idem_tasks.stores.memory import MemoryStore
from idem_tasks.stores.sql import SQLStore
from idem_tasks.testing import ManualClock
from idem_tasks.testing.driver import Driver
from idem_tasks.testing.outbox_contract import OutboxInUse
from idem_tasks.testing.store_in_use import StoreInUse


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest) -> Store:
    return MemoryStore() if request.param == "memory" else SQLStore(request.getfixturevalue("sqlite_url"))


def test_all_keys_are_found_without_naming_one() -> None:
    """The oldest come first, and a limit is kept."""
    clock = ManualClock()
    with Driver("blocking", clock.advance) as driver:
        box = OutboxInUse(StoreInUse(MemoryStore(clock), driver))
        for number in range(3):
            box.recorded(f"key-{number}")
            clock.advance(1)
        taken = driver(box.outbox.take("o1", lease=60.0, limit=4))
        assert [message.key for message in taken] == ["key-0"] * 3 + ["key-1"]
        assert driver(box.outbox.count()) == 9


# What must hold however relays run beside one another.

OPERATIONS = st.one_of(
    st.tuples(st.just("publish"), st.sampled_from("ab"), st.integers(1, 3)),
    st.tuples(st.just("take"), st.integers(0, 1), st.integers(1, 4), st.booleans()),
    st.tuples(st.just("send"), st.integers(0, 1), st.booleans()),
    st.tuples(st.just("settle"), st.integers(0, 1)),
)


class Relayed:
    """Two relays that take, send and settle when they are told to, as `Relay` does, and all that they sent."""

    def __init__(self, use: StoreInUse, deaths: bool) -> None:
        self.box = OutboxInUse(use)
        self.deaths = deaths
        self.published: dict[str, list[str]] = {"a": [], "b": []}
        self.sent: list[OutboxMessage] = []
        self.batches: list[list[OutboxMessage]] = [[], []]
        self.done: list[list[OutboxMessage]] = [[], []]
        self.failed: list[list[FailedSend]] = [[], []]
        self.owners = ["", ""]
        self.somebody_died = False

    def publish(self, key: str, number: int) -> None:
        if self.published[key]:
            self.box.use.forget(key)
        self.published[key] += [message.id for message in self.box.recorded(key, number)]

    def take(self, relay: int, limit: int, dies: bool) -> None:
        """Take for one key or the other; `dies`: its lease is over at once, though it goes on."""
        if self.batches[relay]:
            return
        self.owners[relay] = new_owner()
        dies = dies and self.deaths
        lease = 0.0 if dies else 60.0
        for key in "ab":
            taken = self.box.take(key, owner=self.owners[relay], lease=lease, limit=limit)
            if taken:
                self.somebody_died |= dies
                self.batches[relay] = taken
                return

    def send(self, relay: int, succeeds: bool) -> None:
        settled = len(self.done[relay]) + len(self.failed[relay])
        if self.failed[relay] or settled >= len(self.batches[relay]):
            return
        message = self.batches[relay][settled]
        if succeeds:
            self.sent.append(message)
            self.done[relay].append(message)
        else:
            self.failed[relay].append(FailedSend(message, 0.0, "OSError"))

    def settle(self, relay: int) -> None:
        batch, done, failed = self.batches[relay], self.done[relay], self.failed[relay]
        rest = batch[len(done) + len(failed) :]
        self.box.settle(self.owners[relay], sent=done, failed=failed, rest=rest)
        self.batches[relay], self.done[relay], self.failed[relay] = [], [], []


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=st.lists(OPERATIONS, min_size=10, max_size=40), deaths=st.booleans())
def test_the_order_of_a_key_holds_for_any_two_relays(
    store: Store, operations: list[tuple[Any, ...]], deaths: bool
) -> None:
    """However they take turns, fail and outlive their leases: first sends are in order, all are sent, none is new.

    And while no lease ran out, none is sent twice.
    """
    with Driver("blocking") as driver:
        relayed = Relayed(StoreInUse(store, driver), deaths)  # with a scope of its own
        for name, *arguments in operations:
            getattr(relayed, name)(*arguments)
        for relay in (0, 1):
            relayed.settle(relay)
        for _ in range(200):  # ended by what they have
            relayed.take(0, 4, dies=False)
            if not relayed.batches[0]:
                break
            for _ in range(4):
                relayed.send(0, succeeds=True)
            relayed.settle(0)
    for key, published in relayed.published.items():
        sends = [message.id for message in relayed.sent if message.key == key]
        assert list(dict.fromkeys(sends)) == published
        assert relayed.somebody_died or sends == published
