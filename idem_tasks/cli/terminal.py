"""The two consoles: stdout for data, stderr for talk. Colours and boxes are for terminals; NO_COLOR is obeyed."""

from __future__ import annotations

import codecs
import io
import shlex
import sys

from rich.console import Console

_no_color = False


def forbid_color() -> None:
    """Print without colours from now on, as with NO_COLOR."""
    global _no_color  # noqa: PLW0603 - one option for all that is printed
    _no_color = True


def data() -> Console:
    """Return the console for what was asked for."""
    return Console(no_color=_no_color or None)


def talk() -> Console:
    """Return the console for everything else."""
    return Console(
        file=sys.stderr,
        no_color=_no_color or None,
        highlight=False,
        markup=False,  # a name in brackets is a name
        soft_wrap=not sys.stderr.isatty(),  # a line of a log is one line
    )


# What others named, such as keys and scopes, may hold anything: nothing of it may end a line, or command a terminal.


def line(text: str) -> str:
    """Return a text in one line that no terminal takes for a command, escaped as in `cell`."""
    return "".join(each if each.isprintable() else _escaped(each) for each in text)


def cell(text: str) -> str:
    """Return a text as a cell of a listing has it: all of it can be told from the next cell, and from other texts.

    It is escaped as between the $' and ' of a shell.
    """
    return line(text.replace("\\", r"\\"))


def argument(text: str) -> str:
    """Return a text as it is written in a command."""
    if text.isprintable():
        return shlex.quote(text)
    return "$'" + cell(text).replace("'", r"\'") + "'"


def is_harmless(text: str) -> bool:
    """Tell whether stdout can have it as it is."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return text.isprintable()


def escape_what_stdout_cannot_have() -> None:
    """Let no character end a command because a locale or PYTHONIOENCODING has no bytes for it."""
    codecs.register_error("idem_tasks.escape", _escape)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="idem_tasks.escape")


def _escape(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_escaped, error.object[error.start : error.end])), error.end


def _escaped(character: str) -> str:
    code = ord(character)
    if 0x80 <= code <= 0xFF:  # in a shell, \xe9 is a byte
        return f"\\u{code:04x}"
    return character.encode("unicode_escape").decode()
