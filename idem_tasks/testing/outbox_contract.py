"""The contract of an outbox as tests: for stores that have one beside their records, as `Outbox` says.

Make a subclass in a test module and give it a fixture `store`, as for `StoreContract`.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest

from idem_tasks.claims import EncodedOutcome, Finished, Lease, Lost, OutboxMessage, Recorded, State
from idem_tasks.outbox import message_id
from idem_tasks.stores.base import FailedSend, MarkerPending, Outbox, outbox_of
from idem_tasks.testing.contract import StoreSuite
from idem_tasks.testing.store_in_use import SHORT, StoreInUse

_CONTENT = b'{"body":{"n":1},"headers":{"a":"b"},"options":{"queue":"q"}}'


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


def with_messages(lease: Lease, number: int = 3) -> EncodedOutcome:
    """Return an outcome with so many messages."""
    messages = tuple(
        OutboxMessage(
            message_id(lease.scope, lease.key, lease.fencing_token, n),
            lease.scope, lease.key, lease.fencing_token, n, "mail", _CONTENT,
        )
        for n in range(number)
    )  # fmt: skip
    return EncodedOutcome(body=b"1", codec="json", messages=messages)


class OutboxContract(StoreSuite):
    """What an outbox promises; a subclass gives the store."""

    @pytest.fixture
    def box(self, use: StoreInUse) -> OutboxInUse:
        """The outbox of the store in one runtime."""
        return OutboxInUse(use)

    def test_a_finish_writes_its_messages_in_order(self, box: OutboxInUse) -> None:
        """What is taken is what was published: ids, bodies, headers and options, in the order of publishing."""
        messages = box.recorded(number=12)
        taken = box.take()
        assert tuple(taken) == messages
        assert (taken[0].body, taken[0].headers, taken[0].options, taken[0].json) == (
            {"n": 1}, {"a": "b"}, {"queue": "q"}, b'{"n":1}',
        )  # fmt: skip

    def test_a_finish_whose_reply_was_lost_writes_them_once(self, box: OutboxInUse) -> None:
        """F21: it is sent again, also after its messages were sent and deleted."""
        lease = box.use.granted()
        outcome = with_messages(lease)
        assert box.use.finish(lease, outcome) == Recorded()
        box.settle(sent=box.take())
        assert box.use.finish(lease, outcome, may_insert=True) == Recorded()
        assert box.left() == []

    def test_a_superseded_finish_writes_none(self, box: OutboxInUse) -> None:
        """F1: neither while the other one runs, nor after its outcome."""
        late = box.use.granted(lease=SHORT)
        other = box.use.taken_over()
        assert box.use.finish(late, with_messages(late), may_insert=True) == Lost()
        assert box.use.finish(other, EncodedOutcome(body=b"2", codec="json")) == Recorded()
        assert isinstance(box.use.finish(late, with_messages(late), may_insert=True), Finished)
        assert box.left() == []

    def test_a_record_that_vanished_is_written_again_with_its_messages(self, box: OutboxInUse) -> None:
        """F45: a database that lost its last moments gets both back, or neither."""
        lease = box.use.granted()
        box.use.release(lease)
        assert box.use.forget()
        assert box.use.finish(lease, with_messages(lease), may_insert=True) == Recorded()
        assert box.use.record().state is State.COMPLETED
        assert tuple(box.left()) == with_messages(lease).messages

    def test_what_waits_already_is_not_there_twice(self, box: OutboxInUse) -> None:
        """A finish that is sent again finds its record forgotten, and its messages not sent yet (F21, F45)."""
        lease = box.use.granted()
        outcome = with_messages(lease)
        assert box.use.finish(lease, outcome) == Recorded()
        assert box.use.forget()
        assert box.use.finish(lease, outcome, may_insert=True) == Recorded()
        assert tuple(box.left()) == outcome.messages

    def test_a_write_through_writes_them(self, box: OutboxInUse) -> None:
        """F57: what waited in a marker is recorded with its messages, once."""
        write_through = getattr(box.use.store, "write_through", None)
        if write_through is None:
            return  # no store behind a marker: nothing waits there for it
        lease = box.use.granted()
        outcome = with_messages(lease)
        pending = MarkerPending(lease.owner, lease.fencing_token, None, outcome, None)
        for _ in range(2):
            assert box.use.driver(write_through(lease.scope, lease.key, pending, 60.0))
        assert tuple(box.left()) == outcome.messages
        late = dataclasses.replace(pending, owner="another")
        assert not box.use.driver(write_through(lease.scope, lease.key, late, 60.0))
        assert box.left() == []

    def test_what_is_leased_is_nobody_elses(self, box: OutboxInUse) -> None:
        """Until the lease is over; then they are the same messages, with the same ids."""
        messages = box.recorded()
        assert tuple(box.take(lease=SHORT)) == messages
        assert box.take(owner="o2") == []
        box.use.driver.pause(SHORT + 0.1)
        assert tuple(box.take(owner="o2")) == messages

    def test_the_rest_of_a_key_is_not_taken_beside_its_first(self, box: OutboxInUse) -> None:
        """A limit cuts a key in two; the second part belongs to whoever has the first, also once that is being sent."""
        messages = box.recorded(number=5)
        assert tuple(box.take(limit=2)) == messages[:2]
        assert box.take(owner="o2") == []
        box.settle(sent=messages[:1])
        assert box.take(owner="o2") == []
        box.settle(sent=messages[1:2])
        assert tuple(box.take(owner="o2")) == messages[2:]

    def test_a_failed_message_holds_up_its_key_alone(self, box: OutboxInUse) -> None:
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

    def test_what_is_given_back_is_free_at_once(self, box: OutboxInUse) -> None:
        """A relay that stops leaves nobody waiting for its lease."""
        messages = box.recorded()
        box.settle(rest=box.take())
        assert tuple(box.take(owner="o2")) == messages

    def test_a_late_relay_changes_nothing_of_another(self, box: OutboxInUse) -> None:
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

    def test_a_later_run_comes_after_an_earlier_one(self, box: OutboxInUse) -> None:
        """Forgotten and run again, the key has messages of two runs, with other ids, in the order of the runs."""
        first = box.recorded()
        assert box.use.forget()
        assert tuple(box.take(limit=1)) == first[:1]
        box.settle(rest=first[:1])
        second = box.recorded()
        assert not {message.id for message in first} & {message.id for message in second}
        assert tuple(box.take()) == first + second

    def test_a_purge_leaves_unsent_messages(self, box: OutboxInUse) -> None:
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

    def test_of_many_at_once_one_takes_a_key(self, box: OutboxInUse) -> None:
        """Ten relays look at the same moment, again and again: a key's messages go to one of them, all together."""
        for number in range(10):
            key = f"key-{number}"
            messages = box.recorded(key)
            verbs = [
                partial(box.outbox.take, f"o{n}", lease=60.0, limit=100, of=(box.use.scope, key)) for n in range(10)
            ]
            taken = box.use.driver.together(verbs)
            got = [tuple(each) for each in taken if each]
            assert got in ([messages], []), "all to one; or, where everybody met locks, to nobody yet"
            if not got:
                assert tuple(box.take(key)) == messages
