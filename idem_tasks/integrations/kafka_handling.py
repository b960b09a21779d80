"""What both clients of Kafka do alike with a message: its key, its run, its settlement and its dead letter."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from idem_tasks.batch_decorator import idempotent_batch
from idem_tasks.decorator import idempotent_task
from idem_tasks.errors import BatchError, ConfigurationError
from idem_tasks.integrations.kafka_watermark import WatermarkHandler
from idem_tasks.integrations.settling import MessageHandler, Settlement, key_in_headers
from idem_tasks.stores.base import RuntimeName

logger = logging.getLogger("idem_tasks")

BODY = "body"
"""The default of `fingerprint=`: the value of the message."""

BUFFER = 1000
"""Messages of one partition that wait here before no more are fetched. librdkafka throws its own buffer away when a
partition is paused: with 100, batches of 100 on SQLite were fetched five times over, and went 2.6 times slower."""

BATCH_SIZE = 100
"""Messages of one partition that a batch has, at most."""

BATCH_WAIT = 0.2
"""Seconds that the first message of a smaller batch has waited for others."""

COMMIT_EVERY = 1.0
"""Seconds between two commits: what is lost with one, because a worker dies, is only replayed."""

POLL_SECONDS = 0.1
"""How long one poll waits: so late, at most, is noticed that a delayed message is due, or that `stop` was called."""

FETCHED_AT_ONCE = 100
"""Messages that are taken from the client before it is looked at what may run."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a message stands, and what came with it."""

    topic: str
    partition: int
    offset: int
    headers: Sequence[tuple[str, Any]]
    value: Any

    @property
    def place(self) -> tuple[str, int, int]:
        """Topic, partition and offset."""
        return self.topic, self.partition, self.offset

    @property
    def text(self) -> str:
        """`topic:partition:offset`."""
        return f"{self.topic}:{self.partition}:{self.offset}"


class Handling(Protocol):
    """Runs messages, and says what becomes of them."""

    @property
    def function(self) -> Callable[..., Any]:
        """What is called with a message."""
        ...

    def settle(
        self, error: BaseException | None, count: int, origin: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Settlement:
        """Say what is to be done with the message whose call ended so."""
        ...


def handling_for(
    handler: Callable[..., Any],
    *,
    runtime: RuntimeName,
    origin: Callable[[Any], Origin],
    group: str | None,
    key: str | Callable[..., object] | None,
    scope: str | Callable[..., object] | None,
    fingerprint: str | Sequence[str] | Callable[..., object] | None,
    session: Any,
    watermark: bool,
    batch: bool,
    has_road: bool,
    options: Mapping[str, Any],
    **settling: Any,
) -> Handling:
    """Return what runs the messages: under a record for each, or under one mark for each partition.

    `options` are the decorator's others, `settling` are `on_error` and `longest_delay`; `has_road`: dead letters have
    somewhere to go. Raises `ConfigurationError`.
    """
    settling["missing_road"] = None if has_road else "dead_letter_topic= and producer="
    if watermark and batch:
        raise ConfigurationError("watermark=True moves a mark behind each message: leave out batch=True")
    if watermark:
        if key is not None or scope is not None or fingerprint != BODY:
            raise ConfigurationError(
                "watermark=True has no use for key, scope and fingerprint: a message is known by its topic, partition "
                "and offset; leave them out"
            )
        if not group:
            raise ConfigurationError("watermark=True needs the name of the consumer group, which group= tells")
        return WatermarkHandler(
            handler,
            runtime=runtime,
            place=lambda message: origin(message).place,
            group=group,
            session=session,
            **settling,
            **options,
        )
    if scope is None and not group:
        raise ConfigurationError(
            "the default scope is the topic and the consumer group, which this client does not tell: give group= (the "
            "client's group.id) or scope="
        )
    decorator: Callable[..., Any] = idempotent_task
    if batch:
        decorator = idempotent_batch
    return MessageHandler(
        handler,
        runtime=runtime,
        key=(lambda message: _default_key(origin(message))) if key is None else key,
        scope=(lambda message: f"{origin(message).topic}/{group}") if scope is None else scope,
        fingerprint=(lambda message: origin(message).value) if fingerprint == BODY else fingerprint,
        session=session,
        decorator=decorator,
        **settling,
        **options,
    )


def ends_of(raised: BaseException | None, number: int, *, batch: bool) -> list[BaseException | None]:
    """Return how each of so many messages ended whose call ended with `raised`, or returned (None).

    Outcomes that the handler of a batch returned for other messages are none of theirs: that is logged.
    """
    if batch and isinstance(raised, BatchError):
        if raised.surplus:
            logger.error("%s", raised)
        failed = frozenset(raised.errors)
        return [error if place in failed else None for place, error in enumerate(raised.results)]
    return [raised] * number


def check_batches(batch_size: int, batch_wait: float, buffer: int) -> None:
    """Raise `ConfigurationError` for batches that cannot be filled."""
    if not 1 <= batch_size <= buffer or not batch_wait >= 0:
        raise ConfigurationError("batch_size must be 1 or more, and no more than buffer; batch_wait 0 seconds or more")


def topic_names(topics: Iterable[str]) -> list[str]:
    """Return the topics to consume; refuse one text, which would be taken for a topic of each of its letters."""
    if isinstance(topics, str):
        raise ConfigurationError(f"run() takes a list of topics: run([{topics!r}])")
    return list(topics)


def _default_key(origin: Origin) -> str:
    named = {name: value for name, value in origin.headers if value}  # of a header that is repeated the last counts
    return key_in_headers(named) or origin.text


def dead_letter_headers(headers: Iterable[tuple[str, Any]], reasons: Mapping[str, str]) -> list[tuple[str, Any]]:
    """Return a message's own headers, with those that say why it is a dead letter."""
    kept = [(name, value) for name, value in headers if name not in reasons]
    return [*kept, *((name, text.encode()) for name, text in reasons.items())]


def log_not_delivered(origin: Origin, topic: str, error: object, delay: float) -> None:
    """Say that a dead letter did not reach its topic."""
    logger.error(
        "%s is no dead letter yet, because %s did not take it (%s); again in %.0f s", origin.text, topic, error, delay
    )
