"""What the demo says while it plays: one line for each step, with a spinner on a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text


class Step:
    """A step under way: what the spinner says, and in the end the line that stays."""

    def __init__(self, console: Console, doing: str, *, animated: bool) -> None:
        spinner = "line" if console.options.ascii_only else "dots"
        self._status = console.status(Text(doing), spinner=spinner) if animated else None
        self.done = doing

    def start(self) -> None:
        """Show the spinner."""
        if self._status is not None:
            self._status.start()

    def stop(self) -> None:
        """Take it away."""
        if self._status is not None:
            self._status.stop()

    def say(self, doing: str) -> None:
        """Change what the spinner says."""
        if self._status is not None:
            self._status.update(Text(doing))


class Talk:
    """Prints steps to a console."""

    def __init__(self, console: Console, *, animated: bool | None = None) -> None:
        self._console = console
        self._animated = console.is_terminal if animated is None else animated

    @contextmanager
    def step(self, doing: str) -> Iterator[Step]:
        """Show a step while its block runs; then its `done` stays, with the seconds it took."""
        step, began = Step(self._console, doing, animated=self._animated), time.monotonic()
        ascii_only = self._console.options.ascii_only
        step.start()
        try:
            yield step
        except BaseException:  # Ctrl-C too: what was under way is marked, and goes on
            step.stop()
            self._line("x" if ascii_only else "✗", "red", doing, began)
            raise
        step.stop()
        self._line("+" if ascii_only else "✓", "green", step.done, began)

    def _line(self, mark: str, colour: str, text: str, began: float) -> None:
        took = f"{time.monotonic() - began:.1f} s"
        line = Text.assemble((mark, colour), " ", text, "  ", (took, "dim"))
        self._console.print(line, soft_wrap=True)
