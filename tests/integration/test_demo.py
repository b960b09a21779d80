"""The demo as its users run it: a program, with real workers, that shows what is so and leaves nothing behind."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from kombu import Connection, Exchange, Queue
from redis import Redis
from sqlalchemy import NullPool, create_engine, inspect

from idem_tasks.demo.worker import CONCURRENCY
from tests.services.waiting import wait_until

WITHOUT, WITH = 0, 1

# What a test does to a run it does as a user could: by a sitecustomize of its own, which every Python imports.
UNPROTECTED = """
import idem_tasks.decorator
idem_tasks.decorator.idempotent_task = lambda **_: lambda handler: handler
"""
KNOWN_NAME = """
import secrets
secrets.token_hex = lambda count: "known"
"""


class Demo:
    """`idem-tasks demo` with a temporary folder of its own."""

    def __init__(self, folder: Path, sitecustomize: str = "", **environment: str) -> None:
        self.temporary = folder / "tmp of 100%20é"
        self.temporary.mkdir(parents=True)
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(sitecustomize)
        read_only = folder / "read-only"
        read_only.mkdir(mode=0o555)
        self._started_in = read_only
        self._environment = {
            **os.environ,
            "TMPDIR": str(self.temporary),
            "PYTHONPATH": str(folder / "site"),
            **environment,
        }

    def start(self, *options: str) -> "Demo":
        self.process = subprocess.Popen(
            [sys.executable, "-m", "idem_tasks", "demo", *options],
            cwd=self._started_in,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell's background job has SIGINT ignored, and its children with it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
        )
        return self

    def end(self) -> "Demo":
        self.output, self.talk = self.process.communicate(timeout=100)
        return self

    @property
    def was_interrupted(self) -> bool:
        """What a shell calls 130.

        Python ends by the signal itself where that struck code that was made of a string, although it was caught:
        dataclasses and SQLAlchemy run such code when they are imported.
        """
        return self.process.returncode in (130, -signal.SIGINT)

    def wait_for(self, said: str) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if said in line:
                return
        raise AssertionError(f"it never said {said!r}")

    def row(self, label: str) -> tuple[str, str]:
        """What stands in the row that begins so: without and with idem_tasks."""
        (row,) = [line.split("\t") for line in self.output.splitlines() if line.startswith(label)]
        return row[1], row[2]

    def processes(self) -> list[psutil.Process]:
        """The processes that it started."""
        found = []
        for process in psutil.process_iter():
            try:
                if str(self.temporary) in process.environ().get("TMPDIR", "") and process.pid != self.process.pid:
                    found.append(process)
            except psutil.Error:
                continue  # it has just ended, or is another user's
        return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]

    def assert_nothing_is_left(self) -> None:
        def is_gone() -> bool:
            return not self.processes() and not list(self.temporary.iterdir())

        wait_until(is_gone, seconds=5, what="its processes and files to go")


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    made = Demo(tmp_path / "demo")
    yield made
    if made.process.poll() is None:
        made.process.kill()
        made.end()


def assert_exactly_once(demo: Demo, orders: int) -> None:
    assert demo.process.returncode == 0, demo.talk
    assert [demo.row(label)[WITH] for label in ("effects", "expected", "lost", "duplicated")] == [
        *(str(orders), str(orders), "0", "0")
    ]
    messages, charges = int(demo.row("messages")[WITHOUT]), int(demo.row("effects")[WITHOUT])
    assert charges == messages >= 2 * orders
    assert demo.row("lost")[WITHOUT] == "0"
    assert demo.row("duplicated")[WITHOUT] == str(messages - orders)
    assert int(demo.row("takeovers")[WITH]) == 1
    assert int(demo.row("replays")[WITH]) == messages - orders
    assert demo.row("records")[WITH] == str(orders)
    answered = sum(int(demo.row(label)[WITH]) for label in ("runs", "replays", "waits"))
    # The worker that is killed in mid-charge may have another process, between its delivery and its claim.
    assert 0 <= int(demo.row("deliveries")[WITH]) - answered < CONCURRENCY
    assert f"Charged exactly once with idem_tasks: {orders} of {orders} orders." in demo.talk.splitlines()[-1]


def test_two_at_once_show_what_is_so_whatever_the_environment(tmp_path: Path) -> None:
    """Each charges its orders once, whatever the environment tells Celery and us, and leaves nothing."""
    plain = Demo(tmp_path / "plain").start()
    odd = Demo(
        tmp_path / "odd",
        HOME="/nonexistent",
        CELERY_BROKER_URL="redis://127.0.0.1:1/0",
        IDEM_TASKS_DISABLED="1",
        IDEM_TASKS_DATABASE_URL="sqlite:////nonexistent/records.db",
        PYTHONIOENCODING="ascii",
    ).start("--orders", "4")
    assert_exactly_once(plain.end(), 10)
    assert_exactly_once(odd.end(), 4)
    plain.assert_nothing_is_left()
    odd.assert_nothing_is_left()


@pytest.mark.parametrize("database, broker", [("postgres_url", "rabbitmq_url"), ("mariadb_url", "redis_url")])
def test_it_shows_the_same_on_servers_and_removes_what_it_made(
    tmp_path: Path, redis_url: str, database: str, broker: str, request: pytest.FixtureRequest
) -> None:
    """Tables, markers, queues and exchanges are gone in the end."""
    database_url, broker_url = request.getfixturevalue(database), request.getfixturevalue(broker)
    demo = Demo(tmp_path / "demo", KNOWN_NAME)
    demo.start("--redis-url", redis_url, "--database-url", database_url, "--broker-url", broker_url)
    assert_exactly_once(demo.end(), 10)
    demo.assert_nothing_is_left()
    assert_servers_are_empty(database_url, redis_url, broker_url)


def assert_servers_are_empty(database_url: str, redis_url: str, broker_url: str) -> None:
    engine = create_engine(database_url, poolclass=NullPool)
    assert inspect(engine).get_table_names() == []
    with Redis.from_url(redis_url) as client:
        assert list(client.scan_iter()) == []
    if broker_url.startswith("amqp"):
        name = "idem_tasks_demo_known.with"
        assert_not_found(broker_url, lambda channel: Exchange(name, passive=True)(channel).declare())
        assert_not_found(broker_url, lambda channel: Queue(name)(channel).queue_declare(passive=True))


def assert_not_found(broker_url: str, declare: Callable[[Any], object]) -> None:
    with Connection(broker_url) as connection, pytest.raises(connection.channel_errors, match="NOT_FOUND"):
        declare(connection.default_channel)


@pytest.mark.parametrize("said", ["Records in", "Two Celery workers started", "Killed in each worker"])
def test_an_interruption_leaves_nothing(demo: Demo, said: str) -> None:
    """Ctrl-C at any step ends all processes at once, removes the folder, and exits with 130."""
    demo.start().wait_for(said)
    demo.process.send_signal(signal.SIGINT)
    demo.end()
    assert demo.was_interrupted
    assert "Traceback" not in demo.talk
    demo.assert_nothing_is_left()


def test_an_interruption_leaves_nothing_on_servers(
    tmp_path: Path, postgres_url: str, redis_url: str, rabbitmq_url: str
) -> None:
    """Ctrl-C in the middle removes tables, markers, queues and exchanges too."""
    demo = Demo(tmp_path / "demo", KNOWN_NAME)
    demo.start("--redis-url", redis_url, "--database-url", postgres_url, "--broker-url", rabbitmq_url)
    demo.wait_for("Killed in each worker")
    assert [path.name for path in demo.temporary.iterdir()] == ["idem_tasks_demo_known"]
    demo.process.send_signal(signal.SIGINT)
    assert demo.end().was_interrupted
    demo.assert_nothing_is_left()
    assert_servers_are_empty(postgres_url, redis_url, rabbitmq_url)


def test_no_worker_outlives_a_demo_that_is_killed(demo: Demo) -> None:
    """SIGKILL to the demo itself ends its workers, their children and the stand-in for Redis."""
    demo.start().wait_for("Two Celery workers started")
    assert len(demo.processes()) >= 7
    demo.process.kill()
    demo.end()
    demo.assert_nothing_is_left()


def test_it_fails_when_an_order_is_charged_twice(tmp_path: Path) -> None:
    """With a decorator that does nothing, the exit status is 1 and the last line says what is wrong."""
    demo = Demo(tmp_path / "demo", UNPROTECTED).start("--orders", "2").end()
    assert demo.process.returncode == 1
    assert demo.row("duplicated")[WITH] == "3"
    assert demo.talk.splitlines()[-1].startswith("Not exactly once: 3 charges were duplicates; ")
    demo.assert_nothing_is_left()


@pytest.mark.parametrize("option", ["--redis-url", "--database-url", "--broker-url"])
def test_a_server_that_is_not_there_is_named_without_its_password(demo: Demo, option: str) -> None:
    """Exit 5 within seconds, one line, nothing left."""
    scheme = {"--redis-url": "redis", "--database-url": "postgresql", "--broker-url": "amqp"}[option]
    demo.start(option, f"{scheme}://me:secret@127.0.0.1:1/1").end()
    assert demo.process.returncode == 5
    assert demo.talk.splitlines()[-1].startswith("idem-tasks: ")
    assert "127.0.0.1:1" in demo.talk
    assert "secret" not in demo.output + demo.talk
    demo.assert_nothing_is_left()
