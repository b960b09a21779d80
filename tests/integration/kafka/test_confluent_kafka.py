"""Messages of Kafka through confluent-kafka: run once, in their order, committed behind their outcomes."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, Message, Producer, TopicPartition

from idem_tasks import ConfigurationError, Idempotency, current_claim
from idem_tasks.claims import State
from idem_tasks.integrations.confluent_kafka import IdempotentConsumer
from tests.integration.kafka.topics import SECONDS, Topic, consuming
from tests.services.run import REPOSITORY
from tests.services.waiting import wait_until


def value_of(message: Message) -> str:
    return (message.value() or b"").decode()


def test_a_duplicate_is_replayed_whatever_its_key_comes_from(topic: Topic, idem: Idempotency) -> None:
    """A key is the publisher's header, else the CloudEvent's source and id, else the place of the message."""
    keys = []

    def handler(message: Message) -> str:
        keys.append((current_claim().scope, current_claim().key))
        return value_of(message)

    for _ in range(2):
        topic.publish("one", Idempotency_key="A-1")
        topic.publish("two", ce_source="/shop", ce_id="e-1")
    topic.publish("three")
    nothing: list[Any] = [("Idempotency-Key", b"A-1"), ("Idempotency-Key", None), ("idempotency-key", b"")]
    topic.producer.produce(topic.name, "one", partition=0, headers=nothing)
    topic.producer.flush()
    with consuming(topic, handler, idempotency=idem, buffer=1):
        wait_until(lambda: topic.committed() == 6, seconds=SECONDS, what="the commit")
    assert keys == [(topic.scope, key) for key in ("A-1", "/shop e-1", f"{topic.name}:0:4")]


def test_a_key_in_progress_holds_up_its_own_partition_only(topic: Topic, idem: Idempotency) -> None:
    """It is tried again until it is free, what is behind it waits, and another partition goes on (F31)."""
    handled = []
    topic.publish("first", Idempotency_key="A-1")
    topic.publish("second")
    topic.publish("other", partition=1)
    with (
        idem.claim(scope=topic.scope, key="A-1", fingerprint=b"first") as claim,
        consuming(topic, lambda message: handled.append(value_of(message)), idempotency=idem),
    ):
        wait_until(lambda: topic.committed(1) == 1, seconds=SECONDS, what="the other partition")
        assert (handled, topic.committed(0)) == (["other"], 0)
        claim.complete("done elsewhere")
        wait_until(lambda: topic.committed(0) == 2, seconds=SECONDS, what="the held up partition")
    assert handled == ["other", "second"]


def test_a_batch_runs_what_is_new_and_fails_by_its_members(topic: Topic, idem: Idempotency) -> None:
    """One of them is poisoned and a dead letter, one comes again, and no offset passes what is not finished."""
    batches, may_succeed = [], threading.Event()

    def handler(messages: list[Message]) -> list[object]:
        batches.append([value_of(message) for message in messages])
        ends: dict[str, object] = {"bad": ValueError(), "late": None if may_succeed.is_set() else OSError()}
        return [ends.get(value_of(message), "done") for message in messages]

    for value in ("one", "bad", "one", "late", "two"):
        topic.publish(value, Idempotency_key=value)
    with consuming(
        topic,
        handler,
        idempotency=idem,
        batch=True,
        batch_size=5,
        batch_wait=5.0,
        record_failures=(ValueError,),
        dead_letter_topic=topic.dead,
        producer=topic.producer,
    ):
        wait_until(lambda: topic.committed() == 3, seconds=SECONDS, what="the commit of the beginning")
        may_succeed.set()
        wait_until(lambda: topic.committed() == 5, seconds=SECONDS, what="the commit")
    assert batches[0] == ["one", "bad", "late", "two"]
    assert {tuple(batch) for batch in batches[1:]} == {("late",)}
    assert [dead.value() for dead in topic.dead_letters(1)] == [b"bad"]


def test_what_is_poisoned_becomes_a_dead_letter(topic: Topic, idem: Idempotency) -> None:
    """With its key, value and headers, and with those that say why; confirmed before its offset is committed."""

    def handler(message: Message) -> None:
        if value_of(message) == "bad":
            raise ValueError("never mind")

    topic.publish("bad", Idempotency_key="A-1", trace="t-1")
    topic.publish("good")
    with consuming(
        topic,
        handler,
        idempotency=idem,
        record_failures=(ValueError,),
        dead_letter_topic=topic.dead,
        producer=topic.producer,
    ):
        wait_until(lambda: topic.committed() == 2, seconds=SECONDS, what="the commit")
    (dead,) = topic.dead_letters(1)
    assert (dead.key(), dead.value()) == (b"a key", b"bad")
    assert dict(dead.headers() or ()) == {
        "Idempotency-key": b"A-1",
        "trace": b"t-1",
        "idem_tasks_reason": b"failed",
        "idem_tasks_error_type": b"ValueError",
        "idem_tasks_origin": f"{topic.name}:0:0".encode(),
    }


def test_a_dead_letter_that_no_broker_takes_is_none(
    topic: Topic, idem: Idempotency, caplog: pytest.LogCaptureFixture
) -> None:
    """Its offset is not committed, and it is tried again until a broker confirms it."""

    def handler(message: Message) -> None:
        raise ValueError

    topic.publish("bad")
    lost = Producer({"bootstrap.servers": "127.0.0.1:1", "message.timeout.ms": 300, "log_level": 0})
    options = {"record_failures": (ValueError,), "dead_letter_topic": topic.dead}
    with consuming(topic, handler, idempotency=idem, producer=lost, **options):
        wait_until(lambda: caplog.text.count("is no dead letter yet") == 2, seconds=SECONDS, what="two errors")
        assert topic.committed() == 0
    with consuming(topic, handler, idempotency=idem, producer=topic.producer, **options):
        wait_until(lambda: topic.committed() == 1, seconds=SECONDS, what="the commit")
    assert len(topic.dead_letters(1)) == 1


def test_what_ends_a_process_ends_the_consumer(topic: Topic, idem: Idempotency) -> None:
    """Its message is not committed, its claim is given back, and `run` raises it in its own thread."""

    def handler(message: Message) -> None:
        raise SystemExit(3)

    topic.publish("message")
    consumer = IdempotentConsumer(topic.config, handler, idempotency=idem)
    with consumer, pytest.raises(SystemExit):
        consumer.run([topic.name])
    record = idem.get(topic.scope, f"{topic.name}:0:0")
    assert record is not None
    assert (record.state, topic.committed()) == (State.RELEASED, 0)
    with pytest.raises(ConfigurationError, match="has ended"):
        consumer.run([topic.name])


def test_without_a_topic_for_dead_letters_the_partition_waits(
    topic: Topic, idem: Idempotency, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is dropped and nothing is passed; once a person has resolved the record it goes on."""
    handled = []

    def handler(message: Message) -> None:
        if value_of(message) == "bad":
            raise ValueError
        handled.append(value_of(message))

    def is_parked() -> bool:
        record = idem.get(topic.scope, "A-1")
        return record is not None and record.state is State.PARKED

    topic.publish("bad", Idempotency_key="A-1")
    topic.publish("good")
    with consuming(topic, handler, idempotency=idem, max_attempts=1):
        wait_until(lambda: is_parked() and "dead_letter_topic=" in caplog.text, seconds=SECONDS, what="the error")
        assert (handled, topic.committed()) == ([], 0)
        idem.resolve(topic.scope, "A-1", outcome=None)
        wait_until(lambda: topic.committed() == 2, seconds=SECONDS, what="the commit")
    assert handled == ["good"]


def test_a_long_handler_costs_nothing_of_the_group(
    topic: Topic, idem: Idempotency, caplog: pytest.LogCaptureFixture
) -> None:
    """Beyond max.poll.interval.ms the consumer is still a member, because it is polled meanwhile."""
    may_end, others = threading.Event(), []

    def handler(message: Message) -> None:
        if value_of(message) == "long":
            assert may_end.wait(SECONDS)
        others.append(value_of(message))

    topic.publish("long")
    config = topic.config | {"max.poll.interval.ms": 4000}
    with consuming(topic, handler, idempotency=idem, client=config):
        wait_until(lambda: idem.get(topic.scope, f"{topic.name}:0:0") is not None, seconds=SECONDS, what="the handler")
        assert not may_end.wait(5.0)
        topic.publish("short", partition=1)
        wait_until(lambda: others == ["short"], seconds=SECONDS, what="the other partition")
        may_end.set()
        wait_until(lambda: topic.committed() == 1, seconds=SECONDS, what="the commit")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("strategy", ["range,roundrobin", "cooperative-sticky"])
def test_a_handler_that_runs_through_a_rebalance_runs_once(
    topic: Topic, idem: Idempotency, caplog: pytest.LogCaptureFixture, strategy: str
) -> None:
    """Its outcome is recorded, the new owner replays it, and a commit of the old owner's does no harm."""
    caplog.set_level(logging.INFO, "idem_tasks")
    may_end, begun, met = threading.Event(), [], threading.Event()

    def handler(message: Message) -> str:
        begun.append(value_of(message))
        assert may_end.wait(SECONDS)
        return value_of(message)

    def observe(event: object) -> None:
        if getattr(event, "name", None) == "in_progress":
            met.set()

    config = topic.config | {"partition.assignment.strategy": strategy}
    for partition in range(4):
        topic.publish(f"message {partition}", partition=partition)
    with (
        Idempotency(store=idem.store, observers=[observe]) as other,
        consuming(topic, handler, idempotency=idem, client=config),
    ):
        wait_until(lambda: len(begun) == 4, seconds=SECONDS, what="four handlers")
        with consuming(topic, handler, idempotency=other, client=config):
            assert met.wait(SECONDS), "the new owner meets what runs still"
            may_end.set()
            wait_until(
                lambda: [topic.committed(partition) for partition in range(4)] == [1] * 4,
                seconds=SECONDS,
                what="the commits",
            )
            _commit_as_a_stranger(topic, idem)
    assert sorted(begun) == [f"message {partition}" for partition in range(4)]
    assert "a commit came too late" in caplog.text


def test_a_consumer_that_ends_fetches_nothing_more(topic: Topic, idem: Idempotency) -> None:
    """Though its last handler is long, and its group gives it more partitions meanwhile."""
    begun, may_end = threading.Event(), threading.Event()

    def handler(_message: Message) -> None:
        begun.set()
        assert may_end.wait(SECONDS)

    def partitions_of(consumer: IdempotentConsumer) -> list[int]:
        return [partition.place[1] for partition in consumer._partitions]

    with consuming(topic, handler, idempotency=idem) as ending:
        with consuming(topic, handler, idempotency=idem):
            wait_until(lambda: len(partitions_of(ending)) == 2, seconds=SECONDS, what="two of four partitions")
            topic.publish("long", partition=partitions_of(ending)[0])
            assert begun.wait(SECONDS)
            ending.stop()
        try:
            wait_until(lambda: len(partitions_of(ending)) == 4, seconds=SECONDS, what="all partitions")
            for number in range(4):
                topic.publish("short", partition=number)
            assert not may_end.wait(1.0)
            assert [partition.waiting for partition in ending._partitions] == [0] * 4
        finally:
            may_end.set()


def _commit_as_a_stranger(topic: Topic, idem: Idempotency) -> None:
    """As a consumer whose group has gone on without it, which a member's generation tells the broker."""
    client = Consumer(topic.config | {"enable.auto.commit": False})
    stranger = IdempotentConsumer(client, value_of, group=topic.group, idempotency=idem)
    stranger._client, place = client, (topic.name, 0)
    client.assign([TopicPartition(*place)])
    stranger._partitions.assign([place])
    stranger._partitions.add(place, 0, None)  # type: ignore[arg-type] # nobody looks at it
    (partition,) = stranger._partitions
    partition.take(0.0)
    partition.finish(0)
    stranger.close()


def test_what_a_killed_consumer_had_begun_is_delivered_again(topic: Topic, postgres_url: str, tmp_path: Path) -> None:
    """Another takes partition and claim over, nothing is lost, and a zombie changes nothing (F1)."""
    for number in range(4):
        topic.publish(f"message {number}", Idempotency_key=f"A-{number}")
    began, may_end = tmp_path / "began", tmp_path / "may_end"
    command = [sys.executable, "-m", "tests.integration.kafka.hanging_consumer"]
    command += [topic.bootstrap, topic.name, postgres_url, str(began), str(may_end)]
    handled = []
    with Idempotency.from_urls(database_url=postgres_url, create_schema=True, lease=1.0) as idem:
        idem.prepare()
        with subprocess.Popen(command, cwd=REPOSITORY) as hanging:
            try:
                wait_until(began.exists, seconds=SECONDS, what="the handler in the other process")
            finally:
                hanging.kill()
        began.unlink()
        with subprocess.Popen(command, cwd=REPOSITORY) as zombie:
            try:
                wait_until(began.exists, seconds=SECONDS, what="the handler in the second process")
                zombie.send_signal(signal.SIGSTOP)
                with consuming(topic, lambda message: handled.append(value_of(message)), idempotency=idem):
                    wait_until(lambda: topic.committed() == 4, seconds=SECONDS, what="the commit")
                    may_end.touch()
                    zombie.send_signal(signal.SIGCONT)
                    zombie.send_signal(signal.SIGTERM)
                    assert zombie.wait(SECONDS) == 0
            finally:
                zombie.kill()
        assert handled == [f"message {number}" for number in range(4)]
        assert topic.committed() == 4
        record = idem.get(topic.scope, "A-0")
        assert record is not None
        assert (record.state, record.attempts) == (State.COMPLETED, 3)


@pytest.mark.parametrize(
    "config, options, says",
    [
        ({"group.id": "g", "enable.auto.commit": True}, {}, "'enable.auto.commit': False"),
        ({"group.id": "g", "enable.auto.commit": "true"}, {}, "'enable.auto.commit': False"),
        ({}, {}, "group.id"),
        ({"group.id": "g"}, {"dead_letter_topic": "dead"}, "producer="),
        ({"group.id": "g"}, {"workers": 0}, "workers"),
        ({"group.id": "g"}, {"batch": True, "batch_size": 1001}, "no more than buffer"),
        ({"group.id": "g"}, {"batch": True, "watermark": True}, "leave out batch"),
        ({"group.id": "g"}, {"watermark": True}, "session="),
        ({"group.id": "g"}, {"watermark": True, "key": "{message}"}, "leave them out"),
    ],
)
def test_what_cannot_work_is_refused_at_once(config: dict[str, object], options: dict[str, object], says: str) -> None:
    """The error names what to change; auto-commit would lose messages whose worker dies (F44)."""
    with pytest.raises(ConfigurationError, match=says):
        IdempotentConsumer(config, value_of, **options)  # type: ignore[arg-type]


def test_a_client_of_the_users_own_needs_the_name_of_its_group(topic: Topic) -> None:
    """It does not tell it, and the default scope is made of it."""
    client = Consumer(topic.config)
    with pytest.raises(ConfigurationError, match="group="):
        IdempotentConsumer(client, value_of)
    client.close()
