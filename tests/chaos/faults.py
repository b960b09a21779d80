"""Does to servers, connections and workers what is planned, and writes down what was done."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TypeVar

import psutil
from redis.exceptions import RedisError

from tests.chaos.history import Fault
from tests.chaos.ledger import Ledger
from tests.chaos.plan import Planned
from tests.chaos.servers import Premises, ReplicatedRedis
from tests.chaos.workers import Worker
from tests.services.postgres_server import PostgresServer
from tests.services.waiting import wait_until

T = TypeVar("T")

_logger = logging.getLogger(__name__)

LEASE = 2.5
"""Seconds; of the handlers."""

SECONDS_TO_LOCK = 60.0
SECONDS_TO_FIND_WORK = 1.0

FILLER = "filler:"
FILLER_BYTES = 20_000


@dataclass
class Shop:
    """What can be struck: a shop's servers and workers."""

    premises: Premises
    workers: Sequence[Worker]
    ask_again: Callable[[Iterable[str]], None]  # publishes these orders once more, as one who waits in vain would
    markers_busy: threading.Lock = field(default_factory=threading.Lock)
    sql_busy: threading.Lock = field(default_factory=threading.Lock)

    @property
    def name(self) -> str:
        return self.premises.name


class Faults:
    """Strikes two shops; `told` is what was done so far.

    Faults of different things overlap; one thing suffers one at a time.
    """

    def __init__(self, shops: Sequence[Shop], ledger_url: str) -> None:
        self.told: list[Fault] = []
        self.failed: list[str] = []  # faults that could not be done or mended
        self._shops = shops
        self._ledger_url = ledger_url
        self._over = threading.Event()
        self._pool = ThreadPoolExecutor(max_workers=12, thread_name_prefix="fault")
        self._kinds: dict[str, Callable[[Shop, Planned], None]] = {
            "child_killed": self._kill_child,
            "worker_killed": self._kill_worker,
            "worker_paused": self._pause_worker,
            "markers_flushed": self._flush_markers,
            "redis_restarted": self._restart_redis,
            "sql_restarted": self._restart_sql,
            "connections_cut": self._cut_connections,
            "black_hole": self._open_black_hole,
            "redis_out_of_memory": self._fill_redis,
            "sentinel_failover": self._fail_over,
        }

    def begin(self, fault: Planned) -> None:
        """Do it, and do not wait for its end."""
        self._pool.submit(self._do, fault)

    def end(self) -> None:
        """Mend everything, and begin nothing more."""
        self._over.set()
        self._pool.shutdown(wait=True)

    def _do(self, fault: Planned) -> None:
        shop = self._shops[fault.shop]
        try:
            if not self._over.is_set():
                self._kinds[fault.kind](shop, fault)
        except Exception as error:
            _logger.exception("%s of %s %s", fault.kind, shop.name, fault.part)
            self.failed.append(f"{fault.kind} of {shop.name} {fault.part}: {error!r}")

    def _tell(self, fault: Planned, at: float, target: str, details: str = "", pids: Sequence[int] = ()) -> None:
        self.told.append(Fault(fault.kind, at, time.time(), target, tuple(pids), details))

    def _wait(self, seconds: float) -> None:
        self._over.wait(seconds)

    # Workers

    def _kill_child(self, shop: Shop, fault: Planned) -> None:
        worker = chosen(shop.workers, fault.pick)
        with held(worker.busy):
            at_work = self._at_work(shop, worker)
            children = sorted(at_work) or worker.children()
            if not children:
                return
            pid, at = chosen(children, fault.strength), time.time()
            with suppress(psutil.NoSuchProcess):
                psutil.Process(pid).kill()
            self._tell(fault, at, worker.name, "at work" if at_work else "idle", [pid])

    def _kill_worker(self, shop: Shop, fault: Planned) -> None:
        worker = chosen(shop.workers, fault.pick)
        with held(worker.busy):
            at_work, at = self._at_work(shop, worker), time.time()
            pids = worker.kill()
            self._tell(fault, at, worker.name, f"{len(at_work)} at work", pids)
            self._wait(fault.strength * LEASE)
            worker.start()

    def _pause_worker(self, shop: Shop, fault: Planned) -> None:
        worker = chosen(shop.workers, fault.pick)
        with held(worker.busy):
            at_work, at = self._at_work(shop, worker), time.time()
            pids = worker.pause()
            shop.ask_again(at_work.values())
            try:
                # To its end also when the run is over: a shorter one would not be what it is told to be.
                time.sleep(LEASE * (1.2 + fault.strength))  # the fault: paused for longer than its lease
            finally:
                worker.resume()
            self._tell(fault, at, worker.name, f"{len(at_work)} at work", pids)

    # Redis

    def _flush_markers(self, shop: Shop, fault: Planned) -> None:
        with held(shop.markers_busy), shop.premises.markers.node(shop.premises.markers.primary()).client() as client:
            at, count = time.time(), client.dbsize()
            client.flushall()
            self._ask_again(shop)
            self._tell(fault, at, f"{shop.name} markers", f"{count} keys")

    def _restart_redis(self, shop: Shop, fault: Planned) -> None:
        with held(shop.markers_busy):
            server = shop.premises.markers.node(0)
            at = time.time()
            server.kill()
            self._ask_again(shop)
            self._wait(fault.strength * LEASE)
            server.start()
            self._tell(fault, at, f"{shop.name} markers")

    def _fill_redis(self, shop: Shop, fault: Planned) -> None:
        policy = chosen(("allkeys-random", "allkeys-lru", "volatile-ttl", "volatile-random", "noeviction"), fault.pick)
        markers = shop.premises.markers
        with held(shop.markers_busy), markers.node(markers.primary()).client() as client:
            at, evicted, refused = time.time(), client.info("stats")["evicted_keys"], 0
            limit = client.info("memory")["used_memory"] + FILLER_BYTES
            client.config_set("maxmemory-policy", policy)
            client.config_set("maxmemory", limit)
            try:
                until = time.monotonic() + LEASE * (0.5 + fault.strength)
                for number in range(10_000):
                    if time.monotonic() > until:
                        break
                    try:
                        client.set(f"{FILLER}{number % 100}", "x" * FILLER_BYTES)
                    except RedisError:
                        refused += 1
                    time.sleep(0.02)  # the fault: Redis is filled over seconds, and not at once
            finally:
                client.config_set("maxmemory", 0)
                client.delete(*(f"{FILLER}{number}" for number in range(100)))
            evicted = client.info("stats")["evicted_keys"] - evicted
            self._tell(fault, at, f"{shop.name} markers", f"{policy}: {evicted} keys evicted, {refused} writes refused")

    def _fail_over(self, shop: Shop, fault: Planned) -> None:
        markers = shop.premises.markers
        assert isinstance(markers, ReplicatedRedis)
        with held(shop.markers_busy):
            markers.settle()
            at, dead = time.time(), markers.primary()
            markers.detach_replica(dead)
            self._wait(fault.strength)  # of writes that will be lost
            lost_since, server = time.time() - at, markers.node(dead)
            server.kill()
            markers.fail_over_from(dead)
            self._ask_again(shop)
            self._wait(fault.pick * LEASE)
            server.start()
            markers.attach_replica(dead)
            markers.settle()
            self._tell(fault, at, f"{shop.name} markers", f"the writes of {lost_since:.2f} s were lost")

    # SQL

    def _restart_sql(self, shop: Shop, fault: Planned) -> None:
        server = shop.premises.database.server
        with held(shop.sql_busy):
            at = time.time()
            if isinstance(server, PostgresServer):
                assert server.process is not None
                server.process.send_signal(signal.SIGQUIT)  # "immediate"
                server.process.wait(timeout=30)
            else:
                server.kill()
            self._wait(fault.strength * 1.6 * LEASE)
            server.start()
            self._tell(fault, at, f"{shop.name} sql")

    # Connections

    def _cut_connections(self, shop: Shop, fault: Planned) -> None:
        premises = shop.premises
        proxies = {"markers": premises.markers.proxies, "sql": [premises.database.proxy]}
        at = time.time()
        count = sum(proxy.cut() for proxy in proxies.get(fault.part, [premises.broker.proxy]))
        self._tell(fault, at, f"{shop.name} {fault.part}", f"{count} connections")

    def _open_black_hole(self, shop: Shop, fault: Planned) -> None:
        premises, swallow = shop.premises, fault.pick < 0.5
        if fault.part == "sql":
            busy, proxies = shop.sql_busy, [premises.database.proxy]
        else:
            # The primary alone, which a Sentinel then replaces; or all of them, which it cannot.
            busy, proxies = shop.markers_busy, list(premises.markers.proxies)
            if int(fault.pick * 100) % 2:
                proxies = [proxies[premises.markers.primary()]]
        with held(busy):
            at = time.time()
            for proxy in proxies:
                proxy.begin_black_hole(swallow=swallow)
            try:
                self._wait(LEASE * (0.3 + 1.3 * fault.strength))
            finally:
                for proxy in proxies:
                    proxy.end_black_hole()
            details = f"{len(proxies)} proxies, {'swallowed' if swallow else 'delayed'}"
            self._tell(fault, at, f"{shop.name} {fault.part}", details)
            if fault.part == "markers":
                premises.markers.settle()

    def _ask_again(self, shop: Shop) -> None:
        """Whatever runs now without its marker."""
        with Ledger(self._ledger_url) as ledger:
            shop.ask_again(ledger.at_work(shop.name).values())

    def _at_work(self, shop: Shop, worker: Worker) -> dict[int, str]:
        """The children within a handler, and its order; waits a moment for one: the others have nothing to lose."""
        found: dict[int, str] = {}
        with Ledger(self._ledger_url) as ledger, suppress(TimeoutError):

            def there_is_one() -> bool:
                children = set(worker.children())
                found.update({pid: order for pid, order in ledger.at_work(shop.name).items() if pid in children})
                return bool(found)

            wait_until(there_is_one, seconds=SECONDS_TO_FIND_WORK, what="a handler")
        return found


def chosen(things: Sequence[T], pick: float) -> T:
    return things[int(pick * len(things))]


@contextmanager
def held(lock: threading.Lock) -> Iterator[None]:
    if not lock.acquire(timeout=SECONDS_TO_LOCK):
        raise TimeoutError("a fault of the same thing did not end")
    try:
        yield
    finally:
        lock.release()
