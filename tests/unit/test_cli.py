"""The command line: its exit codes, what goes to stdout and what to stderr, and the tables that it makes."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import create_engine, inspect, make_url

from idem_tasks import Idempotency, SQLStore, __version__
from idem_tasks.errors import StoreConfigurationError
from idem_tasks.stores.migrations.offline import newest_revision
from tests.integration.test_sql_steps import without_steps
from tests.unit.command_line import idem_tasks, in_its_own_process

TABLES = {f"idem_tasks_{name}" for name in ("audit", "outbox", "records", "schema", "steps", "watermarks")}


def tables(url: str) -> set[str]:
    engine = create_engine(url)
    found = set(inspect(engine).get_table_names())
    engine.dispose()
    return found


def test_version_is_data() -> None:
    """`--version` prints it to stdout and exits with 0."""
    done = in_its_own_process("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"idem-tasks {__version__}\n", "")


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["demo", "--orders", "0"], ["init-db", "--no-such"]])
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    """As everywhere; and a pipe gets no boxes."""
    done = idem_tasks(*arguments)
    assert done.returncode == 2
    assert "Usage: idem-tasks" in done.stdout + done.stderr
    assert "─" not in done.stdout + done.stderr


@pytest.mark.parametrize("command", [["--help"], ["demo", "--help"], ["init-db", "--help"]])
def test_help_in_a_pipe_has_no_boxes(command: list[str]) -> None:
    """Only what can be searched and copied."""
    done = idem_tasks(*command)
    assert done.returncode == 0
    assert "Usage: " in done.stdout
    assert "─" not in done.stdout


@pytest.mark.parametrize(
    "missing, extra, arguments",
    [("typer", "cli", "init-db"), ("rich", "cli", "init-db"), ("celery", "demo", "demo")],
)
def test_a_missing_extra_is_named(missing: str, extra: str, arguments: str) -> None:
    """One line with what to install, and exit 5."""
    program = (
        f"import sys; sys.modules[{missing!r}] = None; sys.argv = ['idem-tasks', {arguments!r}]; "
        "from idem_tasks.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 5
    assert done.stderr == f"idem-tasks: {missing} is not installed; run: pip install 'idem-tasks[{extra}]'\n"


@pytest.mark.parametrize("database", ["sqlite_url", "postgres_url", "mariadb_url"])
def test_init_db_makes_the_tables_once(database: str, request: pytest.FixtureRequest) -> None:
    """The first run makes them, the second says that they are there; both exit with 0 and print no data."""
    url = request.getfixturevalue(database)
    first = idem_tasks("init-db", "--database-url", url)
    second = idem_tasks("init-db", IDEM_TASKS_DATABASE_URL=url)
    assert (first.returncode, first.stdout) == (second.returncode, second.stdout) == (0, "")
    assert "Made the tables idem_tasks_* in " in first.stderr
    assert f"version {newest_revision()}." in first.stderr
    assert f"has the tables idem_tasks_* already, version {newest_revision()}." in second.stderr
    assert tables(url) == TABLES


@pytest.mark.parametrize("database", ["sqlite_url", "postgres_url", "mariadb_url"])
def test_init_db_says_what_it_brought_up_to_date(database: str, request: pytest.FixtureRequest) -> None:
    """Tables of an older version get what is missing, and whoever deploys reads from which version to which."""
    url = request.getfixturevalue(database)
    idem_tasks("init-db", "--database-url", url)
    without_steps(url)
    done, again = (idem_tasks("init-db", "--database-url", url) for _ in range(2))
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith("Brought the tables idem_tasks_* in ")
    assert done.stderr.endswith(f" from version 0001 to {newest_revision()}.\n")
    assert f"has the tables idem_tasks_* already, version {newest_revision()}." in again.stderr
    assert tables(url) == TABLES


@pytest.mark.parametrize("database", ["sqlite_url", "postgres_url", "mariadb_url"])
def test_init_db_leaves_tables_of_a_newer_version_alone(database: str, request: pytest.FixtureRequest) -> None:
    """It says that they are newer than this program, and exits with 5."""
    url = request.getfixturevalue(database)
    idem_tasks("init-db", "--database-url", url)
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE idem_tasks_schema SET version_num = '9999'")
    engine.dispose()
    done = idem_tasks("init-db", "--database-url", url)
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr.startswith("idem-tasks: ")
    assert done.stderr.endswith(
        "the tables idem_tasks_* were made by a newer version of idem_tasks: they have version 9999, and this one "
        f"knows {newest_revision()}; upgrade idem_tasks here\n"
    )
    with Idempotency(store=SQLStore(url)) as idempotency, pytest.raises(StoreConfigurationError, match="newer version"):
        idempotency.prepare()


def test_init_db_takes_a_schema_and_a_prefix(postgres_url: str) -> None:
    """A store that is given the same finds its tables."""
    engine = create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql("CREATE SCHEMA shop")
    engine.dispose()
    where = ["--database-url", postgres_url, "--schema", "shop", "--table-prefix", "once_"]
    done, again = (idem_tasks("init-db", *where) for _ in range(2))
    assert done.returncode == 0, done.stderr
    assert "Made the tables once_* in schema shop in " in done.stderr
    assert "has the tables once_* in schema shop already" in again.stderr
    with Idempotency(store=SQLStore(postgres_url, schema="shop", table_prefix="once_")) as idempotency:
        assert idempotency.run(lambda: 1, scope="s", key="k") == 1
    assert tables(postgres_url) == set()


def test_init_db_without_a_url_makes_the_file_that_workers_use(tmp_path: Path) -> None:
    """It is idem_tasks.db in the working directory."""
    assert idem_tasks("init-db", cwd=tmp_path).returncode == 0
    assert tables(f"sqlite:///{tmp_path / 'idem_tasks.db'}") == TABLES


def test_the_script_for_a_dba_makes_the_same_tables(tmp_path: Path, sqlite_url: str) -> None:
    """`--sql` prints to stdout what makes them, and touches no database; `init-db` then finds nothing to do."""
    file = str(make_url(sqlite_url).database)
    done = idem_tasks("init-db", "--sql", "--database-url", sqlite_url)
    assert (done.returncode, done.stderr) == (0, "")
    assert not Path(file).exists()
    connection = sqlite3.connect(file)
    connection.executescript(done.stdout)
    connection.close()
    with Idempotency(store=SQLStore(sqlite_url, create_schema=False)) as idempotency:
        assert idempotency.run(lambda: 1, scope="s", key="k") == 1
    assert f"already, version {newest_revision()}" in idem_tasks("init-db", "--database-url", sqlite_url).stderr


@pytest.mark.parametrize("url", ["postgresql://127.0.0.1:1/x", "mysql://127.0.0.1:1/x"])
def test_the_script_needs_no_server(url: str) -> None:
    """It is in the database's own words."""
    done = idem_tasks("init-db", "--sql", "--schema", "shop", "--database-url", url)
    assert done.returncode == 0, done.stderr
    assert "CREATE TABLE shop.idem_tasks_records" in done.stdout
    assert "CREATE TABLE shop.idem_tasks_steps" in done.stdout
    assert ('COLLATE "C"' if url.startswith("postgresql") else "VARBINARY") in done.stdout


@pytest.mark.parametrize(
    "url",
    ["postgresql://me:secret@127.0.0.1:1/x", "oracle://me:secret@h/x", "redis://me:secret@h", "sqlite:////no/x.db"]
    + [f"postgresql://me:secret@h:{port}/x" for port in ("abc", "0", "99999")],
)
def test_a_database_that_cannot_be_used_is_one_line_and_exit_5(url: str) -> None:
    """The line says why, and shows no password."""
    done = idem_tasks("init-db", "--database-url", url)
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr.startswith("idem-tasks: ")
    assert done.stderr.count("\n") == 1
    assert "secret" not in done.stderr


def test_a_missing_schema_is_named(postgres_url: str) -> None:
    """A schema is for the DBA to make: the error says so, and not to run the very command that was run."""
    answer = idem_tasks("init-db", "--database-url", postgres_url, "--schema", "ops")
    assert answer.returncode == 5
    assert "CREATE SCHEMA ops" in answer.stderr.replace("\n", " ")


def test_the_server_says_why_it_lets_nobody_in(postgres_url: str) -> None:
    """A user or database that is not there is told from a server that is not there, in the server's words."""
    answer = idem_tasks("init-db", "--database-url", postgres_url.rpartition("/")[0] + "/no_such_database")
    assert answer.returncode == 5
    assert "no_such_database" in answer.stderr
    assert "does not exist" in answer.stderr.replace("\n", " ")
