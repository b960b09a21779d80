"""What a command answers with: data to stdout, for people or as JSON, and errors with their exit codes."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import typer
from rich.table import Table
from rich.text import Text

from idem_tasks.cli import UNUSABLE, terminal
from idem_tasks.errors import ConflictError, IdemTasksError, InvalidKeyError

NOT_FOUND = 3
REFUSED = 4

_SCHEMA = 1
"""Of the JSON documents: fields are added within a number, never changed nor taken away."""

Row = Mapping[str, str]


class Answer:
    """Prints what one command has to say."""

    def __init__(self, command: str, *, as_json: bool) -> None:
        self.command = command
        self.as_json = as_json

    def document(self, data: Any, next_cursor: str | None = None, warnings: Sequence[str] = ()) -> None:
        """Print the one JSON document."""
        head = {"schema": _SCHEMA, "command": self.command, "generated_at": instant(datetime.now(UTC))}
        _write_json(head | {"data": data, "next": next_cursor, "warnings": list(warnings)})

    def rows(self, names: Sequence[str], rows: Sequence[Row], *, short: Sequence[tuple[str, str]]) -> None:
        """Print a listing: on a terminal the `short` columns (name, title), in a pipe all of them, whole."""
        if not sys.stdout.isatty():
            _write_tabbed([names, *([row[name] for name in names] for row in rows)])
            return
        table = Table(*(title for _, title in short), box=None, pad_edge=False, header_style="bold")
        for row in rows:
            table.add_row(*(Text(terminal.cell(row[name])) for name, _ in short))
        terminal.data().print(table)

    def fields(self, fields: Mapping[str, str]) -> None:
        """Print one thing, a line for each of its fields."""
        if not sys.stdout.isatty():
            _write_tabbed([("field", "value"), *fields.items()])
            return
        table = Table(box=None, pad_edge=False, show_header=False)
        for name, value in fields.items():
            table.add_row(Text(name, style="bold"), Text(terminal.cell(value), overflow="fold"))
        terminal.data().print(table)

    def gap(self) -> None:
        """Print an empty line between two tables."""
        sys.stdout.write("\n")
        sys.stdout.flush()

    def say(self, text: str) -> None:
        """Tell something that is no data."""
        terminal.talk().print(Text(terminal.line(text)), soft_wrap=True)

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """End the command with an error's exit code, and say it in a line, or as a JSON document."""
        try:
            yield
        except RefusalError as refused:
            self._fail(refused.code, str(refused), refused.hint, refused.exit_code)
        except ConflictError as error:
            self._fail("refused", str(error), None, REFUSED)
        except InvalidKeyError as error:
            self._fail("usage", str(error), None, 2)
        except IdemTasksError as error:
            self._fail("unusable", str(error), None, UNUSABLE)

    def _fail(self, code: str, message: str, hint: str | None, exit_code: int) -> None:
        if self.as_json:
            error = {"code": code, "message": message, "hint": hint}
            _write_json({"schema": _SCHEMA, "command": self.command, "error": error})
        else:
            # Our messages name no password, and a traceback would add nothing to them.
            sys.stderr.write(f"idem-tasks: {terminal.line(message)}\n" + (f"{terminal.line(hint)}\n" if hint else ""))
        raise typer.Exit(exit_code)


class RefusalError(Exception):
    """A command that cannot be obeyed, with its code, its exit code and what to do instead."""

    def __init__(
        self, message: str, *, hint: str | None = None, code: str = "refused", exit_code: int = REFUSED
    ) -> None:
        super().__init__(message)
        self.hint = hint
        self.code = code
        self.exit_code = exit_code


def no_record(scope: str, key: str) -> RefusalError:
    """Say that there is no such record."""
    return RefusalError(
        f"there is no record of {scope} {key!r}",
        hint="idem-tasks ls --scope SCOPE shows the keys of a scope",
        code="not_found",
        exit_code=NOT_FOUND,
    )


def instant(time: datetime) -> str:
    """Write a time as RFC 3339 in UTC, to the millisecond."""
    return time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def span(seconds: float) -> str:
    """Write how long something is, for people: the two digits that matter."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _write_json(document: Any) -> None:
    text = json.dumps(document, ensure_ascii=False)
    # Beyond ASCII as it is, for people; unless the stream cannot have it, or a terminal might obey it.
    sys.stdout.write((text if terminal.is_harmless(text) else json.dumps(document)) + "\n")


def _write_tabbed(lines: Sequence[Sequence[str]]) -> None:
    for line in lines:
        sys.stdout.write("\t".join(map(terminal.cell, line)) + "\n")
