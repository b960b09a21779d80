"""Starts the processes of a run, and ends them, whatever happens to the demo itself.

Each is the leader of a process group. All of them hold the reading end of one pipe, the lifeline: it is closed when
the demo ends, even by SIGKILL, and each then kills its group.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from idem_tasks.demo.settings import Settings, Side
from idem_tasks.errors import IdemTasksError

_POLL = 0.05


class DemoError(IdemTasksError):
    """The demo could not be played to its end; what it was to show is neither shown nor refuted."""


class Processes:
    """The processes of one run, for a `with` block."""

    def __init__(self) -> None:
        self.lifeline, self._hold = os.pipe()
        self._workers: dict[Side, subprocess.Popen[bytes]] = {}
        self._started: list[tuple[str, subprocess.Popen[bytes], Path]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._hold)
        os.close(self.lifeline)
        for _, process, _ in self._started:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS says the latter of the dead
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def start_worker(self, settings: Settings, side: Side) -> None:
        """Start a Celery worker."""
        self._workers[side] = self._start(settings, f"worker-{side}", [side])

    def start_marker(self, settings: Settings, listening: int) -> None:
        """Start the stand-in for Redis on a socket that listens already."""
        self._start(settings, "marker", ["marker", str(listening)], listening)

    def _start(self, settings: Settings, name: str, arguments: list[str], *files: int) -> subprocess.Popen[bytes]:
        log = settings.folder / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(  # noqa: S603 - this very Python
                [sys.executable, "-m", "idem_tasks.demo.worker", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=settings.folder,
                env=settings.as_environment(),
                pass_fds=[settings.lifeline, *files],
                start_new_session=True,
            )
        self._started.append((name, process, log))
        return process

    def wait_until(self, ready: Callable[[], bool], *, timeout: float, what: str) -> None:
        """Wait until it is so; raises `DemoError` after `timeout` seconds, or if a process ends meanwhile."""
        until = time.monotonic() + timeout
        while not ready():
            self.check()
            if time.monotonic() > until:
                raise DemoError(f"{what} took more than {timeout:.0f} s{self._last_words()}")
            time.sleep(_POLL)

    def check(self) -> None:
        """Raise `DemoError` if a process has ended by itself."""
        for name, process, log in self._started:
            if process.poll() is not None:
                raise DemoError(f"the demo's {name} process ended by itself{_last_lines(log)}")

    def _last_words(self) -> str:
        return "".join(_last_lines(log) for _, _, log in self._started)

    def kill_child(self, side: Side, pid: int) -> None:
        """Kill a process of this side's worker with SIGKILL."""
        if os.getpgid(pid) != self._workers[side].pid:
            raise DemoError(f"process {pid} is none of the worker's, and was not killed")
        os.kill(pid, signal.SIGKILL)


def _last_lines(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-12:]
    return "".join(f"\n  {log.stem} | {line}" for line in lines)
