"""A memory store that claims and finishes many records at once, and worlds of many keys on it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from idem_tasks import MemoryStore
from idem_tasks.batch_decorator import idempotent_batch
from idem_tasks.claims import ClaimAnswer, ClaimRequest, EncodedOutcome, Lease, Recorded
from tests.unit.scripted import LEASE, SCOPE, World

Message = dict[str, Any]


class OrderedMemory(MemoryStore):
    """Expects of every batch what is promised to a store: sorted in bytes, and nothing twice (F66)."""

    async def claim_batch(self, requests: Sequence[ClaimRequest]) -> list[ClaimAnswer | None]:
        in_order([(request.scope, request.key) for request in requests])
        return await super().claim_batch(requests)

    async def finish_batch(self, finished: Sequence[tuple[Lease, EncodedOutcome]]) -> list[Recorded | None]:
        in_order([(lease.scope, lease.key) for lease, _ in finished])
        assert not any(outcome.messages for _, outcome in finished)
        return await super().finish_batch(finished)


def in_order(places: list[tuple[str, str]]) -> None:
    assert places == sorted(set(places), key=lambda place: (place[0].encode(), place[1].encode()))


def batching(world: World) -> World:
    """Let the world's records be claimed and finished together."""
    world.record_tier.real = OrderedMemory(world.clock)
    return world


def one_at_a_time(world: World) -> World:
    """Let the world's records be claimed and finished by themselves."""
    world.record_tier.lacking = {"claim_batch", "finish_batch"}
    return world


def batch_of(world: World, body: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Decorate a function of many messages for this world's runtime; returns a plain call."""
    handler = body
    if world.runtime == "asyncio":

        async def coroutine_body(messages: list[Message]) -> Any:
            return body(messages)

        coroutine_body.__signature__ = inspect.signature(body)  # type: ignore[attr-defined]
        coroutine_body.__annotations__ = body.__annotations__
        handler = coroutine_body
    options = {"key": "{message[id]}", "scope": SCOPE, "idempotency": world.idem, "lease": LEASE, **options}
    decorated: Any = idempotent_batch(**options)(handler)
    return lambda *args, **kwargs: world.drive(decorated, *args, **kwargs)


def messages(*keys: str) -> list[Message]:
    """Make a message for each key."""
    return [{"id": key, "amount": 5} for key in keys]


def shipping(world: World, fails: dict[str, BaseException] | None = None, **options: Any) -> Callable[..., Any]:
    """Return a handler of many messages whose effects are counted, and which fails for some of them."""

    def ship(messages: list[Message]) -> list[Any]:
        world.effects.extend(message["id"] for message in messages)
        return [(fails or {}).get(message["id"]) or f"shipped {message['id']}" for message in messages]

    return batch_of(world, ship, **options)


class RetryError(Exception):
    """What a framework raises to have the message again, as Celery's Retry is."""


class Host:
    """A framework around the handler, that knows its own exceptions."""

    scope = None
    message = "message 1"
    framework_argument = False

    def is_failure(self, error: BaseException) -> bool:
        return not isinstance(error, RetryError)

    def proves_no_effect(self, error: BaseException) -> bool:
        return isinstance(error, RetryError)

    def settle(self, error: BaseException, announce: Callable[..., None]) -> BaseException:
        return error
