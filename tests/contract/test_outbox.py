"""Every store with an outbox keeps messages with their outcomes, and gives them away in order, in both runtimes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from idem_tasks.claims import EncodedOutcome, Finished, Lease, Lost, OutboxMessage, Recorded, State, new_owner
from idem_tasks.outbox import message_id
from idem_tasks.stores.base import FailedSend, MarkerPending, Outbox, RuntimeName, Store, outbox_of
from idem_tasks.stores.memory import MemoryStore
from idem_tasks.stores.memory_marker import MemoryMarker
from idem_tasks.stores.sql import SQLStore
from idem_tasks.stores.tiered import TieredStore
from idem_tasks.testing import ManualClock
from idem_tasks.testing.driver import Driver
from idem_tasks.testing.store_in_use import SHORT, StoreInUse

MADE: dict[str, Callable[[pytest.FixtureRequest], Store]] = {
    "memory": lambda _request: MemoryStore(),
    "tiered": lambda _request: TieredStore(MemoryMarker(), MemoryStore()),
    "sqlite": lambda request: SQLStore(request.getfixturevalue("sqlite_url")),
    "postgresql": lambda request: SQLStore(request.getfixturevalue("postgres_database"), create_schema=True),
    "mariadb": lambda request: SQLStore(request.getfixturevalue("mariadb_database"), create_schema=True),
}
CONTENT = b'{"body":{"n":1},"headers":{"a":"b"},"options":{"queue":"q"}}'


class OutboxInUse:
    """An outbox with short arguments; it sees the messages of one scope only, which a test has to itself."""

    def __init__(self, use: StoreInUse) -> None:
        self.use = use
        outbox = outbox_of(use.store)
        assert outbox is not None
        self.outbox: Outbox = outbox

    def recorded(self, key: str = "key", number: int = 3) -> tuple[OutboxMessage, ...]:
        """Finish a new claim of this key with so many messages."""
        lease = self.use.granted(key)
        outcome = with_messages(lease, number)
        assert self.use.finish(lease, outcome) == Recorded()
        return outcome.messages

    def take(
        self, key: str = "key", *, owner: str = "o1", lease: float = 60.0, limit: int = 100
    ) -> list[OutboxMessage]:
        return self.use.driver(self.outbox.take(owner, lease=lease, limit=limit, of=(self.use.scope, key)))

    def settle(self, owner: str = "o1", **how: Any) -> None:
        self.use.driver(self.outbox.settle(owner, **{"sent": [], "failed": [], "rest": [], **how}))

    def left(self, key: str = "key") -> list[OutboxMessage]:
        """Return and delete what there is of a key, leased or not: the last thing that a test asks."""
        self.use.driver.pause(SHORT * 2)
        found = self.take(key, owner="last")
        self.settle("last", sent=found)
        return found


@pytest.fixture(params=MADE)
def store(request: pytest.FixtureRequest) -> Store:
    return MADE[request.param](request)


@pytest.fixture(params=["blocking", "asyncio"])
def box(request: pytest.FixtureRequest, store: Store) -> Iterator[OutboxInUse]:
    runtime: RuntimeName = request.param
    with Driver(runtime) as driver:
        use = StoreInUse(store, driver)
        yield OutboxInUse(use)
        driver(use.store.close())


def with_messages(lease: Lease, number: int = 3) -> EncodedOutcome:
    messages = tuple(
        OutboxMessage(
            message_id(lease.scope, lease.key, lease.fencing_token, n),
            lease.scope, lease.key, lease.fencing_token, n, "mail", CONTENT,
        )
        for n in range(number)
    )  # fmt: skip
    return EncodedOutcome(body=b"1", codec="json", messages=messages)


def test_a_finish_writes_its_messages_in_order(box: OutboxInUse) -> None:
    """What is taken is what was published: ids, bodies, headers and options, in the order of publishing."""
    messages = box.recorded(number=12)
    taken = box.take()
    assert tuple(taken) == messages
    assert (taken[0].body, taken[0].headers, taken[0].options, taken[0].json) == (
        {"n": 1}, {"a": "b"}, {"queue": "q"}, b'{"n":1}',
    )  # fmt: skip


def test_a_finish_whose_reply_was_lost_writes_them_once(box: OutboxInUse) -> None:
    """F21: it is sent again, also after its messages were sent and deleted."""
    lease = box.use.granted()
    outcome = with_messages(lease)
    assert box.use.finish(lease, outcome) == Recorded()
    box.settle(sent=box.take())
    assert box.use.finish(lease, outcome, may_insert=True) == Recorded()
    assert box.left() == []


def test_a_superseded_finish_writes_none(box: OutboxInUse) -> None:
    """F1: neither while the other one runs, nor after its outcome."""
    late = box.use.granted(lease=SHORT)
    other = box.use.taken_over()
    assert box.use.finish(late, with_messages(late), may_insert=True) == Lost()
    assert box.use.finish(other, EncodedOutcome(body=b"2", codec="json")) == Recorded()
    assert isinstance(box.use.finish(late, with_messages(late), may_insert=True), Finished)
    assert box.left() == []


def test_a_record_that_vanished_is_written_again_with_its_messages(box: OutboxInUse) -> None:
    """F45: a database that lost its last moments gets both back, or neither."""
    lease = box.use.granted()
    box.use.release(lease)
    assert box.use.forget()
    assert box.use.finish(lease, with_messages(lease), may_insert=True) == Recorded()
    assert box.use.record().state is State.COMPLETED
    assert tuple(box.left()) == with_messages(lease).messages


def test_a_write_through_writes_them(box: OutboxInUse) -> None:
    """F57: what waited in a marker is recorded with its messages, once."""
    write_through = getattr(box.use.store, "write_through", None)
    if write_through is None:
        pytest.skip("not a record tier")
    lease = box.use.granted()
    outcome = with_messages(lease)
    pending = MarkerPending(lease.owner, lease.fencing_token, None, outcome, None)
    for _ in range(2):
        assert box.use.driver(write_through(lease.scope, lease.key, pending, 60.0))
    assert tuple(box.left()) == outcome.messages
    late = dataclasses.replace(pending, owner="another")
    assert not box.use.driver(write_through(lease.scope, lease.key, late, 60.0))
    assert box.left() == []


def test_what_is_leased_is_nobody_elses(box: OutboxInUse) -> None:
    """Until the lease is over; then they are the same messages, with the same ids."""
    messages = box.recorded()
    assert tuple(box.take(lease=SHORT)) == messages
    assert box.take(owner="o2") == []
    box.use.driver.pause(SHORT + 0.1)
    assert tuple(box.take(owner="o2")) == messages


def test_the_rest_of_a_key_is_not_taken_beside_its_first(box: OutboxInUse) -> None:
    """A limit cuts a key in two; the second part belongs to whoever has the first, also once that is being sent."""
    messages = box.recorded(number=5)
    assert tuple(box.take(limit=2)) == messages[:2]
    assert box.take(owner="o2") == []
    box.settle(sent=messages[:1])
    assert box.take(owner="o2") == []
    box.settle(sent=messages[1:2])
    assert tuple(box.take(owner="o2")) == messages[2:]


def test_a_failed_message_holds_up_its_key_alone(box: OutboxInUse) -> None:
    """It waits, counted and with the type of its error; what comes after it waits with it."""
    messages, others = box.recorded("key"), box.recorded("other")
    taken = box.take()
    box.settle(sent=taken[:1], failed=[FailedSend(taken[1], SHORT, "OSError")], rest=taken[2:])
    assert box.take(owner="o2") == []
    assert tuple(box.take("other", owner="o2")) == others
    box.use.driver.pause(SHORT + 0.1)
    again = box.take(owner="o2")
    assert [message.id for message in again] == [message.id for message in messages[1:]]
    assert [message.attempts for message in again] == [1, 0]


def test_what_is_given_back_is_free_at_once(box: OutboxInUse) -> None:
    """A relay that stops leaves nobody waiting for its lease."""
    messages = box.recorded()
    box.settle(rest=box.take())
    assert tuple(box.take(owner="o2")) == messages


def test_a_late_relay_changes_nothing_of_another(box: OutboxInUse) -> None:
    """F1, F4: its lease ran out; it may not put off nor give back what another has, but deletes what it sent."""
    messages = box.recorded()
    taken = box.take(lease=SHORT)
    box.use.driver.pause(SHORT + 0.1)
    assert tuple(box.take(owner="o2")) == messages
    box.settle(failed=[FailedSend(taken[0], 0.0, "OSError")], rest=taken[1:])
    assert box.take(owner="o3") == []
    box.settle(sent=taken[:1])
    box.settle("o2", rest=messages[1:])
    assert tuple(box.take(owner="o3")) == messages[1:]


def test_a_later_run_comes_after_an_earlier_one(box: OutboxInUse) -> None:
    """Forgotten and run again, the key has messages of two runs, with other ids, in the order of the runs."""
    first = box.recorded()
    assert box.use.forget()
    assert tuple(box.take(limit=1)) == first[:1]
    box.settle(rest=first[:1])
    second = box.recorded()
    assert not {message.id for message in first} & {message.id for message in second}
    assert tuple(box.take()) == first + second


def test_a_purge_leaves_unsent_messages(box: OutboxInUse) -> None:
    """The retention of an outcome is over before its messages were sent."""
    lease = box.use.granted(retention=SHORT, max_hold=SHORT, lease=SHORT, cache_ttl=SHORT)
    outcome = with_messages(lease)
    box.use.finish(lease, outcome)
    box.use.driver.pause(2 * SHORT + 0.1)
    for _ in range(100):  # in the database of all these tests
        if box.use.get() is not None:
            box.use.purge()
    assert box.use.get() is None
    assert tuple(box.left()) == outcome.messages


def test_of_many_at_once_one_takes_a_key(box: OutboxInUse) -> None:
    """Ten relays look at the same moment, again and again: a key's messages go to one of them, all together."""
    for number in range(10):
        key = f"key-{number}"
        messages = box.recorded(key)
        verbs = [partial(box.outbox.take, f"o{n}", lease=60.0, limit=100, of=(box.use.scope, key)) for n in range(10)]
        taken = box.use.driver.together(verbs)
        got = [tuple(each) for each in taken if each]
        assert got in ([messages], []), "all to one; or, where everybody met locks, to nobody yet"
        if not got:
            assert tuple(box.take(key)) == messages


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


@pytest.mark.parametrize("store", ["memory", "sqlite"], indirect=True)
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
