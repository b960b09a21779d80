"""What may be committed of a partition never passes an unfinished message and never goes back."""

from __future__ import annotations

from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from idem_tasks.integrations.kafka_partitions import Partition, Partitions, Taken
from idem_tasks.integrations.settling import Acknowledge, PutBack

PLACE = ("orders", 0)


def partition_with(*offsets: int) -> Partition[str]:
    partition: Partition[str] = Partition(PLACE)
    for offset in offsets:
        partition.add(offset, f"message {offset}")
    return partition


def offsets_of(taken: list[Taken[str]]) -> list[int]:
    return [each.offset for each in taken]


def test_one_message_of_a_partition_runs_at_a_time() -> None:
    """The next one is not given out before the first has ended, and then in order."""
    partition = partition_with(3, 4)
    assert offsets_of(partition.take(0.0)) == [3]
    assert partition.take(0.0) == []
    partition.finish(3)
    assert offsets_of(partition.take(0.0)) == [4]


def test_a_message_that_was_put_back_is_the_next_again() -> None:
    """Nothing behind it runs before it, and it knows how often it was put back."""
    partition = partition_with(3, 4)
    partition.take(0.0)
    partition.put_back(3, due_at=5.0, count=1)
    assert partition.take(4.9) == []
    (again,) = partition.take(5.0)
    assert (again.offset, again.count) == (3, 1)
    assert partition.to_commit() is None


def test_a_batch_commits_its_finished_beginning() -> None:
    """Of a batch whose second message failed, the first may be committed, and the third when the second may be."""
    partition = partition_with(7, 8, 9)
    assert offsets_of(partition.take(0.0, limit=10)) == [7, 8, 9]
    partition.finish(9)
    partition.put_back(8, due_at=1.0, count=1)
    partition.finish(7)
    assert partition.to_commit() == 8
    assert offsets_of(partition.take(1.0, limit=10)) == [8]
    partition.finish(8)
    assert partition.to_commit() == 10


def test_a_batch_waits_until_it_is_full_or_its_first_message_has_waited() -> None:
    """A few messages are not given out at once, nor kept for ever."""
    partition: Partition[str] = Partition(PLACE)
    partition.add(0, "first", 10.0)
    partition.add(1, "second", 10.5)
    assert partition.take(10.9, 3, 1.0) == []
    assert offsets_of(partition.take(11.0, 3, 1.0)) == [0, 1]
    partition.settle([Taken(0, ""), Taken(1, "")], [Acknowledge()], 12.0)
    assert partition.to_commit() == 1
    assert offsets_of(partition.take(12.0, 3, 1.0)) == [1]
    for offset in (2, 3, 4):
        partition.add(offset, "next", 12.0)
    partition.settle([Taken(1, "")], [PutBack(1.0, 1, "")], 12.0)
    assert offsets_of(partition.take(13.0, 3, 9.0)) == [1, 2, 3]


def test_gaps_between_offsets_are_no_messages() -> None:
    """Compaction and transactions leave gaps, which hold nothing up."""
    partition = partition_with(3, 90)
    partition.take(0.0, limit=2)
    partition.finish(3)
    assert partition.to_commit() == 4
    partition.finish(90)
    assert partition.to_commit() == 91


def test_a_commit_is_told_once_unless_it_failed() -> None:
    """What the broker was told is not told again, but for a commit that may not have arrived."""
    partitions: Partitions[str] = Partitions()
    partitions.assign([PLACE])
    partitions.add(PLACE, 0, "message")
    (partition,) = partitions
    partition.take(0.0)
    partition.finish(0)
    assert partitions.to_commit() == {PLACE: 1}
    partitions.committed({PLACE: 1})
    assert partitions.to_commit() == {}
    partitions.uncommitted([PLACE])
    assert partitions.to_commit([PLACE]) == {PLACE: 1}


def test_what_runs_on_a_revoked_partition_may_end() -> None:
    """Its outcome is recorded elsewhere; here it changes nothing, and the partition waits for it when it comes back."""
    partitions: Partitions[str] = Partitions()
    partitions.assign([PLACE])
    partitions.add(PLACE, 0, "message")
    (before,) = partitions
    before.take(0.0)
    partitions.revoke([PLACE])
    assert partitions.is_running
    partitions.add(PLACE, 0, "of nobody")
    partitions.assign([PLACE])
    partitions.add(PLACE, 0, "message")
    (partition,) = partitions
    assert partition.take(0.0) == []
    before.finish(0)
    assert not partitions.is_running
    assert partitions.to_commit() == {}
    assert offsets_of(partition.take(0.0)) == [0]


def test_a_partition_that_is_sought_back_begins_again() -> None:
    """What comes from farther back is run again, and nothing of it counts as finished."""
    partition = partition_with(0, 1, 2)
    for offset in (0, 1):
        partition.take(0.0)
        partition.finish(offset)
    partition.committed(2)
    partition.take(0.0)
    partition.add(0, "again")
    partition.finish(2)
    assert partition.to_commit() is None
    partition.add(1, "again")
    assert offsets_of(partition.take(0.0, limit=5)) == [0, 1]


def test_a_full_partition_is_fetched_again_when_half_empty() -> None:
    """It is neither fetched beyond its limit nor paused and resumed for each message."""
    partition = partition_with(*range(4))
    assert partition.wants_pause(0.0, 4)
    partition.paused = True
    partition.take(0.0)
    assert partition.wants_pause(0.0, 4)
    partition.finish(0)
    partition.take(0.0, limit=2)
    assert not partition.wants_pause(0.0, 4)


class Work(RuleBasedStateMachine):
    """A broker and a group of one consumer, whose handlers end in any order and whose partition is taken away."""

    def __init__(self) -> None:
        super().__init__()
        self.partitions: Partitions[int] = Partitions()
        self.done: set[int] = set()  # recorded
        self.running: list[tuple[Partition[int], int]] = []
        self.delivered = 0
        self.told = 0  # the offset that the broker keeps
        self.now = 0.0
        self._assign()

    def _assign(self) -> None:
        self.partitions.assign([PLACE])
        self.delivered = self.told

    @property
    def partition(self) -> Partition[int]:
        return next(iter(self.partitions))

    @rule(gap=st.integers(0, 2))
    def deliver(self, gap: int) -> None:
        if self.delivered + gap < 60:
            for offset in range(self.delivered, self.delivered + gap):
                self.done.add(offset)  # no message is there
            self.partitions.add(PLACE, self.delivered + gap, 0)
            self.delivered += gap + 1

    @rule(limit=st.integers(1, 4))
    def take(self, limit: int) -> None:
        taken = self.partition.take(self.now, limit)
        assert not (taken and self.running), "one at a time"
        self.running += [(self.partition, each.offset) for each in taken]

    @precondition(lambda self: self.running)
    @rule(data=st.data(), finishes=st.booleans())
    def end(self, data: st.DataObject, finishes: bool) -> None:
        partition, offset = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        if finishes:
            self.done.add(offset)
            partition.finish(offset)
        else:
            partition.put_back(offset, self.now + 1.0, 1)

    @rule()
    def wait(self) -> None:
        self.now += 1.0

    @rule(arrives=st.booleans())
    def commit(self, arrives: bool) -> None:
        offsets = self.partitions.to_commit()
        for offset in offsets.values():
            self._check(offset)
        if arrives:
            self.partitions.committed(offsets)
            self.told = offsets.get(PLACE, self.told)

    @rule(commits=st.booleans())
    def revoke(self, commits: bool) -> None:
        if commits:
            self.commit(arrives=True)
        self.partitions.revoke([PLACE])
        self._assign()

    def _check(self, offset: int) -> None:
        assert offset >= self.told, "never back"
        assert set(range(offset)) <= self.done, "never beyond what is not finished"

    @invariant()
    def what_may_be_committed_is_finished(self) -> None:
        for offset in self.partitions.to_commit().values():
            self._check(offset)


TestWork = Work.TestCase
TestWork.settings = settings(max_examples=100, stateful_step_count=40)


@given(st.permutations(range(8)))
def test_completions_in_any_order_commit_everything(order: list[int]) -> None:
    """However the messages of a batch end, the offset only grows, and ends behind the last."""
    partition = partition_with(*range(8))
    partition.take(0.0, limit=8)
    before = 0
    for position, offset in enumerate(order):
        partition.finish(offset)
        may = partition.to_commit() or 0
        assert before <= may <= min(order[position + 1 :], default=8)
        before = may
    assert before == 8
