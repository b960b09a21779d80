"""What a server can do is found out by trying, before anything rests on it (F20)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from redis import Redis

from idem_tasks.claims import ClaimRequest, new_owner
from idem_tasks.errors import ConfigurationError, StoreError
from idem_tasks.policy import Policy
from idem_tasks.runtime import run_sync
from idem_tasks.stores.base import Marker, MarkerRunning, MarkerTaken, Store
from idem_tasks.stores.redis import RedisStore
from idem_tasks.testing import MarkerContract
from tests.integration.redis_proxy import Command, proxy
from tests.services.fixtures import flushed, private
from tests.services.redis_server import RedisServer
from tests.services.run import Run

SYNTAX_ERROR = b"-ERR syntax error\r\n"


def request(key: str = "key") -> ClaimRequest:
    return ClaimRequest("scope", key, None, new_owner(), Policy())


def is_set_get(command: Command) -> bool:
    return command[0] == b"SET" and b"GET" in command


def port_of(url: str) -> int:
    with Redis.from_url(url) as client:
        return int(client.connection_pool.connection_kwargs["port"])


@pytest.fixture(scope="module")
def own_redis(service_run: Run) -> Iterator[RedisServer]:
    """A Redis of these tests' own."""
    with private(RedisServer, service_run) as start:
        yield start()


@pytest.fixture
def old_redis_url(own_redis: RedisServer) -> Iterator[str]:
    """An empty Redis that knows SET NX and SET GET, but not both in one command, as 6.2 does."""
    with (
        flushed(own_redis.client()),
        proxy(
            own_redis.port, lambda command: SYNTAX_ERROR if is_set_get(command) and b"NX" in command else command
        ) as url,
    ):
        yield url


class TestMarkerOnOldRedis(MarkerContract):
    """Markers on a server before 7.0."""

    @pytest.fixture
    def marker(self, old_redis_url: str) -> Marker:
        return RedisStore(old_redis_url, socket_timeout=20)


def test_before_7_a_script_takes_the_marker(private_redis: Callable[..., RedisServer]) -> None:
    """Where SET NX GET is refused, each take is one EVAL, and SET NX GET is tried once per client only (F20)."""
    tried: list[Command] = []

    def refuse(command: Command) -> Command | bytes:
        tried.append(command)
        return SYNTAX_ERROR if is_set_get(command) else command

    with proxy(private_redis().port, refuse) as url:
        store = RedisStore(url)
        run_sync(store.prepare())
        del tried[:]
        assert run_sync(store.take(request())) == MarkerTaken()
        assert run_sync(store.take(request("other"))) == MarkerTaken()
        assert [command[0] for command in tried] == [b"EVAL", b"EVAL"]
        assert isinstance(run_sync(store.take(request())), MarkerRunning)
        run_sync(store.close())


def test_a_proxy_that_ignores_nx_is_refused(private_redis: Callable[..., RedisServer]) -> None:
    """Where SET NX sets over what is there, two workers would both be told to run: it is never used (F20)."""
    server = private_redis()
    with proxy(server.port, lambda command: [part for part in command if part != b"NX"]) as url:
        store = RedisStore(url)
        for _ in range(2):
            with pytest.raises(ConfigurationError, match="ignores the NX of SET"):
                run_sync(store.take(request()))
        run_sync(store.close())
    with server.client() as client:
        assert client.dbsize() == 0


def test_a_proxy_that_ignores_px_is_refused(private_redis: Callable[..., RedisServer]) -> None:
    """Where SET PX sets no time to live, a crash would leave a marker for ever (F33): it is never used (F20)."""
    server = private_redis()

    def without_px(command: Command) -> Command:
        if b"PX" not in command:
            return command
        at = command.index(b"PX")
        return command[:at] + command[at + 2 :]

    with proxy(server.port, without_px) as url:
        store = RedisStore(url)
        with pytest.raises(ConfigurationError, match="ignores the PX of SET"):
            run_sync(store.take(request()))
        run_sync(store.close())
    with server.client() as client:
        assert client.dbsize() == 0


@pytest.mark.parametrize("command", ["EVAL", "PTTL"])
def test_a_server_without_a_command_is_refused(private_redis: Callable[..., RedisServer], command: str) -> None:
    """A server that lacks what everything rests on says so at the first call, and what is needed (F20)."""
    lacks = f"-ERR unknown command '{command}'\r\n".encode()
    with proxy(private_redis().port, lambda sent: lacks if sent[0] == command.encode() else sent) as url:
        store = RedisStore(url)
        with pytest.raises(ConfigurationError, match=r"too old or lacks a command.*Redis 6\.2 or newer"):
            run_sync(store.take(request()))
        run_sync(store.close())


def test_a_server_whose_scripts_do_nothing_is_refused(private_redis: Callable[..., RedisServer]) -> None:
    """What EVAL answers is compared: markers are given back and published by scripts alone (F20)."""
    with proxy(private_redis().port, lambda command: b":0\r\n" if command[0] == b"EVAL" else command) as url:
        store = RedisStore(url)
        with pytest.raises(ConfigurationError, match="does not run scripts as Redis does"):
            run_sync(store.take(request()))
        run_sync(store.close())


def test_an_error_of_the_moment_is_not_taken_for_an_old_server(private_redis: Callable[..., RedisServer]) -> None:
    """Out of memory at the first SET NX GET: the error is told, and the next call tries the command again (F20)."""
    full = b"-OOM command not allowed when used memory > 'maxmemory'.\r\n"
    tried: list[Command] = []

    def refuse_once(command: Command) -> Command | bytes:
        if is_set_get(command):
            tried.append(command)
        return full if is_set_get(command) and len(tried) == 1 else command

    with proxy(private_redis().port, refuse_once) as url:
        store = RedisStore(url)
        with pytest.raises(StoreError, match="out of memory"):
            run_sync(store.take(request()))
        del tried[1:]
        assert run_sync(store.take(request())) == MarkerTaken()
        assert len(tried) > 1
        run_sync(store.close())


def test_a_lost_reply_to_a_take_is_ours_at_the_second_try(private_redis: Callable[..., RedisServer]) -> None:
    """SET NX took effect, its reply was lost, the client tries again: the marker it meets is its own (F22)."""
    hang_up = False

    def lose_one_reply(command: Command) -> Command | None:
        nonlocal hang_up
        if hang_up and is_set_get(command):
            hang_up = False
            return None
        return command

    with proxy(private_redis().port, lose_one_reply) as url:
        store = RedisStore(url)
        run_sync(store.prepare())
        hang_up = True
        first = request()
        assert run_sync(store.take(first)) == MarkerTaken()
        assert not hang_up
        assert isinstance(run_sync(store.take(request())), MarkerRunning)
        run_sync(store.close())


def test_the_self_test_leaves_nothing_behind(redis_url: str) -> None:
    """Its key is gone when it is over, and has a time to live while it is there."""
    store: Store = RedisStore(redis_url, prefix="only-here:")
    run_sync(store.prepare())
    run_sync(store.prepare())
    run_sync(store.close())
    with Redis.from_url(redis_url) as client:
        assert client.dbsize() == 0
