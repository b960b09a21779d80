"""A memory store that claims and finishes many records at once, and worlds of many keys on it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from idem_tasks import MemoryStore
from idem_tasks.batch_decorator import idempotent_batch
from idem_tasks.claims import ClaimAnswer, ClaimRequest, EncodedOutcome, Lease, Recorded, State
from tests.unit.scripted import LEASE, SCOPE, World

Message = dict[str, Any]


class BatchMemory(MemoryStore):
    """What a store with the verbs of many answers: the usual cases at once, None for all others."""

    async def claim_batch(self, requests: Sequence[ClaimRequest]) -> list[ClaimAnswer | None]:
        in_order([(request.scope, request.key) for request in requests])
        return [await self._usual(request) for request in requests]

    async def _usual(self, request: ClaimRequest) -> ClaimAnswer | None:
        found, now = await self.get(request.scope, request.key), self._clock()
        if found is not None and found.owner != request.owner:
            over = now > found.expires_at.timestamp()
            dead = found.state is State.RUNNING and now > found.lease_expires_at.timestamp()
            if over or dead or found.state is State.RELEASED:
                return None
        return await self.claim(request)

    async def finish_batch(self, finished: Sequence[tuple[Lease, EncodedOutcome]]) -> list[Recorded | None]:
        in_order([(lease.scope, lease.key) for lease, _ in finished])
        answers = []
        for lease, outcome in finished:
            assert not outcome.messages
            record = await self.get(lease.scope, lease.key)
            fenced = record is not None and (record.owner, record.fencing_token) == (lease.owner, lease.fencing_token)
            answer = await self.finish(lease, outcome) if fenced else None
            answers.append(answer if isinstance(answer, Recorded) else None)
        return answers


def in_order(places: list[tuple[str, str]]) -> None:
    """Expect what every batch promises to a store: sorted in bytes, and none twice (F66)."""
    assert places == sorted(set(places), key=lambda place: (place[0].encode(), place[1].encode()))


def batching(world: World) -> World:
    """Let the world's records be claimed and finished together."""
    world.record_tier.real = BatchMemory(world.clock)
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
