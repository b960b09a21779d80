"""Celery workers in processes of their own, and what the tests say to them."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from celery import Celery

from tests.integration.celery.ledger import Ledger
from tests.services import reaper
from tests.services.run import Run
from tests.services.waiting import wait_until

HERE = Path(__file__).parent
LEASE = 1.5  # seconds


class Worker:
    """One `celery worker` process with its children."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log
        self.shown = 0  # bytes of the log that earlier tests were shown

    def wait_until_ready(self) -> None:
        wait_until(lambda: self.has_ended or " ready." in self.text(), seconds=40, what="the worker to be ready")
        assert not self.has_ended, self.text()

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def family(self) -> list[psutil.Process]:
        return reaper.family(psutil.Process(self.process.pid))

    def send(self, number: signal.Signals) -> None:
        """To the main process alone, as a supervisor would."""
        self.process.send_signal(number)

    def ends_within(self, seconds: float) -> bool:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=seconds)
        return self.has_ended

    def wait_until_ended(self, seconds: float = 20.0) -> int:
        return self.process.wait(timeout=seconds)

    def kill(self) -> None:
        """Kill the whole tree, as the kernel or a lost machine would."""
        if not self.has_ended:
            reaper.send(signal.SIGKILL, self.family())
        self.process.wait(timeout=10)

    def pause(self) -> None:
        reaper.pause(self.family())

    def resume(self) -> None:
        reaper.send(signal.SIGCONT, self.family())


@dataclass
class Shop:
    """A queue on a broker, a store, a ledger, and the workers that were started for them."""

    run: Run
    name: str
    broker: str
    backend: str
    store: dict[str, Any]
    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    workers: list[Worker] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.folder / "ledger.db")
        transport: dict[str, Any] = {}
        if self.is_redis:
            transport = {f"unacked_{part}": f"{self.name}-{part}" for part in ("key", "index_key", "mutex_key")}
            transport |= {"unacked_restore_interval": 1, "unacked_restore_throttle": 1}
        self.config = {
            "broker_url": self.broker,
            "result_backend": self.backend,
            "task_default_queue": self.name,
            "broker_transport_options": transport | self.config.pop("transport", {}),
            "broker_connection_retry_on_startup": True,
            "worker_lost_wait": 0.5,
            "worker_prefetch_multiplier": 4,
            "worker_enable_remote_control": False,
            "result_expires": 600,
            **self.config,
        }
        self.client = Celery("client", set_as_current=False)
        self.client.conf.update(self.config)

    @property
    def is_redis(self) -> bool:
        return self.broker.startswith("redis")

    def start(self, pool: str = "prefork", concurrency: int = 3, **environment: str) -> Worker:
        worker = self.launch(pool, concurrency, **environment)
        worker.wait_until_ready()
        return worker

    def launch(self, pool: str, concurrency: int = 3, **environment: str) -> Worker:
        """Start a worker and do not wait for it."""
        number = len(self.workers)
        log = self.folder / f"worker-{number}.log"
        config = self.config | json.loads(environment.pop("config", "{}"))
        process = self.run.start(
            [sys.executable, "-m", "celery", "-A", "shop", "worker", "--loglevel", "info",
             "--pool", pool, "--concurrency", str(concurrency), "--hostname", f"{self.name}-{number}@here",
             "--without-gossip", "--without-mingle", "--without-heartbeat"],
            log=log,
            cwd=self.folder,
            env=os.environ
            | {
                "PYTHONPATH": str(HERE),
                "SHOP_CONFIG": json.dumps(config),
                "SHOP_LEDGER": str(self.ledger.path),
                "SHOP_STORE": json.dumps({"lease": LEASE} | self.store),
            }
            | environment,
            user=None,
            group=None,
            stop_signal=signal.SIGTERM,
        )  # fmt: skip
        self.workers.append(Worker(process, log))
        return self.workers[-1]

    def send(self, task: str, *args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        """Publish a message; returns Celery's AsyncResult."""
        return self.task(task, *args, **kwargs).apply_async(**(options or {}))

    def task(self, task: str, *args: Any, **kwargs: Any) -> Any:
        """A signature, for a canvas."""
        return self.client.signature(f"shop.{task}", args=args, kwargs=kwargs)

    def go(self, order: str, *, attempt: int | None = None) -> None:
        """Let a held handler go on, or only that of one attempt."""
        self.ledger.note("go" if attempt is None else f"go-{attempt}", order)

    def waiting(self) -> int:
        """How many messages are in the queue, not counting what workers hold."""
        with self.client.connection_for_read() as connection, connection.channel() as channel:
            try:
                return int(channel.queue_declare(self.name, passive=True).message_count)
            except connection.channel_errors:  # an empty queue is none at all, in Redis
                return 0

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        self.client.backend.result_consumer.stop()
        self.client.backend.client.connection_pool.disconnect()
        self.client.close()


@contextmanager
def logs_of(shops: list[Shop]) -> Iterator[None]:
    """Print what the workers logged meanwhile; pytest shows it if the test fails."""
    for shop in shops:
        for worker in shop.workers:
            worker.shown = len(worker.text())
    yield
    for shop in shops:
        for worker in shop.workers:
            if text := worker.text()[worker.shown :]:
                sys.stdout.write(f"----- {worker.log}\n{text[-12000:]}\n")
