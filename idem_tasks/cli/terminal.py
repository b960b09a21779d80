"""The two consoles: stdout for data, stderr for talk. Colours and boxes are for terminals; NO_COLOR is obeyed."""

from __future__ import annotations

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
