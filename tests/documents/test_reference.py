"""The reference says what the code says: fields and defaults, errors, events, columns, rights."""

import ast
import dataclasses
import inspect
import logging
import re
from collections.abc import Callable
from functools import partial
from typing import get_type_hints

import pytest

import idem_tasks
from idem_tasks import EventName, IdemTasksError, Policy, Record, State
from idem_tasks.claims import STEP_NAME_BYTES
from idem_tasks.events import Event, log_event
from idem_tasks.policy import PolicyFields
from idem_tasks.stores.schema import ERROR_MESSAGE_CHARACTERS, KEY_BYTES, SCOPE_BYTES, records_table, steps_table
from tests.documents.reading import REPOSITORY, blocks, table
from tests.services.redis_server import RedisServer

DOCS = REPOSITORY / "docs"


def reference(page: str, heading: str) -> list[list[str]]:
    return table((DOCS / "reference" / page).read_text(), heading)


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def note(heard: list[str], event: Event) -> None:
    heard.append(event.name.value)


def test_policy() -> None:
    """Every field, in order, with its default."""
    documented = {
        code(name)[0]: ast.literal_eval(code(default)[0]) for name, default, _ in reference("policy.md", "## Fields")
    }
    assert list(documented.items()) == [(field.name, field.default) for field in dataclasses.fields(Policy)]
    assert list(documented) == list(PolicyFields.__annotations__)


def test_policy_choices() -> None:
    """Every choice of a field is explained."""
    meanings = {code(name)[0]: meaning for name, _, meaning in reference("policy.md", "## Fields")}
    for name, hint in get_type_hints(Policy).items():
        for choice in getattr(hint, "__args__", ()):
            assert not isinstance(choice, str) or f'`"{choice}"`' in meanings[name], (name, choice)


def test_errors() -> None:
    """Every public error, with its bases and fields."""
    documented = {
        code(name)[0]: (code(bases), set(code(fields)))
        for name, bases, fields, _ in reference("errors.md", "## The tree")
    }
    public = [getattr(idem_tasks, name) for name in idem_tasks.__all__]
    errors = [kind for kind in public if isinstance(kind, type) and issubclass(kind, IdemTasksError)]
    assert set(documented) == {kind.__name__ for kind in errors}
    for kind in errors:
        bases, fields = documented[kind.__name__]
        assert bases == [base.__name__ for base in kind.__bases__]
        taken = set(inspect.signature(kind.__init__).parameters) - {"self", "args", "kwargs", "message"}
        inherited = set() if kind is IdemTasksError else set(documented[kind.__bases__[0].__name__][1])
        assert fields - inherited == taken - inherited, kind


def test_events(caplog: pytest.LogCaptureFixture) -> None:
    """Every event, with the level that it is logged at."""
    documented = {code(name)[0]: level for name, level, _ in reference("events.md", "## Names")}
    assert list(documented) == [name.value for name in EventName]
    caplog.set_level(logging.DEBUG, logger="idem_tasks")
    for name in EventName:
        log_event(Event(name))
        assert caplog.records[-1].levelname == documented[name.value]


def test_record() -> None:
    """Every column, and whether it may be empty."""
    rows = reference("record.md", "## Columns")
    documented = {code(name)[0]: (empty == "yes", meaning) for name, empty, meaning in rows}
    columns = {column.name: column for column in records_table().columns}
    assert {name: empty for name, (empty, _) in documented.items()} == {c.name: c.nullable for c in columns.values()}
    assert set(documented) == {field.name for field in dataclasses.fields(Record)}
    assert set(code(documented["state"][1])) == {state.value for state in State}
    assert f"{SCOPE_BYTES} bytes" in documented["scope"][1]
    assert f"{KEY_BYTES} bytes" in documented["key"][1]
    assert f"{ERROR_MESSAGE_CHARACTERS:,} characters" in documented["error_message"][1]
    indexed = {column.name for index in records_table().indexes for column in index.columns}
    assert indexed == {name for name, (_, meaning) in documented.items() if "indexed" in meaning}


def test_steps() -> None:
    """Every column of a step, and whether it may be empty."""
    rows = reference("record.md", "## Steps")
    columns = steps_table().columns
    assert {code(name)[0]: empty == "yes" for name, empty, _ in rows} == {c.name: c.nullable for c in columns}
    assert f"{STEP_NAME_BYTES} bytes" in {code(name)[0]: meaning for name, _, meaning in rows}["name"]


def test_rights_in_redis(private_redis: Callable[..., RedisServer]) -> None:
    """A user with the rights that are documented can do what markers, and with more rights records, need."""
    page = (DOCS / "how-to/deploying.md").read_text()
    [rule] = [block.text for block in blocks(page) if block.text.startswith("ACL SETUSER")]
    more = re.search(r"For records in Redis alone also `([^`]+)`", page)
    assert more is not None
    server = private_redis()
    for rights, database_url in ((rule, "sqlite://"), (f"{rule} {more[1]}", None)):
        with server.client() as client:
            client.execute_command(*rights.split())
        heard: list[str] = []
        idem = idem_tasks.Idempotency.from_urls(
            redis_url=f"redis://idem_tasks:secret@127.0.0.1:{server.port}/0",
            observers=[partial(note, heard)],
            database_url=database_url,
        )
        with idem:
            for key in ("1", "1"):
                assert idem.run(str.upper, "done", scope="rights", key=key) == "DONE"
            with pytest.raises(ZeroDivisionError):
                idem.run(divmod, 1, 0, scope="rights", key="2", policy=Policy(on_crash="hold"))
            idem.resolve("rights", "2", rerun=True)
            assert len(list(idem.records())) == 2
            assert idem.forget("rights", "1")
        assert heard == ["granted", "completed", "replayed", "granted", "in_doubt", "resolved", "forgotten"]
