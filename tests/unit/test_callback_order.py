"""The decorator over a callback that settles messages: a duplicate would be replayed, and its message left for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from nats.aio.client import Client

from idem_tasks import ConfigurationError, Idempotency, MemoryStore, idempotent_batch, idempotent_task
from idem_tasks.integrations import aio_pika, kombu_consumer, nats, pika


def blocking(*_: object) -> None:
    """Takes whatever its client gives."""


async def asyncio(*_: object) -> None:
    """The same for clients with an event loop."""


def callback(client: Any, handler: Callable[..., Any], **options: Any) -> Any:
    options |= {"idempotency": Idempotency(store=MemoryStore()), "key": lambda *_: "A-1"}
    if client is nats:
        return nats.idempotent_callback(Client().jetstream(), **options)(handler)
    return client.idempotent_callback(queue="orders", **options)(handler)


@pytest.mark.parametrize("decorator", [idempotent_task, idempotent_batch])
@pytest.mark.parametrize(
    "client, handler", [(pika, blocking), (kombu_consumer, blocking), (aio_pika, asyncio), (nats, asyncio)]
)
def test_the_decorator_over_a_callback_is_refused(
    client: Any, handler: Callable[..., Any], decorator: Callable[..., Any]
) -> None:
    """The error says where it goes."""
    made = callback(client, handler)
    with pytest.raises(ConfigurationError, match="put the decorator under @idempotent_callback"):
        decorator(key=lambda *_: "A-1", fingerprint=None)(made)


@pytest.mark.parametrize("client, handler", [(pika, blocking), (aio_pika, asyncio)])
def test_a_callback_of_a_callback_is_refused(client: Any, handler: Callable[..., Any]) -> None:
    """For the same reason."""
    with pytest.raises(ConfigurationError, match="callback that settles messages"):
        callback(client, callback(client, handler))
