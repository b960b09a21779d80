"""`--app MODULE[:APP]`: whose records and messages a command is about, and that it never takes any others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import _state

from idem_tasks import Idempotency
from tests.unit.command_line import Done, idem_tasks, in_its_own_process

COMMANDS = [["ls"], ["relay", "--once"]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with a database of one record."""
    with Idempotency.from_urls(database_url=f"sqlite:///{tmp_path / 'shop.db'}") as idempotency:
        idempotency.run(str, scope="charge", key="A-1")
    return tmp_path


@pytest.fixture(autouse=True)
def celery_restored() -> Iterator[None]:
    """The process's Celery app, which a command makes that of its module."""
    default, current = _state.default_app, _state._tls.current_app
    yield
    _state.set_default_app(default)
    _state._set_current_app(current)


def on_module(folder: Path, text: str, *arguments: str, **environment: str) -> Done:
    """Run a command where this text is the module `shop`."""
    (folder / "shop.py").write_text(text)
    done = idem_tasks(*arguments, cwd=folder, **environment)
    assert not (folder / "idem_tasks.db").exists(), "a database was made that nobody asked for"
    return done


CONFIGURED = "import idem_tasks\nidem = idem_tasks.configure(database_url='sqlite:///shop.db')\n"
ITS_OWN = (
    "from idem_tasks import Idempotency, SQLStore\n"
    "idem = Idempotency(store=SQLStore('sqlite:///shop.db'))\n"
    "engine = object()\n"
)
CELERY = "import celery\napp = celery.Celery()\n"


def test_observers_of_a_module_hear_of_what_is_done(folder: Path) -> None:
    """A command takes all that the module configured, from the working directory."""
    text = (
        "import sys, idem_tasks\nidem_tasks.configure(database_url='sqlite:///shop.db', observers=[lambda event: "
        "sys.stderr.write(f'heard {event.name.value}\\n')])\n"
    )
    done = on_module(folder, text, "forget", "charge", "A-1", "--yes", "--app", "shop")
    assert done.returncode == 0
    assert "heard forgotten\n" in done.stderr
    both = idem_tasks("ls", "--app", "shop", "--database-url", "sqlite:///shop.db", cwd=folder)
    assert both.returncode == 2


@pytest.mark.parametrize(
    "text, app",
    [
        (CONFIGURED, "shop"),
        (CONFIGURED, "shop:idem"),
        (ITS_OWN, "shop:idem"),
        (f"{ITS_OWN}class config: idem = idem\n", "shop:config.idem"),
        (f"{CELERY}{CONFIGURED}", "shop:app"),
        (f"{CELERY}{ITS_OWN}", "shop:idem"),
    ],
)
def test_what_an_app_may_be(folder: Path, text: str, app: str) -> None:
    """A module that configures, its Celery app, or an `Idempotency`; a relay says whose messages it sends."""
    assert on_module(folder, text, "ls", "--app", app).stderr == "1 record\n"
    relayed = on_module(folder, text, "relay", "--once", "--app", app)
    assert (relayed.returncode, relayed.stderr) == (0, "Relaying once from sqlite:///shop.db.\n")


@pytest.mark.parametrize(
    "configured, address",
    [
        ("database_url='sqlite:///shop.db', redis_url='redis://me:secret@127.0.0.1:1'", "sqlite:///shop.db"),
        ("database_url='postgresql://me:secret@127.0.0.1:1/x'", "postgresql://me:***@127.0.0.1:1/x"),
        ("store=idem_tasks.MemoryStore()", "MemoryStore"),
    ],
)
def test_a_relay_says_first_whose_messages_it_sends(folder: Path, configured: str, address: str) -> None:
    """The database of both tiers, without its password, and before it is reached."""
    text = f"import idem_tasks\nidem_tasks.configure({configured})\n"
    done = on_module(folder, text, "relay", "--once", "--app", "shop")
    assert done.stderr.splitlines()[0] == f"Relaying once from {address}."
    assert "secret" not in done.stderr


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_an_environment_that_says_where_is_enough(folder: Path, command: list[str]) -> None:
    """For a module that configures nothing, as for its workers."""
    done = on_module(folder, CELERY, *command, "--app", "shop:app", IDEM_TASKS_DATABASE_URL="sqlite:///shop.db")
    assert (done.returncode, done.stderr) == (
        0,
        "1 record\n" if command == ["ls"] else "Relaying once from sqlite:///shop.db.\n",
    )


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize(
    "text, app, says",
    [
        ("", "shop", "shop was imported and did not call configure; call configure in it, or give an Idempotency as"),
        (ITS_OWN, "shop", "shop was imported and did not call configure; write --app shop:idem"),
        (f"{CELERY}{ITS_OWN}", "shop:app", "shop was imported and did not call configure; write --app shop:idem"),
        (ITS_OWN, "shop:engine", "shop:engine is of type object, neither a Celery app nor an Idempotency; write --app"),
        (f"{CELERY}{CONFIGURED}", "shop:celery", "neither a Celery app nor an Idempotency; write --app shop:idem"),
        ("", ":idem", "':idem' is not MODULE or MODULE:APP"),
        ("", ".shop", "'.shop' is not MODULE or MODULE:APP"),
        ("", "shop:", "'shop:' is not MODULE or MODULE:APP"),
    ],
)
def test_an_app_without_records_is_wrong_usage(
    folder: Path, command: list[str], text: str, app: str, says: str
) -> None:
    """Exit 2 and what to write; what was meant is never replaced by some default database."""
    done = on_module(folder, text, *command, "--app", app)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in " ".join(done.stderr.split())


def test_its_own_is_not_replaced_by_the_environments(folder: Path) -> None:
    """A module that made an `Idempotency` and did not configure it means that one."""
    done = on_module(folder, ITS_OWN, "ls", "--app", "shop", IDEM_TASKS_DATABASE_URL="sqlite:///idem_tasks.db")
    assert done.returncode == 2


@pytest.mark.parametrize("app", ["", "shop:"])
def test_a_relay_needs_an_app(folder: Path, app: str) -> None:
    """An empty one is none."""
    assert on_module(folder, CONFIGURED, "relay", "--once", "--app", app).returncode == 2


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize(
    "text, app, says",
    [
        ("", "no_such_module", "No module named 'no_such_module'"),
        (CONFIGURED, "shop:no_such_name", "module 'shop' has no attribute 'no_such_name'"),
        ("\nraise KeyError('hunter2')", "shop", "KeyError was raised while it was imported, in "),
        ("\nNone.hunter2", "shop", "AttributeError was raised while it was imported, in "),
        ("\nraise SystemExit", "shop", "SystemExit was raised while it was imported, in "),
        ("if", "shop", "invalid syntax (shop.py, line 1)"),
        (
            "import idem_tasks\nidem_tasks.configure(database_url='oracle://me:hunter2@h/x')",
            "shop",
            "database_url must",
        ),
    ],
)
def test_an_app_that_cannot_be_imported(folder: Path, command: list[str], text: str, app: str, says: str) -> None:
    """One line with what was raised and where, without its words, which may be a password; and exit 5."""
    done = on_module(folder, text, *command, "--app", app)
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr.startswith(f"idem-tasks: --app {app}: ")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert "hunter2" not in done.stderr


def test_a_process_finds_its_app_in_the_working_directory(folder: Path) -> None:
    """As `python -m` does."""
    (folder / "shop.py").write_text(CONFIGURED)
    assert in_its_own_process("ls", "--app", "shop", cwd=folder).stderr == "1 record\n"
