"""Many relays at once on real databases, and the relay as a command."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import create_engine

from idem_tasks import Idempotency, MemoryStore, OutboxMessage, SQLStore, current_claim, outbox
from idem_tasks.cli import relay
from idem_tasks.stores.sql_statements import statements_for
from tests.services.waiting import wait_until

KEYS, MESSAGES, RELAYS = 12, 4, 4


@pytest.mark.parametrize("fixture", ["sqlite_url", "postgres_url", "mariadb_url"])
def test_many_relays_keep_the_order_of_each_key(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, fixture: str
) -> None:
    """Four at once, whose sends fail now and then: each message is sent once, after all earlier ones of its key."""
    url: str = request.getfixturevalue(fixture)
    monkeypatch.setattr(outbox, "_FIRST_DELAY", 0.01)
    is_up, lock = threading.Event(), threading.Lock()
    sent: dict[str, list[int]] = defaultdict(list)
    dice = random.Random(7)

    def send(message: OutboxMessage) -> None:
        with lock:
            if not is_up.is_set() or dice.random() < 0.2:
                raise OSError
            sent[message.key].append(message.number)

    def handler() -> None:
        for number in range(MESSAGES):
            current_claim().publish_message(number, to="mail")

    store = SQLStore(url, create_schema=True)
    with Idempotency(store=store, senders={"mail": send}, observers=[]) as publisher:
        for key in range(KEYS):
            publisher.run(handler, scope="s", key=key)
        assert publisher.relay(1).left == KEYS * MESSAGES
        is_up.set()
        start = threading.Barrier(RELAYS, timeout=30)

        def send_all(_number: int) -> None:
            with Idempotency(store=SQLStore(url), senders={"mail": send}, observers=[]) as idem:
                start.wait()
                for _ in range(500):
                    if not idem.relay(5).left:
                        return
            raise AssertionError("messages are left")

        with ThreadPoolExecutor(RELAYS) as threads:
            list(threads.map(send_all, range(RELAYS)))
    assert sent == {str(key): list(range(MESSAGES)) for key in range(KEYS)}


def test_postgresql_finds_the_first_of_many_of_a_key_by_its_index(postgres_url: str) -> None:
    """It does not compare all messages of a key with one another, which would take minutes for 50,000."""

    def handler() -> None:
        for number in range(3_000):
            current_claim().publish_message(number, to="mail")

    def refuse(_message: OutboxMessage) -> None:
        raise OSError

    engine = create_engine(postgres_url)
    take = statements_for("postgresql", None, "idem_tasks_").outbox.take_any
    compiled = take.compile(dialect=engine.dialect)  # type: ignore[attr-defined]
    values = compiled.construct_params({"new_owner": "o", "lease": 60.0, "limit": 100})
    store = SQLStore(postgres_url, create_schema=True)
    with Idempotency(store=store, senders={"mail": refuse}, observers=[]) as idem:
        idem.run(handler, scope="s", key="k")
        with engine.connect() as connection:
            connection.exec_driver_sql("ANALYZE idem_tasks_outbox")
            plan = "\n".join(connection.exec_driver_sql(f"EXPLAIN {compiled}", values).scalars())
    engine.dispose()
    assert "Anti Join" not in plan, plan
    assert "using idem_tasks_outbox_pkey on idem_tasks_outbox other" in plan, plan


@pytest.mark.parametrize("sizes", [[200_000] * 100, [1_000_000] * 20, [1] * 250, [1_000_000, 1, 1_000_000]])
def test_messages_that_no_statement_would_hold_together(mariadb_url: str, sizes: list[int]) -> None:
    """20 MB are more than MariaDB takes at once: they are written in several statements of one transaction."""
    sent: list[int] = []

    def handler() -> None:
        for size in sizes:
            current_claim().publish_message("x" * size, to="mail")

    store = SQLStore(mariadb_url, create_schema=True)
    senders = {"mail": lambda message: sent.append(len(message.body))}
    with Idempotency(store=store, senders=senders, observers=[]) as idem:
        idem.run(handler, scope="s", key="k")
    assert sent == sizes


def test_the_command_does_not_count_at_every_look() -> None:
    """What is left is nobody's question there, and counting reads the whole table."""
    store, sent, ending = MemoryStore(), [], threading.Event()
    store.outbox.add([OutboxMessage("0" * 32, "s", "k", 1, 0, "mail", b'{"body":1,"headers":{},"options":{}}')])

    async def count() -> int:
        raise AssertionError

    store.outbox.count = count  # type: ignore[method-assign]

    def send(message: OutboxMessage) -> None:
        sent.append(message.body)
        ending.set()

    with Idempotency(store=store, senders={"mail": send}, observers=[]) as idem:
        relay._send_for_ever(idem, 100, 0.01, ending)
    assert sent == [1]


APP = """
import os
from pathlib import Path
from idem_tasks import configure, current_claim

def send(message):
    if not Path("up").exists():
        raise ConnectionError
    with open("sent", "a") as file:
        file.write(f"{message.body}\\n")

idem = configure(database_url="sqlite:///outbox.db", senders={"mail": send}, observers=[])

def handler():
    for number in range(3):
        current_claim().publish_message(number, to="mail")

if __name__ == "__main__":
    idem.run(handler, scope="s", key="k")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a module `shop` published three messages that could not be sent."""
    (tmp_path / "shop.py").write_text(APP)
    subprocess.run([sys.executable, "shop.py"], cwd=tmp_path, check=True, timeout=60)
    return tmp_path


def command(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("IDEM_TASKS_")}
    return subprocess.Popen(
        [sys.executable, "-m", "idem_tasks", "relay", *arguments],
        cwd=folder, env=clean, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("app", ["shop", "shop:idem"])
def test_once_sends_what_can_be_sent(folder: Path, app: str) -> None:
    """It exits with 1 while messages are left, and with 0 once there are none."""
    refused = command(folder, "--app", app, "--once")
    assert refused.communicate(timeout=60) == ("", "Relaying once from sqlite:///outbox.db.\n3 messages are left.\n")
    assert refused.returncode == 1
    (folder / "up").touch()

    def is_done() -> bool:
        again = command(folder, "--app", app, "--once", "--batch", "1")
        again.communicate(timeout=60)
        return again.returncode == 0

    wait_until(is_done, seconds=60, what="the pause after the failures to be over")
    assert (folder / "sent").read_text() == "0\n1\n2\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(folder: Path, number: signal.Signals) -> None:
    """It relays until then, and ends with 0."""
    (folder / "up").touch()
    relaying = command(folder, "--app", "shop", "--poll", "0.05")
    wait_until(
        lambda: (folder / "sent").exists() and (folder / "sent").read_text() == "0\n1\n2\n",
        seconds=60,
        what="the messages",
    )
    relaying.send_signal(number)
    assert relaying.communicate(timeout=30) == ("", "Relaying from sqlite:///outbox.db; TERM or Ctrl-C ends it.\n")
    assert relaying.returncode == 0
