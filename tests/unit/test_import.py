"""`import idem_tasks` costs nothing that is not used."""

from __future__ import annotations

import subprocess
import sys

import pytest

CLIENTS = {
    "celery",
    "dramatiq",
    "faststream",
    "kombu",
    "nats",
    "redis",
    "sqlalchemy",
    "taskiq",
    "pydantic",
    "alembic",
    "asyncpg",
    "psycopg",
    "pymysql",
    "rich",
    "typer",
}


def run(program: str) -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_client_library_is_loaded() -> None:
    """Neither by the import, nor by decorating and running a handler on memory, in both runtimes."""
    run(
        "import sys, asyncio, idem_tasks\n"
        f"clients = {CLIENTS}\n"
        "assert not clients & set(sys.modules), clients & set(sys.modules)\n"
        "idem = idem_tasks.Idempotency(store=idem_tasks.MemoryStore())\n"
        "@idem_tasks.idempotent_task(key='{order}', idempotency=idem)\n"
        "def charge(order): return order\n"
        "@idem_tasks.idempotent_task(key='{order}', idempotency=idem)\n"
        "async def charge_later(order): return order\n"
        "assert [charge('A-1'), charge('A-1'), asyncio.run(charge_later('A-1'))] == ['A-1'] * 3\n"
        "assert not clients & set(sys.modules), clients & set(sys.modules)\n"
    )


@pytest.mark.parametrize(
    "made",
    [
        "import dramatiq.brokers.stub as stub; import dramatiq; task = dramatiq.actor(broker=stub.StubBroker())(ship)",
        "import taskiq; task = taskiq.InMemoryBroker().task(ship)",
    ],
    ids=["dramatiq", "taskiq"],
)
def test_an_integration_is_loaded_once_its_framework_is(made: str) -> None:
    """So that the decorator refuses what it must not go around."""
    run(
        "import idem_tasks\n"
        "def ship(order): return order\n"
        f"{made}\n"
        "try: idem_tasks.idempotent_task(key='{order}')(task)\n"
        "except idem_tasks.ConfigurationError as error: assert 'goes under' in str(error), error\n"
        "else: raise SystemExit('it was decorated')\n"
    )


@pytest.mark.parametrize("name", ["SQLStore", "RedisStore", "TieredStore", "MemoryStore"])
def test_a_store_is_loaded_when_it_is_named(name: str) -> None:
    """By attribute or by `from ... import`."""
    run(f"from idem_tasks import {name}; import idem_tasks; assert idem_tasks.{name} is {name}")


def test_the_tiered_store_needs_no_client_library() -> None:
    """Its tiers bring theirs."""
    run(f"import sys; from idem_tasks import TieredStore; assert not {CLIENTS} & set(sys.modules)")


def test_a_process_that_ends_in_a_hurry_ends_quietly() -> None:
    """A heartbeat that is waiting does not keep the interpreter, and says nothing as it ends."""
    program = (
        "import idem_tasks, sys\n"
        "idem = idem_tasks.Idempotency(store=idem_tasks.MemoryStore())\n"
        "idem.run(str, scope='s', key='A-1')\n"
        "block = idem.claim(scope='s', key='B-2')\n"
        "block.__enter__()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout, done.stderr) == ("", "")


def test_a_clock_for_tests_needs_no_pytest() -> None:
    """`ManualClock`, `assert_idempotent` and the explorer serve every test runner; only the suites need pytest."""
    run(
        "import sys\n"
        "sys.modules['pytest'] = None\n"
        "import idem_tasks.testing.explorer\n"
        "from idem_tasks.testing import ManualClock, assert_idempotent\n"
        "try:\n"
        "    from idem_tasks.testing import StoreContract\n"
        "except ImportError as error:\n"
        "    assert error.name == 'pytest'\n"
        "else:\n"
        "    raise AssertionError\n"
    )


@pytest.mark.parametrize(
    "module, client, install",
    [
        ("aio_pika", "aio_pika", "aio-pika is not installed; run: pip install 'idem-tasks[rabbitmq]'"),
        ("aiokafka", "aiokafka", "aiokafka is not installed; run: pip install 'idem-tasks[kafka]'"),
        (
            "confluent_kafka",
            "confluent_kafka",
            "confluent-kafka is not installed; run: pip install 'idem-tasks[kafka]'",
        ),
        ("dramatiq", "dramatiq", "dramatiq is not installed; run: pip install 'idem-tasks[dramatiq]'"),
        ("faststream", "faststream", "faststream is not installed; run: pip install 'idem-tasks[faststream]'"),
        ("kombu_consumer", "kombu", "kombu is not installed; run: pip install 'idem-tasks[celery]'"),
        ("nats", "nats", "nats-py is not installed; run: pip install 'idem-tasks[nats]'"),
        ("pika", "pika", "pika is not installed; run: pip install 'idem-tasks[rabbitmq]'"),
        ("taskiq", "taskiq", "taskiq is not installed; run: pip install 'idem-tasks[taskiq]'"),
    ],
)
def test_a_client_that_is_missing_is_named_with_its_extra(module: str, client: str, install: str) -> None:
    """An integration without its client says what to install, whose name may be another than the module's."""
    run(
        "import sys\n"
        f"sys.modules[{client!r}] = None\n"
        "from idem_tasks import MissingExtraError\n"
        "try:\n"
        f"    import idem_tasks.integrations.{module}\n"
        "except MissingExtraError as error:\n"
        f"    assert str(error) == {install!r}, error\n"
        "else:\n"
        "    raise AssertionError\n"
    )
