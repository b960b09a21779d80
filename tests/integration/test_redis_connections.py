"""Connections that are kept at hand: a lost one is replaced, and no command gets the reply to another."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from redis import ConnectionPool, Redis, exceptions

from idem_tasks.stores.redis_connections import KeptConnections
from tests.integration.time_limits import TimeLimitError, time_limits
from tests.services.redis_server import RedisServer
from tests.services.waiting import wait_until

Keep = Callable[..., KeptConnections]


@pytest.fixture
def keep(redis_url: str, unique_name: str) -> Iterator[Keep]:
    """Make connections that the server knows by the test's name."""
    kept = []

    def make(url: str = redis_url, **options: Any) -> KeptConnections:
        pool = ConnectionPool.from_url(url, client_name=unique_name, protocol=2, socket_timeout=5.0, **options)
        kept.append(KeptConnections(pool, retries=1))
        return kept[-1]

    yield make
    for each in kept:
        each.close()


@pytest.fixture
def client(redis_url: str) -> Iterator[Redis]:
    with Redis.from_url(redis_url, decode_responses=True) as client:
        yield client


@pytest.fixture
def ids(client: Redis, unique_name: str) -> Callable[[], list[str]]:
    """Return what the server calls the connections of the test's name."""
    return lambda: [each["id"] for each in client.client_list() if each["name"] == unique_name]


def test_one_is_enough_for_one_thread(keep: Keep, ids: Callable[[], list[str]]) -> None:
    """Commands that follow one another share a connection, also when one of them was answered with an error."""
    kept = keep()
    assert kept.execute_command("ECHO", b"first") == b"first"
    with pytest.raises(exceptions.ResponseError):
        kept.execute_command("NONSENSE")
    assert kept.execute_command("ECHO", b"second") == b"second"
    assert len(ids()) == 1
    kept.close()
    wait_until(lambda: ids() == [], seconds=10, what="it to be closed")
    assert kept.execute_command("ECHO", b"third") == b"third"


def test_threads_never_share_one(keep: Keep, ids: Callable[[], list[str]]) -> None:
    """Each gets the replies to its own commands, and what was made for so many is kept."""
    kept, threads = keep(), 8
    together = threading.Barrier(threads)

    def asks(number: int) -> bool:
        together.wait(timeout=30)
        return all(kept.execute_command("ECHO", b"%d %d" % (number, n)) == b"%d %d" % (number, n) for n in range(300))

    with ThreadPoolExecutor(threads) as pool:
        assert all(pool.map(asks, range(threads)))
    assert 1 <= len(ids()) <= threads


def test_one_may_close_while_others_call(keep: Keep, ids: Callable[[], list[str]]) -> None:
    """Those in use are left to who uses them; no command fails, and none gets the reply to another."""
    kept, threads = keep(), 4

    def asks(number: int) -> bool:
        return all(kept.execute_command("ECHO", b"%d %d" % (number, n)) == b"%d %d" % (number, n) for n in range(300))

    with ThreadPoolExecutor(threads) as pool:
        answers = [pool.submit(asks, number) for number in range(threads)]
        while not all(answer.done() for answer in answers):
            kept.close()
        assert all(answer.result() for answer in answers)
    kept.close()
    wait_until(lambda: ids() == [], seconds=10, what="them to be closed")


def test_a_connection_that_was_lost_is_made_anew(
    keep: Keep, ids: Callable[[], list[str]], client: Redis, unique_name: str
) -> None:
    """The server hung up while it was idle: nobody hears of it, and the command is carried out once (F49)."""
    kept = keep()
    kept.execute_command("INCR", unique_name)
    [lost] = ids()
    client.client_kill_filter(_id=lost)
    assert kept.execute_command("INCR", unique_name) == 2
    [found] = ids()
    assert found != lost


def test_a_reply_that_nobody_asked_for(keep: Keep) -> None:
    """What a faulty proxy says of its own accord is no reply to the next command, nor shifts those that follow."""
    kept = keep()
    kept.execute_command("PING")
    [connection] = kept._idle
    connection.send_packed_command(connection.pack_command("ECHO", b"stray"))
    wait_until(connection.can_read, seconds=10, what="it to come")
    assert [kept.execute_command("ECHO", each) for each in (b"1", b"2", b"3")] == [b"1", b"2", b"3"]


def test_a_server_that_is_gone(private_redis: Callable[..., RedisServer], keep: Keep) -> None:
    """Nobody answers: it is said, and once somebody does again the same connections serve."""
    server = private_redis()
    kept = keep(server.url)
    kept.execute_command("PING")
    server.kill()
    for _ in range(3):
        with pytest.raises(exceptions.ConnectionError):
            kept.execute_command("PING")
    server.start()
    assert kept.execute_command("ECHO", b"back") == b"back"


def test_a_server_that_dies_with_a_command(private_redis: Callable[..., RedisServer], keep: Keep) -> None:
    """It is tried once more, as by redis-py, and then its caller is told."""
    server = private_redis()
    kept = keep(server.url)
    with ThreadPoolExecutor(1) as pool, server.client() as client:
        waiting = pool.submit(kept.execute_command, "BLPOP", "nothing", 30)
        wait_until(lambda: client.info("clients")["blocked_clients"] == 1, seconds=10, what="it to wait")
        server.kill()
        with pytest.raises(exceptions.ConnectionError):
            waiting.result(10)


def test_a_reply_that_comes_too_late(private_redis: Callable[..., RedisServer], keep: Keep) -> None:
    """It is not waited for twice, and it is not the next command's."""
    server = private_redis()
    kept = keep(server.url)
    kept._like.connection_kwargs["socket_timeout"] = 0.3
    kept.execute_command("PING")
    server.pause()
    with pytest.raises(exceptions.TimeoutError):
        kept.execute_command("ECHO", b"late")
    server.resume()
    assert kept.execute_command("ECHO", b"next") == b"next"


def test_a_command_that_is_struck_before_its_reply(
    keep: Keep, ids: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A time limit between a command and its reply: the connection is closed, and no other command gets that reply."""
    kept = keep()
    kept.execute_command("PING")
    [connection] = kept._idle
    [struck] = ids()
    with monkeypatch.context() as patch:

        def strike(*_: object) -> None:
            raise TimeLimitError

        patch.setattr(connection, "read_response", strike)
        with pytest.raises(TimeLimitError):
            kept.execute_command("ECHO", b"of the one that was struck")
    assert kept.execute_command("ECHO", b"of the next") == b"of the next"
    wait_until(lambda: struck not in ids(), seconds=10, what="it to be closed")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it strikes in a __del__ too
def test_a_time_limit_may_strike_anywhere(keep: Keep) -> None:
    """At any instruction, a thousand times: each command gets its own reply."""
    kept = keep()
    with time_limits() as struck:
        for number in range(1000):
            struck(0.000005 + (number % 50) * 0.000003, partial(kept.execute_command, "ECHO", b"struck %d" % number))
            assert kept.execute_command("ECHO", b"%d" % number) == b"%d" % number
