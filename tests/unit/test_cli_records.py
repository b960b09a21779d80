"""The command line for people who look after records: what it lists, what it changes, and what it refuses."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url

from idem_tasks import Idempotency, Policy, Record, SQLStore, State, current_claim
from idem_tasks.claims import ClaimRequest, person_name
from idem_tasks.runtime import run_sync
from tests.unit.command_line import idem_tasks, in_its_own_process

SCOPE = "shop.charge"


def no_answer() -> None:
    raise TimeoutError("no answer")


@pytest.fixture
def url(sqlite_url: str) -> str:
    """A database with one record in doubt, one completed, one running and one parked."""
    with Idempotency.from_urls(database_url=sqlite_url) as idempotency:
        for key, policy in (("order-1", Policy(on_crash="hold")), ("order-4", Policy(max_attempts=1))):
            with pytest.raises(TimeoutError):
                idempotency.run(no_answer, scope=SCOPE, key=key, policy=policy)
        idempotency.run(str.upper, "receipt 17", scope=SCOPE, key="order-2")
        request = ClaimRequest(SCOPE, "order-3", None, "its owner", Policy(), holder="web-1:433")
        run_sync(idempotency.store.claim(request))
    return sqlite_url


@pytest.fixture(autouse=True)
def database(url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Commands are told of it by the environment."""
    monkeypatch.setenv("IT_IS_AT", url)
    return url


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment.setdefault("IDEM_TASKS_DATABASE_URL", os.environ["IT_IS_AT"])
    return idem_tasks(*arguments, cwd=None, **environment)


def document(*arguments: str) -> dict[str, Any]:
    done = run(*arguments, "--json")
    assert done.stderr == ""
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["schema"] == 1
    assert found["command"] == arguments[0]
    return found


def record(url: str, key: str) -> Record:
    with Idempotency.from_urls(database_url=url) as idempotency:
        found = idempotency.get(SCOPE, key)
    assert found is not None
    return found


def golden(text: str) -> str:
    """Put words for what is another one each time: times, tokens, owners, processes, hashes."""
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z", "TIME", text)
    text = re.sub(r"\b1\d{15}\b", "TOKEN", text)
    text = re.sub(r"\b[0-9a-f]{64}\b", "FINGERPRINT", text)
    text = re.sub(r"\b[0-9a-f]{32}\b", "OWNER", text)
    return re.sub(rf"\b{re.escape(os.uname().nodename[:64])}:\d+\b", "HOST:PID", text).replace(person_name(), "WHO")


@pytest.mark.parametrize(
    "command",
    [
        ["ls", "--limit", "1"],
        ["show", SCOPE, "order-2"],
        ["resolve", SCOPE, "order-1", "--rerun", "--dry-run"],
        ["forget", SCOPE, "order-9", "--json"],
        ["audit"],
        ["audit", "--no-such-option"],
        ["init-db"],
        ["ls", "--app", "no_such_module"],
    ],
    ids=" ".join,
)
def test_a_process_of_its_own_says_the_same(url: str, command: list[str]) -> None:
    """What these tests run in their own process is what a shell runs: its exit code, its data, its words."""
    here = idem_tasks(*command, IDEM_TASKS_DATABASE_URL=url)
    there = in_its_own_process(*command, IDEM_TASKS_DATABASE_URL=url)
    assert (here.returncode, here.stdout, here.stderr) == (there.returncode, there.stdout, there.stderr)


# Looking.


def test_ls_in_a_pipe_is_tab_separated_and_whole() -> None:
    """A header, then a line for each record; how many there are is said beside it."""
    done = run("ls")
    assert (done.returncode, done.stderr) == (0, "4 records\n")
    assert golden(done.stdout) == (
        "scope\tkey\tstate\tattention\tattempts\tfailures\tcrashes\tholder\tfencing_token\tcreated_at\tupdated_at"
        "\tlease_expires_at\n"
        "shop.charge\torder-1\tin_doubt\tin_doubt\t1\t1\t0\tHOST:PID\tTOKEN\tTIME\tTIME\tTIME\n"
        "shop.charge\torder-2\tcompleted\t\t1\t0\t0\tHOST:PID\tTOKEN\tTIME\tTIME\tTIME\n"
        "shop.charge\torder-3\trunning\t\t1\t0\t0\tweb-1:433\tTOKEN\tTIME\tTIME\tTIME\n"
        "shop.charge\torder-4\tparked\tparked\t1\t1\t0\tHOST:PID\tTOKEN\tTIME\tTIME\tTIME\n"
    )


@pytest.mark.parametrize(
    "wanted, keys",
    [
        (["--state", "in_doubt"], ["order-1"]),
        (["--state", "running"], ["order-3"]),
        (["--attention"], ["order-1", "order-4"]),
        (["--scope", "nobody's"], []),
        (["--scope", SCOPE, "--limit", "2"], ["order-1", "order-2"]),
    ],
)
def test_ls_lists_what_is_wanted(wanted: list[str], keys: list[str]) -> None:
    """By state, by scope, or what waits for a person."""
    assert [each["key"] for each in document("ls", *wanted)["data"]] == keys


def test_ls_shows_what_is_overdue(url: str) -> None:
    """A running record whose worker died, and whose message did not come again, is there for a person to find."""
    with closing(sqlite3.connect(make_url(url).database or "")) as connection:
        connection.execute("UPDATE idem_tasks_records SET lease_expires_at = '2020-01-01 00:00:00.000'")
        connection.commit()
    found = [(each["key"], each["attention"]) for each in document("ls", "--attention")["data"]]
    assert found == [("order-1", "in_doubt"), ("order-3", "overdue"), ("order-4", "parked")]


def test_ls_goes_on_where_it_ended() -> None:
    """Page by page, until there is no next one; a cursor is not a place that somebody else could guess wrong."""
    keys, cursor = [], ""
    for _ in range(10):
        page = document("ls", "--limit", "1", *(["--cursor", cursor] if cursor else []))
        keys += [each["key"] for each in page["data"]]
        cursor = page["next"]
        if cursor is None:
            break
    assert keys == ["order-1", "order-2", "order-3", "order-4"]
    assert "more: --cursor " in run("ls", "--limit", "1").stderr
    assert run("ls", "--cursor", "nonsense").returncode == 2


def test_a_record_as_json() -> None:
    """Every field has its name and type; times are RFC 3339, and the outcome is not there."""
    [found] = document("ls", "--state", "in_doubt")["data"]
    assert json.loads(golden(json.dumps(found | {"fencing_token": "number"}))) == {
        "scope": "shop.charge",
        "key": "order-1",
        "state": "in_doubt",
        "fencing_token": "number",
        "owner": "OWNER",
        "fingerprint": "FINGERPRINT",
        "attempts": 1,
        "failures": 1,
        "crashes": 0,
        "generation": 1,
        "lease_expires_at": "TIME",
        "holder": "HOST:PID",
        "created_at": "TIME",
        "updated_at": "TIME",
        "completed_at": None,
        "expires_at": "TIME",
        "attention": "in_doubt",
        "traceparent": None,
        "outcome": {"kept": False, "codec": None, "bytes": None, "reason": None},
        "error": {"type": "builtins.TimeoutError", "message": "no answer"},
    }


def test_show_hides_the_outcome_unless_asked_for() -> None:
    """It may be somebody's data: a screen, a log and a ticket are no place for it."""
    hidden, shown = run("show", SCOPE, "order-2"), run("show", SCOPE, "order-2", "--outcome")
    assert "RECEIPT" not in hidden.stdout
    assert "outcome\t12 bytes, hidden: --outcome\n" in hidden.stdout
    assert 'outcome\t"RECEIPT 17"\n' in shown.stdout
    assert "value" not in document("show", SCOPE, "order-2")["data"]["outcome"]
    told = document("show", SCOPE, "order-2", "--outcome")["data"]["outcome"]
    assert told == {"kept": True, "codec": "json", "bytes": 12, "reason": None, "value": "RECEIPT 17"}


def test_show_has_every_column() -> None:
    """A line for each."""
    lines = run("show", SCOPE, "order-1").stdout.splitlines()
    assert [line.split("\t")[0] for line in lines] == ["field", *Record.__dataclass_fields__]


def charge_and_mail() -> None:
    claim = current_claim()
    claim.step("charge", str.upper, "receipt 17")
    claim.step("mail", no_answer)


@pytest.fixture
def stepped(url: str) -> str:
    """A database with one more record, whose handler died in its second step."""
    with Idempotency.from_urls(database_url=url) as idempotency, pytest.raises(TimeoutError):
        idempotency.run(charge_and_mail, scope=SCOPE, key="order-5", policy=Policy(on_crash="hold"))
    return url


@pytest.mark.usefixtures("stepped")
def test_show_lists_the_steps() -> None:
    """A table below the columns, in the order of the steps: which are finished, and what there is of an outcome."""
    done = run("show", SCOPE, "order-5", "--outcome")
    assert (done.returncode, done.stderr) == (0, "")
    _, _, steps = golden(done.stdout).partition("\n\n")
    assert steps == (
        "position\tname\tstarted_at\tfinished_at\toutcome_bytes\tcodec\tnot_kept\n"
        "1\tcharge\tTIME\tTIME\t12\tjson\t\n"
        "2\tmail\tTIME\t\t\t\t\n"
    )
    assert "RECEIPT" not in done.stdout


@pytest.mark.usefixtures("stepped")
def test_the_steps_as_json() -> None:
    """Each with its outcome described as a record's is; a record without steps has an empty list."""
    told = document("show", SCOPE, "order-5", "--outcome")["data"]["steps"]
    assert json.loads(golden(json.dumps(told))) == [
        {
            "position": 1,
            "name": "charge",
            "started_at": "TIME",
            "finished_at": "TIME",
            "outcome": {"kept": True, "codec": "json", "bytes": 12, "reason": None},
        },
        {
            "position": 2,
            "name": "mail",
            "started_at": "TIME",
            "finished_at": None,
            "outcome": {"kept": False, "codec": None, "bytes": None, "reason": None},
        },
    ]
    assert document("show", SCOPE, "order-1")["data"]["steps"] == []


def test_show_needs_no_table_of_steps(url: str) -> None:
    """In a database of an older version the record is shown, with a word that its steps are not known."""
    with closing(sqlite3.connect(make_url(url).database or "")) as connection:
        connection.execute("DROP TABLE idem_tasks_steps")
    done = run("show", SCOPE, "order-1")
    assert (done.returncode, "state\tin_doubt\n" in done.stdout) == (0, True)
    assert done.stderr.startswith("its steps are not known: ")
    assert "idem-tasks init-db" in done.stderr
    told = document("show", SCOPE, "order-1")
    assert (told["data"]["state"], told["data"]["steps"]) == ("in_doubt", [])
    assert told["warnings"][0].startswith("its steps are not known: ")


def test_keys_cannot_forge_lines(url: str) -> None:
    """A tab or a line break in a key stays in its cell."""
    with Idempotency.from_urls(database_url=url) as idempotency:
        idempotency.run(str, scope="forged", key="a\tb\nc")
    assert "forged\ta\\tb\\nc\tcompleted" in run("ls", "--scope", "forged").stdout


HARD_KEYS = ["a\nb", r"a\nb", "a\tb", "it's\x1b[2J", "a\x7fb", "a\x9bb", "caf\xe9\n", "\u202ea", "caf\xe9"]


def store_keys(url: str, scope: str, *keys: str) -> None:
    with Idempotency.from_urls(database_url=url) as idempotency:
        for key in keys:
            idempotency.run(str, scope=scope, key=key)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_what_ls_shows_of_a_key_is_that_key_in_a_shell(url: str, encoding: str) -> None:
    """No two keys look alike, none commands a terminal, and each can be written as $'...', whatever stdout can have."""
    store_keys(url, "hard", *HARD_KEYS)
    lines = run("ls", "--scope", "hard", PYTHONIOENCODING=encoding).stdout.splitlines()[1:]
    cells = [line.split("\t")[1] for line in lines]
    assert len(set(cells)) == len(HARD_KEYS)
    assert all(cell.isprintable() for cell in cells)
    assert encoding != "ascii" or all(cell.isascii() for cell in cells)
    words = "".join(" $'" + cell.replace("'", r"\'") + "'" for cell in cells)
    read = subprocess.run(
        ["bash", "-c", f"printf '%s\\0'{words}"], check=True, capture_output=True, env={"LC_ALL": "C.UTF-8"}
    ).stdout
    assert sorted(read.decode().split("\0")[:-1]) == sorted(HARD_KEYS)
    assert {each["key"] for each in document("ls", "--scope", "hard")["data"]} == set(HARD_KEYS)


@pytest.mark.parametrize("key", HARD_KEYS)
def test_a_hard_key_is_taken_as_it_is(url: str, key: str) -> None:
    """`show` and `forget` unescape nothing: what a shell gives them is the key."""
    store_keys(url, "hard", key)
    assert document("show", "hard", key)["data"]["key"] == key
    assert run("forget", "hard", key, "--yes").returncode == 0


def test_json_is_json_in_every_encoding(url: str) -> None:
    """Where stdout has no bytes for a key, and where a terminal might obey one, JSON has escapes for it."""
    for key in ("caf\xe9", "a\x9bb", "a\u202eb"):
        store_keys(url, "hard", key)
        done = in_its_own_process(
            "show", "hard", key, "--json", IDEM_TASKS_DATABASE_URL=url, PYTHONIOENCODING="ascii", PYTHONUTF8="1"
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout[:-1].isprintable()
        assert json.loads(done.stdout)["data"]["key"] == key
    assert "caf\xe9" in run("show", "hard", "caf\xe9", "--json").stdout


# Changing.


def test_the_story(url: str) -> None:
    """Somebody lists what is in doubt, looks at the provider, resolves it, and it is written down."""
    [found] = document("ls", "--state", "in_doubt")["data"]
    token = str(found["fencing_token"])
    done = run(
        "resolve", SCOPE, "order-1", "--outcome", '"receipt 17"', "--expect-token", token, "--reason", "bank", "--yes"
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert golden(done.stderr) == (
        "shop.charge 'order-1' is in_doubt since TIME: 1 attempt, 0 crashes, held by HOST:PID, fencing token TOKEN, "
        "last error builtins.TimeoutError.\n"
        'It will be completed: every later delivery gets "receipt 17", and nothing runs.\n'
        "Messages that its handler published are not sent: what is to follow, send yourself.\n"
        "Done: shop.charge 'order-1' is completed, with fencing token TOKEN.\n"
    )
    with Idempotency.from_urls(database_url=url) as idempotency:
        assert idempotency.run(no_answer, scope=SCOPE, key="order-1") == "receipt 17"
    assert document("ls", "--state", "in_doubt")["data"] == []
    audit = run("audit", SCOPE, "order-1")
    assert golden(audit.stdout) == (
        "at\tactor\taction\tscope\tkey\tstate_before\tstate_after\ttoken_before\ttoken_after\treason\n"
        "TIME\tWHO\tresolve\tshop.charge\torder-1\tin_doubt\tcompleted\tTOKEN\tTOKEN\tbank\n"
    )


def test_an_outcome_sends_no_messages_and_says_so(url: str, redis_url: str) -> None:
    """What the handler published died with its own outcome; where there is no outbox, nothing is said of messages."""
    said = run("resolve", SCOPE, "order-1", "--outcome", "17", "--dry-run").stderr
    assert "Messages that its handler published are not sent" in said
    assert "Messages" not in run("resolve", SCOPE, "order-1", "--fail", "shop.Declined:no", "--dry-run").stderr
    with Idempotency.from_urls(redis_url=redis_url) as idempotency, pytest.raises(TimeoutError):
        idempotency.run(no_answer, scope=SCOPE, key="r-1", policy=Policy(on_crash="hold"))
    done = idem_tasks("resolve", SCOPE, "r-1", "--outcome", "17", "--dry-run", "--redis-url", redis_url)
    assert (done.returncode, "Messages" in done.stderr) == (0, False)


def test_a_rerun_says_what_it_gives_up_and_what_to_send_again(url: str) -> None:
    """Nothing is sent: who reads it knows which message, and that the old worker must be dead."""
    done = run("resolve", SCOPE, "order-1", "--rerun", "--yes")
    assert done.returncode == 0
    said = golden(done.stderr)
    assert 'This gives up "at most once" for this key: be sure that HOST:PID is dead, not merely slow.' in said
    assert (
        "Nothing is sent: send the message again. Its scope is shop.charge, its key order-1, its last holder HOST:PID."
    ) in said
    assert record(url, "order-1").state is State.RELEASED
    found = document("resolve", SCOPE, "order-4", "--rerun", "--yes")["data"]
    assert found["send_again"]["key"] == "order-4"
    assert (found["done"], found["record"]["state"]) == (True, "released")


def test_a_failure_is_final(url: str) -> None:
    """It is recorded by type and message."""
    assert run("resolve", SCOPE, "order-4", "--fail", "shop.Declined:card expired", "--yes").returncode == 0
    found = record(url, "order-4")
    assert (found.state, found.error_type, found.error_message) == (State.FAILED, "shop.Declined", "card expired")


def test_forget_says_that_it_runs_again(url: str) -> None:
    """And then it is gone; a second time there is no such record."""
    done = run("forget", SCOPE, "order-2", "--yes", "--reason", "test order")
    assert done.returncode == 0
    assert "the next delivery will run the handler again" in done.stderr
    again = run("forget", SCOPE, "order-2", "--yes")
    assert (again.returncode, again.stderr.splitlines()[0]) == (
        3,
        "idem-tasks: there is no record of shop.charge 'order-2'",
    )
    assert [each["reason"] for each in document("audit", SCOPE)["data"]] == ["test order"]


@pytest.mark.parametrize("command", [["resolve", SCOPE, "order-1", "--rerun"], ["forget", SCOPE, "order-1"]])
def test_a_dry_run_does_nothing(url: str, command: list[str]) -> None:
    """It says what would be done."""
    before = record(url, "order-1")
    done = run(*command, "--dry-run")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "Nothing was done: this is a dry run.")
    assert document(*command, "--dry-run")["data"]["done"] is False
    assert record(url, "order-1") == before


@pytest.mark.parametrize("command", [["resolve", SCOPE, "order-1", "--rerun"], ["forget", SCOPE, "order-1"]])
def test_without_a_terminal_it_needs_a_yes(url: str, command: list[str]) -> None:
    """A script that did not say so changes nothing."""
    before = record(url, "order-1")
    done = run(*command)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        4,
        "idem-tasks: nothing was done: without a terminal to ask on, give --yes",
    )
    refused = idem_tasks(*command, "--json", IDEM_TASKS_DATABASE_URL=url)
    assert refused.returncode == 4
    assert json.loads(refused.stdout)["error"]["code"] == "confirmation_missing"
    assert record(url, "order-1") == before


def on_a_terminal(
    url: str, command: list[str], answer: str | None, meanwhile: Callable[[], object] = lambda: None
) -> tuple[int, str]:
    """Run a command that asks, let something happen while it waits, and answer; returns its exit code and its words.

    None as `answer`: it does not ask.
    """
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "idem_tasks", "--no-color", *command],
        env={**os.environ, "IDEM_TASKS_DATABASE_URL": url, "TERM": "dumb"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    seen, asked, until = "", False, time.monotonic() + 60
    while time.monotonic() < until:
        if select.select([ours], [], [], 0.2)[0]:
            try:
                seen += os.read(ours, 4096).decode()
            except OSError:  # it has ended
                break
        if not asked and "Do it? [y/N]" in seen:
            meanwhile()
            os.write(ours, f"{answer}\n".encode())
            asked = True
    os.close(ours)
    code = process.wait(timeout=30)
    assert asked is (answer is not None), seen
    return code, " ".join(seen.split())


def test_on_a_terminal_the_steps_fit(stepped: str) -> None:
    """In 80 columns, nothing is cut off."""
    code, said = on_a_terminal(stepped, ["show", SCOPE, "order-5"], None)
    assert code == 0
    steps = re.sub(r"\d+ (s|min) ago", "AGO", re.sub(r"\x1b\[\d*m", "", said).partition(" STEP ")[2])
    assert steps == "NAME BEGUN FINISHED OUTCOME 1 charge AGO AGO 12 bytes, json 2 mail AGO"


@pytest.mark.parametrize("answer, code, state", [("y", 0, State.RELEASED), ("n", 4, State.IN_DOUBT)])
def test_on_a_terminal_it_asks(url: str, answer: str, code: int, state: State) -> None:
    """Whoever says no, or anything but yes, changes nothing."""
    assert on_a_terminal(url, ["resolve", SCOPE, "order-1", "--rerun"], answer)[0] == code
    assert record(url, "order-1").state is state


def test_a_key_cannot_forge_the_question(url: str) -> None:
    """What is shown just before it is one's own words and the key's letters, and no command of a terminal."""
    scope, key = "charge\x1b[1A", "x\x1b[2J\x1b[31mEVIL\rok"
    with Idempotency.from_urls(database_url=url) as idempotency, pytest.raises(TimeoutError):
        idempotency.run(no_answer, scope=scope, key=key, policy=Policy(on_crash="hold"))
    code, said = on_a_terminal(url, ["resolve", scope, key, "--rerun"], "n")
    assert code == 4
    assert "\x1b[2J" not in said
    assert "\x1b[1A" not in said
    assert r"Its scope is charge\x1b[1A, its key x\x1b[2J\x1b[31mEVIL\rok, its last holder" in said


@pytest.mark.parametrize("command", [["resolve", SCOPE, "order-1", "--outcome", "17"], ["forget", SCOPE, "order-1"]])
def test_what_moves_while_it_asks_stays(url: str, command: list[str]) -> None:
    """Each change is a compare-and-set on the token that was shown: a late yes does not end a later doubt."""

    def doubt_again() -> None:
        with Idempotency.from_urls(database_url=url) as idempotency:
            idempotency.resolve(SCOPE, "order-1", rerun=True)
            with pytest.raises(TimeoutError):
                idempotency.run(no_answer, scope=SCOPE, key="order-1", policy=Policy(on_crash="hold"))

    before = record(url, "order-1")
    code, said = on_a_terminal(url, command, "y", meanwhile=doubt_again)
    assert code == 4
    assert "has changed since you looked" in said
    assert "it is in_doubt now" in said
    after = record(url, "order-1")
    assert (after.state, after.fencing_token > before.fencing_token) == (State.IN_DOUBT, True)


# Refusing.


@pytest.mark.parametrize(
    "command, code, says",
    [
        (["show", SCOPE, "order-9"], 3, "there is no record of shop.charge 'order-9'"),
        (["resolve", SCOPE, "order-9", "--rerun", "--yes"], 3, "there is no record"),
        (["resolve", SCOPE, "order-2", "--rerun", "--yes"], 4, "is completed already"),
        (["resolve", SCOPE, "order-3", "--rerun", "--yes"], 4, "is running, held by web-1:433; its lease ends in"),
        (["forget", SCOPE, "order-3", "--yes"], 4, "is running, held by web-1:433"),
        (["resolve", SCOPE, "order-1", "--rerun", "--expect-token", "7", "--yes"], 4, "instead of 7"),
        (["forget", SCOPE, "order-1", "--expect-token", "7", "--yes"], 4, "instead of 7"),
        (["show", SCOPE, ""], 2, "key"),
    ],
)
def test_what_is_refused(command: list[str], code: int, says: str) -> None:
    """Nothing is done, the exit code tells why, and so does a line, or a JSON document on stdout."""
    done = run(*command)
    assert (done.returncode, done.stdout) == (code, "")
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    told = run(*command, "--json")
    assert (told.returncode, told.stderr) == (code, "")
    error = json.loads(told.stdout)["error"]
    assert says in error["message"]
    assert error["code"] == {2: "usage", 3: "not_found", 4: "refused"}[code]


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "give one of"),
        (["--rerun", "--outcome", "1"], "give one of"),
        (["--outcome", "receipt 17"], "a text is given in quotes"),
        (["--fail", ": no type"], "TYPE:MESSAGE"),
    ],
)
def test_what_is_not_understood(arguments: list[str], says: str) -> None:
    """Wrong usage is exit 2, before anything is looked at."""
    done = run("resolve", SCOPE, "order-1", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in " ".join(done.stderr.split())


def test_what_cannot_be_audited_is_not_done(url: str) -> None:
    """The change and its audit are one transaction."""
    database = make_url(url).database or ""
    connection = sqlite3.connect(database)
    connection.execute(
        "CREATE TRIGGER meddle AFTER INSERT ON idem_tasks_audit BEGIN SELECT RAISE(ABORT, 'no audit, no change'); END"
    )
    connection.close()
    before = record(url, "order-1")
    done = run("resolve", SCOPE, "order-1", "--rerun", "--yes")
    assert done.returncode == 5
    assert record(url, "order-1") == before


# Which store.


def test_the_store_may_be_named_before_or_after_the_command(url: str) -> None:
    """Options go before the environment, and what stands after the command before what stands before it."""
    wrong = "sqlite:////no/such/file.db"
    for arguments in (
        ["--database-url", url, "ls"],
        ["ls", "--database-url", url],
        ["--database-url", wrong, "ls", "--database-url", url],
    ):
        done = idem_tasks(*arguments, IDEM_TASKS_DATABASE_URL=wrong)
        assert (done.returncode, done.stderr) == (0, "4 records\n")


def test_looking_makes_no_database(tmp_path: Path) -> None:
    """Without a word of where the records are, in a folder without any, the error says what to give."""
    done = idem_tasks("ls", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr == (
        "idem-tasks: there is no database file idem_tasks.db; give --database-url, --redis-url or --app, or set "
        "IDEM_TASKS_DATABASE_URL\n"
    )
    assert not (tmp_path / "idem_tasks.db").exists()


def test_a_schema_and_a_prefix_of_ones_own(sqlite_url: str) -> None:
    """As `init-db` takes them."""
    with Idempotency(store=SQLStore(sqlite_url, table_prefix="once_")) as idempotency:
        idempotency.run(str, scope="own", key="1")
    done = run("ls", "--table-prefix", "once_")
    assert done.stderr == "1 record\n"
    assert run("ls", IDEM_TASKS_TABLE_PREFIX="once_").stderr == "1 record\n"


@pytest.mark.parametrize(
    "address", ["postgresql://me:secret@127.0.0.1:1/x", "redis://me:secret@127.0.0.1:1/0", "oracle://me:secret@h/x"]
)
@pytest.mark.parametrize("how", [[], ["--json"]], ids=["text", "json"])
def test_a_server_that_cannot_be_used_is_one_line_and_exit_5(address: str, how: list[str]) -> None:
    """Without the password."""
    option = "--redis-url" if address.startswith("redis") else "--database-url"
    done = idem_tasks("ls", option, address, *how)
    assert done.returncode == 5
    said = done.stdout if how else done.stderr
    assert said.count("\n") == 1
    assert "secret" not in done.stdout + done.stderr
    if how:
        assert json.loads(said)["error"]["code"] == "unusable"


def test_records_in_redis(redis_url: str) -> None:
    """The same commands; there is no audit, and that is said."""
    with Idempotency.from_urls(redis_url=redis_url) as idempotency, pytest.raises(TimeoutError):
        idempotency.run(no_answer, scope=SCOPE, key="r-1", policy=Policy(on_crash="hold"))
    where = ["--redis-url", redis_url]
    assert [each["key"] for each in json.loads(idem_tasks("ls", "--json", *where).stdout)["data"]] == ["r-1"]
    shown = json.loads(idem_tasks("show", SCOPE, "r-1", "--json", *where).stdout)
    assert (shown["data"]["steps"], shown["warnings"]) == ([], [])
    assert idem_tasks("resolve", SCOPE, "r-1", "--outcome", "17", "--yes", *where).returncode == 0
    audit = idem_tasks("audit", *where)
    assert (audit.returncode, audit.stderr.startswith("idem-tasks: Redis keeps no audit")) == (5, True)


def test_both_tiers_from_option_and_environment(url: str, redis_url: str) -> None:
    """The marker of a resolved record is deleted, so that the next delivery asks SQL."""
    with Idempotency.from_urls(database_url=url, redis_url=redis_url) as idempotency:
        assert idempotency.run(str.upper, "first", scope=SCOPE, key="t-1") == "FIRST"
        assert run("forget", SCOPE, "t-1", "--yes", "--redis-url", redis_url).returncode == 0
        assert idempotency.run(str.upper, "second", scope=SCOPE, key="t-1") == "SECOND"
