"""The broker of the Redis shop loses nothing by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kombu import Connection

from tests.chaos.careful_redis import Transport
from tests.services.redis_server import RedisServer


@pytest.fixture
def server(private_redis: Callable[..., RedisServer]) -> RedisServer:
    return private_redis()


@pytest.fixture
def connection(server: RedisServer) -> Iterator[Connection]:
    with Connection(server.url, transport=Transport, transport_options={"visibility_timeout": 3600}) as connection:
        yield connection


def test_a_message_is_noted_as_it_is_taken(server: RedisServer, connection: Connection) -> None:
    """A worker that is killed between taking a message and noting it has noted it already."""
    with connection.SimpleQueue("orders") as queue, server.client() as client:
        queue.put({"order": "1"})
        consumed = hurried(queue)
        with pytest.raises(Killed):
            queue.get(timeout=5)
        assert consumed
        assert client.llen("orders") == 0
        assert client.hlen("unacked") == client.zcard("unacked_index") == 1


def test_a_restored_message_is_the_same(server: RedisServer, connection: Connection) -> None:
    """What was noted goes back to its queue, and is taken and acknowledged there."""
    with connection.SimpleQueue("orders") as queue, server.client() as client:
        queue.put({"order": "1"})
        tag = queue.get(timeout=5).delivery_tag
        queue.channel.qos.restore_by_tag(tag)
        assert (client.llen("orders"), client.hlen("unacked")) == (1, 0)
        message = queue.get(timeout=5)
        assert message.payload == {"order": "1"}
        message.ack()
        assert client.hlen("unacked") == client.zcard("unacked_index") == client.llen("orders") == 0


class Killed(BaseException):
    pass


def hurried(queue: Any) -> list[str]:
    """Die at the moment at which kombu would note what it has taken."""
    seen: list[str] = []

    def die(message: Any, delivery_tag: str) -> None:
        seen.append(delivery_tag)
        raise Killed

    queue.channel.qos.append = die
    return seen
