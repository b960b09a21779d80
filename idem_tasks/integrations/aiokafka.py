"""Handlers around messages of Kafka, with aiokafka: polled, run once for each key, recorded, then committed.

    client = AIOKafkaConsumer(bootstrap_servers="...", group_id="billing", enable_auto_commit=False)
    await IdempotentConsumer(client, handler).run(["orders"])

Each partition is worked on in its order, one message at a time, in a task of its own, while the client is polled on. An
offset is committed once it and all before it are finished: their outcome is recorded, or they are dead letters that the
broker has confirmed. What is lost with a commit is only replayed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Unpack

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
    from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener, TopicPartition
    from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError
except ImportError as error:
    raise MissingExtraError(package="aiokafka", extra="kafka") from error


_FETCH_SECONDS = 1.0
"""How long the client may think about what it fetched. While its group has no assignment for it, it waits without any
limit, and would notice `stop` only then."""

_COMMIT_SECONDS = 5.0
"""How long a commit may take. The client itself tries again for ever, and a consumer would never end whose brokers are
away; a lost commit costs a replay."""


class IdempotentConsumer:
    """Polls topics, and awaits the handler once for each key; messages are committed behind their outcomes."""

    def __init__(
        self,
        consumer: AIOKafkaConsumer,
        handler: Callable[..., Awaitable[Any]],
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
        producer: AIOKafkaProducer | None = None,
        batch: bool = False,
        batch_size: int = BATCH_SIZE,
        batch_wait: float = BATCH_WAIT,
        buffer: int = BUFFER,
        commit_every: float = COMMIT_EVERY,
        **fields: Unpack[PolicyFields],
    ) -> None:
        """`consumer` was made with `enable_auto_commit=False`, and without topics; `run` starts and stops it.

        `handler` is called with an `aiokafka.ConsumerRecord`. `producer` is started by you. All else is as for
        `confluent_kafka.IdempotentConsumer`. Raises `ConfigurationError` for what cannot work, auto-commit above all.
        """
        if getattr(consumer, "_enable_auto_commit", False):
            raise ConfigurationError(
                "enable_auto_commit commits messages whose handler has not ended, which are lost if the worker dies: "
                "make the AIOKafkaConsumer with enable_auto_commit=False; the offsets are committed here, behind the "
                "outcomes"
            )
        group = group or getattr(consumer, "_group_id", None)
        if not group:
            raise ConfigurationError("the AIOKafkaConsumer needs a group_id: offsets are committed for a group")
        if (dead_letter_topic is None) != (producer is None):
            raise ConfigurationError(
                "dead_letter_topic= and producer= go together: an AIOKafkaProducer sends the dead letters"
            )
        if buffer < 1 or not commit_every > 0:
            raise ConfigurationError("buffer must be 1 or more, and commit_every more than 0 seconds")
        if batch:
            check_batches(batch_size, batch_wait, buffer)
        options: dict[str, Any] = {"idempotency": idempotency, **fields}
        if policy is not None:
            options["policy"] = policy
        self._handling = handling_for(
            handler,
            runtime="asyncio",
            origin=_origin,
            group=group,
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
        self._client = consumer
        self._longest_delay = longest_delay
        self._dead_letter_topic = dead_letter_topic
        self._producer = producer
        self._batch = batch
        self._at_once = (batch_size, float(batch_wait)) if batch else (1, 0.0)
        self._buffer = buffer
        self._commit_every = commit_every
        self._partitions: Partitions[Any] = Partitions()
        self._tasks: set[asyncio.Task[None]] = set()
        self._has_begun = False
        self._is_stopping = self._is_closing = False
        self._struck: BaseException | None = None

    # Running

    async def run(self, topics: Iterable[str], *, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Consume these topics until `should_stop()` is true or `stop` was called; then let handlers end, and close.

        Where it is cancelled, its handlers are too: their claims are given back, and their messages come again. Raises
        `KafkaError` where the client cannot go on. Runs once.
        """
        if self._has_begun:
            raise ConfigurationError("this consumer has run already: make another one")
        names = topic_names(topics)
        if self._client.subscription():
            raise ConfigurationError("the AIOKafkaConsumer has topics already: make it without, and give them to run()")
        self._has_begun = True
        try:
            await self._client.start()
            self._client.subscribe(names, listener=_Listener(self._assigned, self._revoked))
            commit_at = time.monotonic() + self._commit_every
            while not (self._is_stopping or should_stop()):
                await self._fetch()
                self._start()
                self._steer()
                if time.monotonic() >= commit_at:
                    await self._commit()
                    commit_at = time.monotonic() + self._commit_every
            self._is_stopping = True
            await self._let_handlers_end()
        finally:
            await self._close()
        if self._struck is not None:
            raise self._struck

    def stop(self) -> None:
        """Let `run` end."""
        self._is_stopping = True

    async def _let_handlers_end(self) -> None:
        """Poll on, so that the group does not take a handler that takes its time for dead."""
        while self._tasks:
            self._client.pause(*self._client.assignment())  # which a rebalance may have changed
            await self._fetch()

    async def _close(self) -> None:
        self._is_stopping = self._is_closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            await self._commit()
        finally:
            try:
                await self._client.stop()
            except (KafkaError, asyncio.CancelledError) as error:
                own = asyncio.current_task()
                if own is not None and own.cancelling():
                    raise  # else it is that of the client's own task, which it cancelled
                logger.warning("the client did not leave its group in good order: %s", type(error).__name__)

    # Messages in

    async def _fetch(self) -> None:
        try:
            async with asyncio.timeout(_FETCH_SECONDS):
                fetched = await self._client.getmany(timeout_ms=round(POLL_SECONDS * 1000), max_records=FETCHED_AT_ONCE)
        except TimeoutError:
            return
        for place, messages in fetched.items():
            if place in self._client.assignment():
                self._partitions.assign(_places([place]))  # the client may fetch before it tells of an assignment
            for message in messages:
                self._partitions.add((place.topic, place.partition), message.offset, message, time.monotonic())

    def _start(self) -> None:
        """Let every partition that may go on do so."""
        now = time.monotonic()
        for partition in self._partitions:
            taken = partition.take(now, *self._at_once)
            if taken:
                task = asyncio.create_task(self._work(partition, taken))
                self._tasks.add(task)
                task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._struck = error
            self._is_stopping = True

    def _steer(self) -> None:
        """Pause the partitions that wait or have enough here, and resume the others."""
        now = time.monotonic()
        for partition in self._partitions:
            if partition.wants_pause(now, self._buffer) != partition.paused:
                place = TopicPartition(*partition.place)
                if place in self._client.assignment():
                    (self._client.resume if partition.paused else self._client.pause)(place)
                    partition.paused = not partition.paused

    # Messages through

    async def _work(self, partition: Partition[Any], taken: list[Taken[Any]]) -> None:
        """Run messages of one partition, or batches of them, one after another, until none may run now."""
        while taken:
            settlements: list[Acknowledge | PutBack] = []
            try:
                if not partition.closed:
                    await self._settle(taken, settlements)
            finally:
                now = time.monotonic()
                partition.settle(taken, settlements, now)
            taken = [] if self._is_stopping else partition.take(now, *self._at_once)

    async def _settle(self, taken: list[Taken[Any]], settlements: list[Acknowledge | PutBack]) -> None:
        """Run the handler, and append what is to be done with each message."""
        raised: BaseException | None = None
        messages = [each.message for each in taken]
        try:
            await self._handling.function(messages if self._batch else messages[0])
        except BaseException as error:
            if self._is_closing:
                raise  # cancelled: the claim is given back, and the message comes again
            raised = error
            if not isinstance(error, Exception | asyncio.CancelledError):
                self._struck = error
                self._is_stopping = True
        for each, end in zip(taken, ends_of(raised, len(taken), batch=self._batch), strict=True):
            origin = _origin(each.message).text
            settlement = self._handling.settle(end, each.count, origin, (each.message,), {})
            if isinstance(settlement, DeadLetter):
                settlement = await self._dead_letter(each, settlement)
            settlements.append(settlement)

    async def _dead_letter(self, taken: Taken[Any], letter: DeadLetter) -> Acknowledge | PutBack:
        """Have the broker confirm the dead letter, and only then let its offset count as finished."""
        origin, later = _origin(taken.message), PutBack(self._longest_delay, taken.count + 1, letter.reason)
        assert self._dead_letter_topic is not None and self._producer is not None  # noqa: PT018 - it was put back else
        message = taken.message
        headers = dead_letter_headers(message.headers, letter.headers)
        value = b"" if message.value is None and message.key is None else message.value  # the producer takes no nothing
        try:
            await self._producer.send_and_wait(self._dead_letter_topic, value=value, key=message.key, headers=headers)
        except Exception as error:  # noqa: BLE001 - whatever the producer, or its serializer, has against it
            log_not_delivered(origin, self._dead_letter_topic, type(error).__name__, later.delay)
            return later
        return Acknowledge()

    # Offsets out

    async def _commit(self, places: Iterable[Place] | None = None) -> None:
        """Commit what is finished, of these partitions or of all; a failure is noted, and it is done again later."""
        offsets = self._partitions.to_commit(places)
        assigned = self._client.assignment()
        offsets = {place: offset for place, offset in offsets.items() if TopicPartition(*place) in assigned}
        if not offsets:
            return
        try:
            async with asyncio.timeout(_COMMIT_SECONDS):
                await self._client.commit({TopicPartition(*place): offset for place, offset in offsets.items()})
        except (CommitFailedError, IllegalStateError) as error:
            logger.info("a commit came too late, and its messages will be replayed: %s", type(error).__name__)
        except (KafkaError, TimeoutError) as error:
            logger.warning("a commit failed, and is tried again: %s", type(error).__name__)
        else:
            self._partitions.committed(offsets)

    # Rebalances

    def _assigned(self, assigned: Iterable[TopicPartition]) -> None:
        places = _places(assigned)
        self._partitions.revoke(each.place for each in self._partitions if each.place not in places)
        self._partitions.assign(places)

    async def _revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """Commit what is finished before another consumer begins; what runs may end, and is replayed there."""
        places = _places(revoked)
        await self._commit(places)
        self._partitions.revoke(places)


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc] # aiokafka is untyped
    """Tells the consumer of rebalances."""

    def __init__(
        self,
        assigned: Callable[[Iterable[TopicPartition]], None],
        revoked: Callable[[Iterable[TopicPartition]], Awaitable[None]],
    ) -> None:
        self._assigned = assigned
        self._revoked = revoked

    async def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """Begin with them."""
        self._assigned(assigned)

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """End them."""
        await self._revoked(revoked)


def _origin(message: Any) -> Origin:
    return Origin(message.topic, message.partition, message.offset, message.headers or (), message.value)


def _places(partitions: Iterable[TopicPartition]) -> list[Place]:
    return [(each.topic, each.partition) for each in partitions]
