"""What a run makes, and removes again: a folder of its own, and its tables, markers and queues on your servers."""

from __future__ import annotations

import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from kombu import Connection
from kombu.utils.url import maybe_sanitize_url
from redis import Redis
from sqlalchemy import URL
from sqlalchemy.exc import SQLAlchemyError

from idem_tasks.demo.ledger import Ledger
from idem_tasks.demo.orders import make_orders
from idem_tasks.demo.processes import DemoError, Processes
from idem_tasks.demo.settings import SCOPE, SIDES, Settings
from idem_tasks.demo.shop import celery_app, queue_for
from idem_tasks.errors import ConfigurationError, StoreUnavailableError
from idem_tasks.runtime import run_sync
from idem_tasks.stores.redis import RedisStore
from idem_tasks.stores.sql import SQLStore
from idem_tasks.stores.sql_urls import is_in_memory, parse_url

_BROKERS = ("amqp", "amqps", "pyamqp", "redis", "rediss")

_CONNECT = 5
"""Seconds within which a broker that is there answers."""

_REPLY = 1.0
"""Seconds within which a Redis replies .."""

_START = 30.0
""".. and within which its stand-in has started."""

_REMOVAL = 10.0
"""Seconds in which a table can be dropped: the last transaction of a killed worker may have to end first."""


@dataclass(frozen=True, slots=True)
class Servers:
    """The servers to play on; None is one that needs no installation."""

    database_url: str | None = None
    redis_url: str | None = None
    broker_url: str | None = None

    def check(self) -> None:
        """Raise `ConfigurationError` for URLs that cannot work."""
        if self.database_url is not None and is_in_memory(parse_url(self.database_url)):
            raise ConfigurationError("the demo's workers are processes of their own: give a database they can share")
        if self.broker_url is not None and self.broker_url.partition(":")[0] not in _BROKERS:
            raise ConfigurationError(f"the broker's URL must begin with one of {', '.join(_BROKERS)}")


@contextmanager
def open_run(servers: Servers, *, orders: int, keep: bool) -> Iterator[tuple[Settings, Processes]]:
    """Make what a run needs. At the end its processes are gone, and so is all it made, unless it is to be kept.

    Raises `ConfigurationError` and `StoreUnavailableError` for servers that cannot be used.
    """
    servers.check()
    name = f"idem_tasks_demo_{secrets.token_hex(4)}"
    folder = Path(tempfile.gettempdir()).resolve() / name
    with ExitStack() as at_end:

        def finally_remove(remove: Callable[[], None]) -> None:
            if not keep:
                at_end.callback(remove)

        at_end.enter_context(_signals_as_before())
        finally_remove(lambda: shutil.rmtree(folder, ignore_errors=True))
        folder.mkdir(mode=0o700)
        # On exit the processes end first, and only then what they used is removed.
        removals = at_end.enter_context(ExitStack())
        processes = at_end.enter_context(Processes())
        at_end.callback(_ignore_signals)
        listening = socket.create_server(("127.0.0.1", 0)) if servers.redis_url is None else None
        settings = Settings(
            name=name,
            folder=folder,
            orders=orders,
            database_url=_database(servers.database_url, folder),
            redis_url=servers.redis_url or f"redis://127.0.0.1:{listening.getsockname()[1] if listening else 0}/0",
            broker_url=servers.broker_url,
            redis_patience=_REPLY if listening is None else _START,
            lifeline=processes.lifeline,
            keep=keep,
        )
        if listening is not None:
            with listening:
                processes.start_marker(settings, listening.fileno())
        if servers.broker_url is not None:
            _make(_check_broker, _remove_queues, settings, removals)
        _make(_try_redis, _nothing if servers.redis_url is None else _remove_markers, settings, removals)
        _make(_make_tables, _nothing if servers.database_url is None else _remove_tables, settings, removals)
        yield settings, processes


# Signals: Ctrl-C, and what else ends a program politely, all end a run in the same orderly way.

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def _signals_as_before() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _ENDING}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}  # nohup
    for number in before:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore_signals() -> None:
    """Let nothing interrupt the removal: it takes a moment, and what it missed would stay."""
    if threading.current_thread() is threading.main_thread():
        for number in _ENDING:
            signal.signal(number, signal.SIG_IGN)


# Making


def _database(url: str | None, folder: Path) -> str:
    """Return the database's URL as a process with another working directory needs it."""
    parsed = URL.create("sqlite", database=str(folder / "shop.db")) if url is None else parse_url(url)
    if parsed.get_backend_name() == "sqlite" and parsed.database:
        parsed = parsed.set(database=str(Path(parsed.database).resolve()))
    return parsed.render_as_string(hide_password=False)


def _make(
    make: Callable[[Settings], None], remove: Callable[[Settings], None], settings: Settings, removals: ExitStack
) -> None:
    """Make something, and have it removed at the end, also if this is interrupted; not if there is no such server."""
    is_to_be_removed = not settings.keep
    try:
        make(settings)
    except (ConfigurationError, StoreUnavailableError):
        is_to_be_removed = False
        raise
    finally:
        if is_to_be_removed:
            removals.callback(remove, settings)


def _nothing(settings: Settings) -> None:
    """What was made is in the folder, or in a process."""


def _make_tables(settings: Settings) -> None:
    record = SQLStore(settings.database_url, table_prefix=settings.table_prefix)
    run_sync(record.prepare())
    run_sync(record.close())
    Ledger(settings.database_url, settings.table_prefix).open()


def _try_redis(settings: Settings) -> None:
    marker = RedisStore(settings.redis_url, prefix=settings.redis_prefix, socket_timeout=settings.redis_patience)
    run_sync(marker.prepare())
    run_sync(marker.close())


def _check_broker(settings: Settings) -> None:
    try:
        with _broker(settings) as connection:
            connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0, timeout=_CONNECT)
    except Exception as error:
        where = maybe_sanitize_url(str(settings.broker_url))
        raise StoreUnavailableError(f"the broker {where} cannot be used: {type(error).__name__}: {error}") from error


def _broker(settings: Settings) -> Connection:
    connection: Connection = celery_app(settings, SIDES[0]).connection_for_write(connect_timeout=_CONNECT)
    return connection


# Removing


def _remove_queues(settings: Settings) -> None:
    with _broker(settings) as connection:
        for side in SIDES:
            queue = queue_for(settings, side)(connection.default_channel)
            queue.delete()
            queue.exchange.delete()
    if str(settings.broker_url).startswith("redis"):
        with Redis.from_url(str(settings.broker_url)) as client:  # the transport's own keys
            for key in client.scan_iter(f"{settings.redis_prefix}*"):
                client.delete(key)


def _remove_markers(settings: Settings) -> None:
    marker = RedisStore(settings.redis_url, prefix=settings.redis_prefix)
    run_sync(marker.drop([(SCOPE, order.order_id) for order in make_orders(settings.orders)]))
    run_sync(marker.close())


def _remove_tables(settings: Settings) -> None:
    until = time.monotonic() + _REMOVAL
    while True:
        try:
            Ledger(settings.database_url, settings.table_prefix).drop_all()
        except SQLAlchemyError as error:
            if time.monotonic() > until:
                raise DemoError(f"the tables {settings.table_prefix}* could not be dropped: {error}") from error
            time.sleep(0.2)
        else:
            return
