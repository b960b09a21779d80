"""Handlers around messages of Kafka, with confluent-kafka: polled, run once for each key, recorded, then committed.

    with IdempotentConsumer({"bootstrap.servers": "...", "group.id": "billing"}, handler) as consumer:
        consumer.run(["orders"])

Handlers run in threads, and the thread of `run` polls on, so that a long one costs the consumer neither its place in
the group nor its partitions. A partition is worked on in its order, one message at a time. An offset is committed once
it and all before it are finished: their outcome is recorded, or they are dead letters that the broker has confirmed.
What is lost with a commit is only replayed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Literal, Self, Unpack

from idem_tasks.errors import ConfigurationError, MissingExtraError
from idem_tasks.idempotency import Idempotency
from idem_tasks.integrations.kafka_handling import (
    BATCH_SIZE,
    BATCH_WAIT,
    BODY,
    BUFFER,
    COMMIT_EVERY,
    FETCHED_AT_ONCE,
    POLL_SECONDS,
    Origin,
    check_batches,
    dead_letter_headers,
    ends_of,
    handling_for,
    log_not_delivered,
    logger,
    topic_names,
)
from idem_tasks.integrations.kafka_partitions import Partition, Partitions, Place, Taken
from idem_tasks.integrations.settling import LONGEST_DELAY, Acknowledge, DeadLetter, OnError, PutBack
from idem_tasks.policy import Policy, PolicyFields

try:
    from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
except ImportError as error:
    raise MissingExtraError(package="confluent-kafka", extra="kafka") from error

WORKERS = 4
"""Threads for handlers; more than there are partitions are never at work."""

_HARMLESS = frozenset(
    getattr(KafkaError, name)
    for name in (
        "UNKNOWN_MEMBER_ID",
        "ILLEGAL_GENERATION",
        "REBALANCE_IN_PROGRESS",
        "FENCED_INSTANCE_ID",
        "FENCED_MEMBER_EPOCH",
        "STALE_MEMBER_EPOCH",
        "_ASSIGNMENT_LOST",
        "_NO_OFFSET",
    )
    if hasattr(KafkaError, name)
)
"""What answers the commit of a consumer whose partition is another's by now: that one replays the outcomes."""


class IdempotentConsumer:
    """Polls topics, and runs the handler once for each key; messages are committed behind their outcomes."""

    def __init__(
        self,
        consumer: Consumer | Mapping[str, Any],
        handler: Callable[..., Any],
        *,
        group: str | None = None,
        key: str | Callable[..., object] | None = None,
        scope: str | Callable[..., object] | None = None,
        fingerprint: str | Sequence[str] | Callable[..., object] | None = BODY,
        session: Any = None,
        watermark: bool = False,
        idempotency: Idempotency | None = None,
        policy: Policy | None = None,
        on_error: OnError = "put_back",
        longest_delay: float = LONGEST_DELAY,
        dead_letter_topic: str | None = None,
        producer: Producer | None = None,
        workers: int = WORKERS,
        batch: bool = False,
        batch_size: int = BATCH_SIZE,
        batch_wait: float = BATCH_WAIT,
        buffer: int = BUFFER,
        commit_every: float = COMMIT_EVERY,
        **fields: Unpack[PolicyFields],
    ) -> None:
        """`consumer` is the client's configuration, or a `Consumer` made with `enable.auto.commit: False`.

        A `Consumer` tells neither its auto-commit nor its group, so give it `group=`, its `group.id`. `handler` is
        called with a `confluent_kafka.Message`.

        `key` is a template over the handler's parameters or a callable given the message. The default is the header
        `Idempotency-Key`, else the source and id of a CloudEvent, else `topic:partition:offset`. `scope` is
        `topic/group`, `fingerprint` the value of the message. `session`, `idempotency`, `policy` and its fields are
        those of `idempotent_task`. `watermark` keeps one mark a partition instead of a record a message: see
        `kafka_watermark.WatermarkHandler` for when it may be used.

        A message that cannot be acknowledged now comes again after a delay of up to `longest_delay` seconds, and its
        partition waits. One that never can be goes to `dead_letter_topic` through `producer`; without them its
        partition waits for a person.

        With `batch` the handler is that of `idempotent_batch`: it is called with a list of messages of one partition,
        `batch_size` of them, or fewer when the first has waited `batch_wait` seconds.

        `buffer` messages of a partition wait here at most, and about a hundred more: take fewer for large messages.
        Every `commit_every` seconds what is finished is committed.

        Raises `ConfigurationError` for what cannot work, auto-commit above all.
        """
        self._config = None if isinstance(consumer, Consumer) else _without_auto_commit(consumer)
        self._given = consumer if isinstance(consumer, Consumer) else None
        if (dead_letter_topic is None) != (producer is None):
            raise ConfigurationError("dead_letter_topic= and producer= go together: a Producer sends the dead letters")
        if workers < 1 or buffer < 1 or not commit_every > 0:
            raise ConfigurationError("workers and buffer must be 1 or more, and commit_every more than 0 seconds")
        if batch:
            check_batches(batch_size, batch_wait, buffer)
        options: dict[str, Any] = {"idempotency": idempotency, **fields}
        if policy is not None:
            options["policy"] = policy
        self._handling = handling_for(
            handler,
            runtime="blocking",
            origin=_origin,
            group=group or (None if self._config is None else str(self._config["group.id"])),
            key=key,
            scope=scope,
            fingerprint=fingerprint,
            session=session,
            watermark=watermark,
            batch=batch,
            has_road=dead_letter_topic is not None,
            options=options,
            on_error=on_error,
            longest_delay=longest_delay,
        )
        self._longest_delay = longest_delay
        self._dead_letter_topic = dead_letter_topic
        self._producer = producer
        self._batch = batch
        self._at_once = (batch_size, float(batch_wait)) if batch else (1, 0.0)
        self._buffer = buffer
        self._commit_every = commit_every
        self._partitions: Partitions[Message] = Partitions()
        self._changing = threading.Lock()  # of the partitions: by handlers' threads and by that of `run`
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="idem_tasks_kafka")
        self._client: Any = None
        self._stopping = threading.Event()
        self._struck: BaseException | None = None

    # Running

    def run(self, topics: Iterable[str], *, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Consume these topics until `should_stop()` is true or `stop` was called; then let handlers end, and close.

        Raises `KafkaException` where the client cannot go on, and what ends a process (`SystemExit`), be it raised in
        a handler. Runs once.
        """
        if self._stopping.is_set():
            raise ConfigurationError("this consumer has ended: make another one")
        names = topic_names(topics)
        client = self._client = self._given or Consumer({"on_commit": self._hear_of_commit, **(self._config or {})})
        try:
            client.subscribe(names, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost)
            commit_at = time.monotonic() + self._commit_every
            while not (self._stopping.is_set() or should_stop()):
                self._fetch()
                self._start()
                self._steer()
                if time.monotonic() >= commit_at:
                    self._commit()
                    commit_at = time.monotonic() + self._commit_every
            self._stopping.set()
            self._let_handlers_end()
        finally:
            self.close()
        if self._struck is not None:
            raise self._struck

    def stop(self) -> None:
        """Let `run` end; may be called from any thread and from a signal's handler."""
        self._stopping.set()

    def close(self) -> None:
        """Let handlers end, commit what is finished, and leave the group; does nothing the second time."""
        self._stopping.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        client, self._client = self._client, None
        if client is not None:
            self._commit(client=client, waits=True)
            client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        self.close()
        return False

    def _let_handlers_end(self) -> None:
        """Poll on, so that the group does not take a handler that takes its time for dead."""
        while self._partitions_run():
            self._client.pause(self._client.assignment())  # which a rebalance may have changed
            self._fetch()

    def _partitions_run(self) -> bool:
        with self._changing:
            return self._partitions.is_running

    # Messages in

    def _fetch(self) -> None:
        seconds = POLL_SECONDS
        for _ in range(FETCHED_AT_ONCE):
            message = self._client.poll(seconds)
            if message is None:
                return
            seconds = 0.0
            if message.error() is not None:
                _note(message.error())
                continue
            place = message.topic(), message.partition()
            with self._changing:
                self._partitions.add(place, message.offset(), message, time.monotonic())

    def _start(self) -> None:
        """Let every partition that may go on do so."""
        now = time.monotonic()
        with self._changing:
            for partition in self._partitions:
                self._start_next(partition, now)

    def _start_next(self, partition: Partition[Message], now: float) -> None:
        if not self._stopping.is_set():
            taken = partition.take(now, *self._at_once)
            if taken:
                self._pool.submit(self._work, partition, taken)

    def _steer(self) -> None:
        """Pause the partitions that wait or have enough here, and resume the others."""
        now, changed = time.monotonic(), []
        with self._changing:
            for partition in self._partitions:
                if partition.wants_pause(now, self._buffer) != partition.paused:
                    partition.paused = not partition.paused
                    changed.append((partition.paused, TopicPartition(*partition.place)))
        for paused, place in changed:
            (self._client.pause if paused else self._client.resume)([place])

    # Messages through

    def _work(self, partition: Partition[Message], taken: list[Taken[Message]]) -> None:
        """Run one message, or a batch, on a thread of its own; then its partition may go on."""
        settlements: list[Acknowledge | PutBack] = []
        try:
            if not (partition.closed or self._stopping.is_set()):  # while it waited for a thread
                self._settle(taken, settlements)
        except BaseException as error:
            self._struck = error
            self._stopping.set()
            raise
        finally:
            with self._changing:
                now = time.monotonic()
                partition.settle(taken, settlements, now)
                self._start_next(partition, now)

    def _settle(self, taken: list[Taken[Message]], settlements: list[Acknowledge | PutBack]) -> None:
        """Run the handler, and append what is to be done with each message."""
        raised: BaseException | None = None
        messages = [each.message for each in taken]
        try:
            self._handling.function(messages if self._batch else messages[0])
        except BaseException as error:  # noqa: BLE001 - what ends a process ends `run`, on its own thread
            raised = error
            if not isinstance(error, Exception):
                self._struck = error
                self._stopping.set()
        for each, end in zip(taken, ends_of(raised, len(taken), batch=self._batch), strict=True):
            origin = _origin(each.message).text
            settlement = self._handling.settle(end, each.count, origin, (each.message,), {})
            if isinstance(settlement, DeadLetter):
                settlement = self._dead_letter(each, settlement)
            settlements.append(settlement)

    def _dead_letter(self, taken: Taken[Message], letter: DeadLetter) -> Acknowledge | PutBack:
        """Have the broker confirm the dead letter, and only then let its offset count as finished."""
        origin, later = _origin(taken.message), PutBack(self._longest_delay, taken.count + 1, letter.reason)
        assert self._dead_letter_topic is not None, "it would have been put back"
        try:
            failed = self._produce(self._dead_letter_topic, taken.message, letter.headers)
        except Exception as error:  # noqa: BLE001 - whatever the producer has against it
            failed = error
        if failed is None:
            return Acknowledge()
        log_not_delivered(origin, self._dead_letter_topic, failed, later.delay)
        return later

    def _produce(self, topic: str, message: Message, reasons: Mapping[str, str]) -> object:
        """Produce a copy of the message and wait for the broker's answer; returns why it was not taken, or None."""
        answers: list[object] = []
        assert self._producer is not None
        self._producer.produce(
            topic,
            value=message.value(),
            key=message.key(),
            headers=dead_letter_headers(_headers(message), reasons),
            on_delivery=lambda error, _message: answers.append(error),
        )
        while not answers:  # the client answers within its message.timeout.ms, 300 s unless it was told otherwise
            self._producer.poll(POLL_SECONDS)
            if self._stopping.is_set() and not answers:
                self._producer.flush(_FLUSH_SECONDS)
                return answers[0] if answers else "the consumer ended"
        return answers[0]

    # Offsets out

    def _commit(self, places: Iterable[Place] | None = None, *, client: Any = None, waits: bool = False) -> None:
        """Commit what is finished, of these partitions or of all; a failure is noted, and it is done again later."""
        with self._changing:
            if waits:  # what was sent before may not have arrived
                self._partitions.uncommitted(partition.place for partition in self._partitions)
            offsets = self._partitions.to_commit(places)
            self._partitions.committed(offsets)
        if not offsets:
            return
        client = client or self._client
        wanted = [TopicPartition(*place, offset) for place, offset in offsets.items()]
        try:
            answer = client.commit(offsets=wanted, asynchronous=not waits)
        except KafkaException as error:
            self._note_commit(error.args[0], wanted)
        else:
            for place in answer or ():
                self._note_commit(place.error, [place])

    def _hear_of_commit(self, error: Any, places: list[TopicPartition]) -> None:
        """Hear what became of a commit; a client that was configured here calls this while it polls."""
        for place in places or ():
            self._note_commit(error or place.error, [place])

    def _note_commit(self, error: Any, places: Iterable[TopicPartition]) -> None:
        if error is None:
            return
        with self._changing:
            self._partitions.uncommitted((place.topic, place.partition) for place in places)
        if error.code() in _HARMLESS:
            logger.info("a commit came too late, and its messages will be replayed: %s", error.name())
        else:
            logger.warning("a commit failed, and is tried again: %s", error.name())

    # Rebalances; the client calls these while it polls

    def _on_assign(self, _client: Consumer, assigned: list[TopicPartition]) -> None:
        places = _places(assigned)
        with self._changing:
            self._partitions.assign(places)
            for partition in self._partitions:
                if partition.place in places:
                    partition.paused = True  # as it may have been when it was ours before; `_steer` resumes it

    def _on_revoke(self, client: Consumer, revoked: list[TopicPartition]) -> None:
        """Commit what is finished before another consumer begins; what runs may end, and is replayed there."""
        self._commit(_places(revoked), client=client, waits=True)
        self._on_lost(client, revoked)

    def _on_lost(self, _client: Consumer, lost: list[TopicPartition]) -> None:
        with self._changing:
            self._partitions.revoke(_places(lost))


_FLUSH_SECONDS = 5.0
"""How long a consumer that ends waits for the broker to confirm a dead letter; without that it comes again."""


def _without_auto_commit(given: Mapping[str, Any]) -> dict[str, Any]:
    config = dict(given)
    if str(config.get("enable.auto.commit", False)).lower() not in ("false", "0"):
        raise ConfigurationError(
            "enable.auto.commit commits messages whose handler has not ended, which are lost if the worker dies: set "
            "'enable.auto.commit': False; the offsets are committed here, behind the outcomes"
        )
    config["enable.auto.commit"] = False
    if not config.get("group.id"):
        raise ConfigurationError("the client's configuration needs a 'group.id': offsets are committed for a group")
    return config


def _origin(message: Message) -> Origin:
    topic, partition, offset = message.topic(), message.partition(), message.offset()
    assert topic is not None and partition is not None and offset is not None  # noqa: PT018 - no message lacks one
    return Origin(topic, partition, offset, _headers(message), message.value())


def _headers(message: Message) -> Sequence[tuple[str, Any]]:
    headers = message.headers() or ()
    return list(headers.items()) if isinstance(headers, dict) else headers


def _places(partitions: Iterable[TopicPartition]) -> list[Place]:
    return [(each.topic, each.partition) for each in partitions]


def _note(error: KafkaError) -> None:
    """Raise what the client cannot get over by itself, and log the rest."""
    if error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - so is it named
        return
    if error.fatal() or error.code() in (KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.GROUP_AUTHORIZATION_FAILED):
        raise KafkaException(error)
    logger.warning("Kafka: %s", error.str())
