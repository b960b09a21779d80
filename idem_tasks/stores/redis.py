"""Redis as the marker tier, or as a whole store: connecting, what its errors mean, and a test of what it can do.

The markers are in `marker.py`, the records in `redis_records.py`, and single commands go past the client's pool by
`redis_connections.py`. No other module knows the client.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from types import CoroutineType
from typing import Any, cast

import redis
import redis.asyncio
from redis import exceptions
from redis.asyncio.cluster import ClusterNode as AsyncClusterNode
from redis.asyncio.retry import Retry as AsyncRetry
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode
from redis.connection import SSLConnection, parse_url
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelManagedConnection

from idem_tasks.errors import (
    ConfigurationError,
    IdemTasksError,
    StoreConfigurationError,
    StoreError,
    StoreUnavailableError,
)
from idem_tasks.events import Announcer
from idem_tasks.runtime import resolve
from idem_tasks.stores.base import RuntimeName
from idem_tasks.stores.breaker import CircuitBreaker
from idem_tasks.stores.lua import script
from idem_tasks.stores.marker import Argument, RedisMarkers
from idem_tasks.stores.redis_connections import KeptConnections
from idem_tasks.stores.redis_records import RedisRecords
from idem_tasks.stores.redis_urls import Address, parse_address

RedisClient = redis.Redis | redis.RedisCluster | redis.asyncio.Redis | redis.asyncio.RedisCluster

_RETRIES = 1
"""A connection that died while it was idle is made anew once. Timeouts are not retried: each would cost another one."""

_POOL_OPTIONS = frozenset(
    {"max_connections", "protocol", "retry_on_error", "retry_on_timeout", "single_connection_client"}
)
"""Options of a URL that only redis-py's client and its pool keep to."""

_KEYS_AT_ONCE = 1000
"""For one script: nobody else is served while it runs. Measured: 1,000 markers are taken in 3 ms."""

_PROBE_TTL = 60_000
"""Milliseconds after which a key of the self-test is gone, also if the test was killed."""


class RedisStore(RedisMarkers, RedisRecords):
    """Markers in front of a `SQLStore` (in a `TieredStore`), or records of its own where Redis' durability is enough.

    `url_or_client` is one of
    - `redis://[user:password@]host[:port][/db]`, the same with `rediss://` (TLS), `valkey://` and `valkeys://`,
      and `unix://[user:password@]/path[?db=n]`;
    - `redis+sentinel://[user:password@]host:port,host:port/service[/db]`, which follows the service's primary;
      `?sentinel_username=` and `?sentinel_password=` are for the Sentinels themselves;
    - `redis+cluster://[user:password@]host:port,host:port`; `rediss+sentinel` and `rediss+cluster` use TLS;
    - a client of redis-py, blocking or asyncio, which then serves that runtime only, stays its maker's to close, and
      keeps its own timeouts and retries. An asyncio client belongs to one event loop; a URL serves any number.

    `prefix` begins every key; change it after Redis was restored from a snapshot. `socket_timeout` (seconds, for
    connecting and for each reply) is to stay well below a sixth of the shortest lease, so that a renewal in trouble
    is over before the next one is due. A lost connection is made anew once; timeouts are not retried. Once a server
    cannot be reached, calls fail at once, and one is let through as a try after 1 s, then 2, 4 .. at most 30 s.

    Clients are made at the first call, one per process and one per event loop. Those that blocking handlers have for a
    URL of one server send single commands past redis-py's pool, on as many connections as threads send at once. With
    `?max_connections=` they go by the pool, and so they do by a client that you give, where what watches sees them.

    A client first tests by trying them, on a key of its own, the commands everything rests on, and whether `SET NX GET`
    (7.0) is one command here or a small script (6.2).

    Raises `ConfigurationError` for a URL or client that cannot work, at the first call `StoreConfigurationError` for a
    refused password or a server that ignores NX or PX; `StoreUnavailableError` where Redis cannot be reached;
    another `StoreError` where it answers with an error. None of them shows a password.

    As a whole store it keeps one hash per record, each verb one script and one round trip. Every key has a time to
    live: a completed, failed or released record ends by itself with its retention, any other a year after its last
    change of state.
    """

    def __init__(self, url_or_client: str | RedisClient, *, prefix: str = "idem:", socket_timeout: float = 2.0) -> None:
        if not isinstance(prefix, str):
            raise ConfigurationError(f"prefix must be a string, not {type(prefix).__name__}")
        if isinstance(url_or_client, str):
            opener: _Opener = _FromAddress(parse_address(url_or_client), socket_timeout)
        else:
            opener = _Given(url_or_client)
        self._prefix = prefix
        self._opener = opener
        self._siblings: dict[RuntimeName, RedisStore] = {}
        self._serve("blocking" if "blocking" in opener.runtimes else "asyncio")

    def _serve(self, runtime: RuntimeName) -> None:
        self._connection = _Connection(self._opener, runtime, self._prefix)
        RedisMarkers.__init__(self, self._connection, self._prefix)
        RedisRecords.__init__(self, self._connection, self._prefix)
        self._siblings[runtime] = self

    def __repr__(self) -> str:
        return f"<RedisStore {self._opener.name} {self._prefix!r}>"

    @property
    def runtimes(self) -> frozenset[RuntimeName]:
        """Both with a URL; with a client, the one it was made for."""
        return self._opener.runtimes

    def on(self, runtime: RuntimeName, announce: Announcer) -> RedisStore:
        """Return the one store that `runtime` shares; raises `ConfigurationError` if it cannot serve it."""
        if runtime not in self.runtimes:
            raise ConfigurationError(
                f"this RedisStore was given {self._opener.name}, which does not serve {runtime} handlers; "
                "give it a URL, which serves both"
            )
        if runtime not in self._siblings:
            sibling = object.__new__(RedisStore)
            sibling._prefix, sibling._opener, sibling._siblings = self._prefix, self._opener, self._siblings
            sibling._serve(runtime)
        return self._siblings[runtime]

    async def prepare(self) -> None:
        """Connect, and test once per client that the server does what is needed of it."""
        await self._connection.test()

    async def close(self) -> None:
        """Close this process's connections, or this event loop's; they are opened again when needed."""
        await self._connection.close()


# Clients: where they come from.


class _FromAddress:
    """Makes clients for an address: as many as there are processes and event loops."""

    runtimes: frozenset[RuntimeName] = frozenset({"blocking", "asyncio"})
    is_ours = True

    def __init__(self, address: Address, socket_timeout: float) -> None:
        self.name = f"Redis at {address.name}"
        self.patience = 3 * socket_timeout
        self._address = address
        self._options: dict[str, Any] = {
            "socket_timeout": socket_timeout,
            "socket_connect_timeout": socket_timeout,
            "protocol": 2,  # the same replies from every server and proxy, and no HELLO that an old one would refuse
            "username": address.username,
            "password": address.password,
            "ssl": address.tls,
        }
        self._sentinel_options = {
            name: self._options[name] for name in ("socket_timeout", "socket_connect_timeout", "protocol")
        }
        if address.kind == "unix":
            self._options["unix_socket_path"] = address.path
        if address.kind != "cluster":
            self._options["db"] = address.db
            # redis-py 5 wants to know it here; later ones take it from `retry`.
            self._options["retry_on_error"] = [exceptions.ConnectionError]
        asked = _query_options(address.query)
        self.keeps_connections = address.kind in ("single", "unix") and not asked.keys() & _POOL_OPTIONS
        for name, value in asked.items():
            if name.startswith("sentinel_"):
                self._sentinel_options[name.removeprefix("sentinel_")] = value
            else:
                self._options[name] = value
        if self._options.get("db"):
            # As text: of a number hiredis makes it, which is where a time limit crashes the process (see `_packable`).
            self._options["db"] = str(self._options["db"])

    def open(self, runtime: RuntimeName) -> list[Any]:
        """Make a client, and those it needs itself; that of a blocking cluster connects at once, others when used."""
        blocking = runtime == "blocking"
        retry: Any = (Retry if blocking else AsyncRetry)(
            NoBackoff(), _RETRIES, supported_errors=(exceptions.ConnectionError,)
        )
        match self._address.kind:
            case "cluster":
                node: Any = ClusterNode if blocking else AsyncClusterNode
                cluster: Any = redis.RedisCluster if blocking else redis.asyncio.RedisCluster
                nodes = [node(host, port) for host, port in self._address.hosts]
                return [cluster(startup_nodes=nodes, retry=retry, **self._options)]
            case "sentinel":
                sentinels: Any = Sentinel if blocking else AsyncSentinel
                found = sentinels(
                    self._address.hosts, sentinel_kwargs=self._sentinel_options, retry=retry, **self._options
                )
                kind = {"connection_class": _TlsSentinelConnection if self._address.tls else _SentinelConnection}
                return [found.master_for(self._address.service, **(kind if blocking else {})), *found.sentinels]
            case "unix":
                single: Any = redis.Redis if blocking else redis.asyncio.Redis
                return [single(retry=retry, **self._options)]
            case "single":  # pragma: no branch - there is no other kind
                single = redis.Redis if blocking else redis.asyncio.Redis
                host, port = self._address.hosts[0]
                return [single(host=host, port=port, retry=retry, **self._options)]


class _SentinelConnection(SentinelManagedConnection):
    """Hangs up when a reply does not come in time, as redis-py's other connections do by themselves.

    Left open, it would answer the next command with the reply to this one: with the outcome of another key.
    """

    def read_response(
        self, disable_decoding: Any = False, *, disconnect_on_error: bool | None = True, **options: Any
    ) -> Any:
        return super().read_response(disable_decoding, disconnect_on_error=disconnect_on_error, **options)


class _TlsSentinelConnection(_SentinelConnection, SSLConnection):
    pass


def _query_options(query: str) -> dict[str, Any]:
    """Return the options after the `?` of a URL, as redis-py names and reads them."""
    try:
        options: dict[str, Any] = parse_url(f"redis://host/?{query}")
    except ValueError as error:
        raise ConfigurationError(f"the options in the Redis URL cannot be read: {error}") from None
    del options["host"]
    known = inspect.signature(redis.Redis).parameters.keys() | {"sentinel_username", "sentinel_password"}
    for name in options:
        if name not in known or name == "decode_responses":
            raise ConfigurationError(f"{name!r} is no option of a Redis URL here; leave it out")
    return options


class _Given:
    """A client that somebody else made, and closes."""

    is_ours = False
    keeps_connections = False
    patience = 10.0

    def __init__(self, client: RedisClient) -> None:
        match client:
            case redis.Redis() | redis.RedisCluster():
                self.runtimes: frozenset[RuntimeName] = frozenset({"blocking"})
            case redis.asyncio.Redis() | redis.asyncio.RedisCluster():
                self.runtimes = frozenset({"asyncio"})
            case _:
                raise ConfigurationError(f"RedisStore takes a URL or a client of redis-py, not {type(client).__name__}")
        if client.get_encoder().decode_responses:
            raise ConfigurationError(
                "RedisStore cannot use a client with decode_responses=True, because outcomes are bytes; "
                "make one without it, or give a URL"
            )
        self.name = f"the given {type(client).__name__} client"
        self._client = client

    def open(self, runtime: RuntimeName) -> list[Any]:
        return [self._client]


_Opener = _FromAddress | _Given


# One client per process, and per event loop.


@dataclass(eq=False, slots=True)
class _Client:
    """A client once it is opened, whether it may be called, and what was found out about its server."""

    breaker: CircuitBreaker
    redis: Any = None
    commands: Any = None
    """What single commands are sent by: the client itself, or connections that are kept at hand."""
    opened: Sequence[Any] = ()
    tested: bool = False
    sets_and_gets: bool = False
    until_loop_ends: AsyncGenerator[None, None] | None = None


class _Connection:
    """The `Server` that a store talks to in one runtime; every command goes through `_call`."""

    def __init__(self, opener: _Opener, runtime: RuntimeName, prefix: str) -> None:
        self._opener = opener
        self._runtime = runtime
        self._prefix = prefix.encode()
        self._by_process: dict[int, _Client] = {}
        self._by_loop: dict[asyncio.AbstractEventLoop, _Client] = {}

    async def set_if_absent(self, key: bytes, value: bytes, milliseconds: int) -> bytes | None:
        standing: bytes | None = await self._call(_set_if_absent, key, value, milliseconds)
        return standing

    async def run(self, text: str, key: bytes, *arguments: Argument) -> Any:
        return await self._call(_evaluated, text, key, *arguments)

    async def run_each(self, text: str, calls: Sequence[tuple[bytes, Sequence[Argument]]]) -> list[Any]:
        commands = [("EVAL", text, b"1", key, *map(_packable, arguments)) for key, arguments in calls]
        return cast(list[Any], await self._call(_pipelined, commands)) if commands else []

    async def run_over(self, text: str, calls: Sequence[tuple[bytes, Sequence[Argument]]]) -> list[Any]:
        replies: list[Any] = []
        for start in range(0, len(calls), _KEYS_AT_ONCE):
            some = calls[start : start + _KEYS_AT_ONCE]
            replies += await self._call(_evaluated_over, text, some)
        return replies

    async def delete(self, keys: Sequence[bytes]) -> None:
        commands = [("DEL", key) for key in keys]
        if commands:
            await self._call(_pipelined, commands)

    async def keys(self, beginning: bytes) -> set[bytes]:
        pattern = re.sub(rb"([\\*?\[\]^-])", rb"\\\1", beginning) + b"*"
        return cast(set[bytes], await self._call(_scanned, pattern))

    async def test(self) -> None:
        """Connect, and test the server unless this client has."""
        await self._call(_got, self._prefix + b"test:")

    async def close(self) -> None:
        if self._runtime == "blocking":
            client = self._by_process.pop(os.getpid(), None)
        else:
            client = self._by_loop.pop(asyncio.get_running_loop(), None)
        if client is None or not self._opener.is_ours:
            return
        if client.until_loop_ends is not None:
            await client.until_loop_ends.aclose()
        else:
            for each in client.opened:
                each.close()

    async def _call(self, send: Callable[..., Any], *arguments: Any) -> Any:
        """Send something to this process's or event loop's client, once that may be done, and return the reply."""
        client = self._client()
        wait = client.breaker.wait()
        if wait:
            raise StoreUnavailableError(
                f"{self._opener.name} could not be reached just now; it is tried again in {wait:.1f} s"
            ) from client.breaker.reason
        try:
            if client.redis is None:
                await self._open(client)
            if not client.tested:
                await self._test(client)
            reply = send(client, *arguments)
            if self._runtime == "asyncio" or type(reply) is CoroutineType:
                reply = await resolve(reply)
        except _CLIENT_ERRORS as error:
            explained, away = _explained(error, self._opener.name, new=not client.tested)
            if away:
                client.breaker.failed(error)
            else:
                client.breaker.answered()
            raise explained from error
        except IdemTasksError:
            raise
        except BaseException:
            # Struck from outside: a reply may still be to come, which the next command would take for its own.
            if self._runtime == "blocking":
                _drop_idle_connections(client.redis)
            raise
        client.breaker.answered()
        return reply

    def _client(self) -> _Client:
        """Return this process's or event loop's client; another's is never touched (F27, F54)."""
        if self._runtime == "blocking":
            client = self._by_process.get(os.getpid())
            # No lock, which a fork could leave locked: of two clients made at once, both threads keep the first.
            return client or self._by_process.setdefault(os.getpid(), self._new())
        loop = asyncio.get_running_loop()
        found = self._by_loop.get(loop)
        if found is None:
            for ended in [each for each in list(self._by_loop) if each.is_closed()]:
                self._by_loop.pop(ended, None)
            found = self._by_loop[loop] = self._new()
        return found

    def _new(self) -> _Client:
        return _Client(CircuitBreaker(self._opener.patience))

    async def _open(self, client: _Client) -> None:
        opened = self._opener.open(self._runtime)
        found = commands = opened[0]
        if self._runtime == "blocking" and self._opener.keeps_connections:
            commands = KeptConnections(found.connection_pool, retries=_RETRIES)
            opened.append(commands)
        client.opened, client.commands = opened, commands
        client.redis = found  # the last: with it another thread takes the client for opened
        if self._runtime == "asyncio" and self._opener.is_ours:
            # An event loop that ends closes the generators that are still open in it, and so this client.
            client.until_loop_ends = self._until_loop_ends(client)
            await anext(client.until_loop_ends)

    async def _until_loop_ends(self, client: _Client) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            self._by_loop.pop(asyncio.get_running_loop(), None)
            for each in client.opened:
                await each.aclose()

    async def _test(self, client: _Client) -> None:
        """Find out by trying, never by a version number, whether the server does what everything rests on (F20)."""
        key = self._prefix + b"test:" + secrets.token_hex(16).encode()
        taken, taken_again, standing, left, others, own = await _pipelined(
            client,
            [
                ("SET", key, b"a", "NX", "PX", _packable(_PROBE_TTL)),
                ("SET", key, b"b", "NX", "PX", _packable(_PROBE_TTL)),
                ("GET", key),
                ("PTTL", key),
                ("EVAL", _DELETE_EXACT, b"1", key, b"b"),
                ("EVAL", _DELETE_EXACT, b"1", key, b"a"),
            ],
        )
        if not taken or taken_again or standing != b"a":
            await resolve(client.redis.delete(key))
            raise StoreConfigurationError(
                f"{self._opener.name} ignores the NX of SET, so two workers would get the same marker; "
                "connect to Redis itself, not through this proxy"
            )
        if not 0 < left <= _PROBE_TTL:
            await resolve(client.redis.delete(key))
            raise StoreConfigurationError(
                f"{self._opener.name} ignores the PX of SET, so markers would never expire; "
                "connect to Redis itself, not through this proxy"
            )
        if (others, own) != (0, 1):
            raise StoreConfigurationError(f"{self._opener.name} does not run scripts as Redis does; {_NEEDED}")
        client.sets_and_gets = await self._sets_and_gets(client, key)
        client.tested = True

    async def _sets_and_gets(self, client: _Client, key: bytes) -> bool:
        """Tell whether SET NX GET is one command here, and leave no key behind; the last thing to be tried.

        Servers before 7.0 refuse it, and one that ends the connection with every error can be asked nothing more.
        """
        try:
            first = await resolve(_set_and_get(client, key, b"a", _PROBE_TTL))
            second = await resolve(_set_and_get(client, key, b"b", _PROBE_TTL))
        except exceptions.ResponseError as error:
            if _code(error):
                raise
            first = second = None
        await resolve(client.redis.delete(key))
        return first is None and second == b"a"


# What is sent: the reply, or what an asyncio client's reply is awaited for.


def _set_if_absent(client: _Client, key: bytes, value: bytes, milliseconds: int) -> Any:
    if client.sets_and_gets:
        return _set_and_get(client, key, value, milliseconds)
    return _evaluated(client, _TAKE, key, value, milliseconds)


def _set_and_get(client: _Client, key: bytes, value: bytes, milliseconds: int) -> Any:
    return client.commands.execute_command("SET", key, value, "NX", "GET", "PX", b"%d" % milliseconds, get=True)


def _evaluated(client: _Client, text: str, key: bytes, *arguments: Argument) -> Any:
    packable = [each if type(each) is bytes else _packable(each) for each in arguments]
    return client.commands.execute_command("EVAL", text, b"1", key, *packable)


def _got(client: _Client, key: bytes) -> Any:
    return client.redis.get(key)


async def _evaluated_over(client: _Client, text: str, calls: Sequence[tuple[bytes, Sequence[Argument]]]) -> list[Any]:
    if isinstance(client.redis, _CLUSTERS):  # whose nodes refuse keys of several slots in one command
        commands = [("EVAL", text, b"1", key, *map(_packable, arguments)) for key, arguments in calls]
        return [reply for (reply,) in await _pipelined(client, commands)]
    keys = [key for key, _ in calls]
    arguments = [each if type(each) is bytes else _packable(each) for _, some in calls for each in some]
    replies: list[Any] = await resolve(client.redis.execute_command("EVAL", text, b"%d" % len(keys), *keys, *arguments))
    return replies


def _packable(argument: Argument) -> bytes:
    """Return the argument in bytes, which hiredis takes as they are.

    Of a number it asks for the text, and Python looks for signals meanwhile: a time limit that raises there makes
    hiredis 3.5 crash the process.
    """
    return b"%d" % argument if isinstance(argument, int) else argument


async def _pipelined(client: _Client, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Send all commands before the first reply is read; raise the first error among the replies."""
    # Held to the end: another thread may open a client too and put it in this one's place, which redis-py then closes.
    held = client.redis
    pipeline = held.pipeline(transaction=False)
    for command in commands:
        pipeline.execute_command(*command)
    replies: list[Any] = await resolve(pipeline.execute(raise_on_error=False))
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies


async def _scanned(client: _Client, pattern: bytes) -> set[bytes]:
    """Return all keys like this; SCAN may give one twice."""
    found: set[bytes] = set()
    held = client.redis
    nodes = held.get_primaries() if isinstance(held, _CLUSTERS) else [None]
    for node in nodes:
        cursor: Any = 0
        while True:
            where = {} if node is None else {"target_nodes": node}
            cursor, keys = await resolve(held.scan(cursor=cursor, match=pattern, count=1000, **where))
            found.update(keys)
            if isinstance(cursor, dict):  # a cluster's client tells each node's own
                cursor = next(iter(cursor.values()))
            if not int(cursor):
                break
    return found


_CLUSTERS = (redis.RedisCluster, redis.asyncio.RedisCluster)


def _drop_idle_connections(client: Any) -> None:
    """Let go of connections that may still carry the reply to an interrupted command.

    A time limit can strike between a command and its reply; the next command on that connection would be answered
    with the reply to another key. The one in question is among the idle: redis-py has just put it back.
    """
    if isinstance(client, redis.RedisCluster):
        pools = [node.redis_connection.connection_pool for node in client.get_nodes() if node.redis_connection]
    else:
        pools = [] if client is None else [client.connection_pool]
    for pool in pools:
        pool.disconnect(inuse_connections=False)


# What the client's errors mean.

_CLIENT_ERRORS = (exceptions.RedisError, exceptions.RedisClusterException, OSError)

_NEEDED = "it has to be Redis 6.2 or newer, Valkey, or a server that does the same"

_COMMANDS = (
    "~<prefix>* +set +get +del +pttl +pexpire +eval, and as a whole store also "
    "+hget +hmget +hgetall +hset +hdel +time +scan"
)

_CODES: dict[type[Exception], str] = {
    exceptions.BusyLoadingError: "LOADING",
    exceptions.ReadOnlyError: "READONLY",
    exceptions.OutOfMemoryError: "OOM",
    exceptions.NoPermissionError: "NOPERM",
    exceptions.MasterDownError: "MASTERDOWN",
    exceptions.ClusterDownError: "CLUSTERDOWN",
    exceptions.TryAgainError: "TRYAGAIN",
    exceptions.AuthenticationWrongNumberOfArgsError: "WRONGPASS",
    exceptions.AuthenticationError: "WRONGPASS",
    exceptions.AuthorizationError: "WRONGPASS",
    exceptions.MovedError: "MOVED",
}
"""Redis' error codes, which redis-py takes away from the text of those that have a class of their own."""

_CODE = re.compile(
    r"(?:^|-)(BUSY|CLUSTERDOWN|LOADING|MASTERDOWN|MISCONF|MOVED|NOAUTH|NOPERM|NOREPLICAS|OOM|READONLY|TRYAGAIN|"
    r"UNKILLABLE|WRONGPASS|WRONGTYPE)\b"
)
"""The code at the beginning of an error, or where 6.2 has it in a script's: `ERR Error running script: .. -OOM ..`"""

_AWAY = {
    "LOADING": "is loading its data; it answers when it has",
    "CLUSTERDOWN": "is a cluster that is down: some of its slots are served by no node",
    "MASTERDOWN": "is a replica that has lost its primary",
    "READONLY": "is a read-only replica; give the primary's address, or follow it with redis+sentinel://",
    "NOREPLICAS": "does not write while it has too few replicas (min-replicas-to-write)",
    "TRYAGAIN": "is moving this key to another node",
}
_REFUSED = {
    "OOM": "is out of memory and does not write; raise maxmemory, or choose a volatile-* maxmemory-policy",
    "BUSY": "is busy with somebody's script; stop that with SCRIPT KILL",
    "UNKILLABLE": "is busy with somebody's script",
    "MISCONF": "does not write because it cannot save its data; mend its disk, or see stop-writes-on-bgsave-error",
    "WRONGTYPE": "has a key of another type in this place; delete it, or choose a prefix that nothing else uses",
}
_SETUP = {
    "WRONGPASS": "refuses the user name or password; mend them in the URL: redis://user:password@host",
    "NOAUTH": "asks for a password; write it in the URL: redis://user:password@host",
    "NOPERM": f"does not allow this user a command or key; it needs {_COMMANDS}",
    "MOVED": "is a node of a cluster; use redis+cluster://",
}


_POOL_EMPTY = ("Too many connections", "No connection available.")
"""What redis-py says when its pool has a limit, which the server has no part in."""


def _code(error: BaseException) -> str:
    for kind in type(error).__mro__:
        if kind in _CODES:
            return _CODES[kind]
    found = _CODE.search(str(error)) if isinstance(error, exceptions.ResponseError) else None
    return found[1] if found else ""


def _explained(error: BaseException, name: str, *, new: bool) -> tuple[Exception, bool]:
    """Return the error to raise, and whether it says that nobody answers.

    What is wrong with the set-up is a `StoreConfigurationError` as long as this client never worked, and a `StoreError`
    when it did: a password that is changed while workers run must not make them fail their messages.
    """
    code = _code(error)
    wrong_setup = StoreConfigurationError if new else StoreError
    if code in _AWAY:
        return StoreUnavailableError(f"{name} {_AWAY[code]}"), False
    if code in _REFUSED:
        return StoreError(f"{name} {_REFUSED[code]}"), False
    if code in _SETUP:
        return wrong_setup(f"{name} {_SETUP[code]}"), False
    text = str(error)
    if "DB index" in text:
        return wrong_setup(f"{name} has no database of this number; choose another, or raise `databases`"), False
    if "Cluster mode is not enabled" in text:
        return wrong_setup(f"{name} is no cluster; use redis:// instead of redis+cluster://"), False
    if text in _POOL_EMPTY:
        return StoreUnavailableError(f"{name}: all connections are in use; raise max_connections"), False
    if isinstance(error, exceptions.ResponseError | exceptions.InvalidResponse):
        if "unknown command" in text.lower():
            return wrong_setup(f"{name} is too old or lacks a command ({text[:100]}); {_NEEDED}"), False
        return StoreError(f"{name} answered with an error: {text[:200]}"), False
    return (
        StoreUnavailableError(
            f"{name} cannot be reached ({text[:200]}); is it running, and are host and port of the URL right?"
        ),
        True,
    )


_TAKE = script("take")
_DELETE_EXACT = script("delete_exact")
