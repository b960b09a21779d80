"""Celery workers of a shop: each a tree of processes, killed and paused by pid, and replaced."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil

from tests.services import reaper
from tests.services.run import Run
from tests.services.waiting import wait_until

REPOSITORY = Path(__file__).parents[2]
CHILDREN = 3


class Worker:
    """A place for one `celery worker` tree; a killed tree is followed by another."""

    def __init__(self, run: Run, shop: str, number: int, settings: dict[str, Any], folder: Path) -> None:
        self.name = f"{shop} worker {number}"
        self.busy = threading.Lock()  # held by whoever does something to it
        self._run = run
        self._host = f"{shop}-{number}"
        self._settings = settings
        self._folder = folder
        self._trees = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        """Of the tree that runs now."""
        return self._folder / f"{self._host}-{self._trees}.log"

    def start(self) -> None:
        """Start a tree, and do not wait for it."""
        self._trees += 1
        self.log.unlink(missing_ok=True)  # of an earlier run in this folder, which was ready
        self._process = self._run.start(
            [sys.executable, "-m", "celery", "-A", "tests.chaos.shop", "worker", "--loglevel", "info",
             "--pool", "prefork", "--concurrency", str(CHILDREN), "--hostname", f"{self._host}-{self._trees}@here",
             "--without-gossip", "--without-mingle", "--without-heartbeat"],
            log=self.log,
            cwd=REPOSITORY,
            env=os.environ | {"CHAOS_SHOP": json.dumps(self._settings)},
            user=None,
            group=None,
            stop_signal=signal.SIGTERM,
        )  # fmt: skip

    def wait_until_ready(self) -> None:
        wait_until(lambda: self.is_ready or not self.is_running, seconds=60, what=f"{self.name} to be ready")
        if not self.is_running:
            raise RuntimeError(f"{self.name} ended at once; its log ends: {self._text()[-2000:]}")

    @property
    def is_ready(self) -> bool:
        return " ready." in self._text()

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def children(self) -> list[int]:
        family = self._family()
        return [process.pid for process in family[1:]]

    def pause(self) -> list[int]:
        """Stop the whole tree where it is; returns its pids."""
        # The parent first, so that it makes no child that would be missed.
        reaper.pause(self._family()[:1])
        family = self._family()
        reaper.pause(family)
        return [process.pid for process in family]

    def resume(self) -> None:
        reaper.send(signal.SIGCONT, self._family())

    def kill(self) -> list[int]:
        """Kill the whole tree, as the kernel or a lost machine would; returns its pids."""
        pids = self.pause()
        reaper.send(signal.SIGKILL, self._family())
        if self._process is not None:
            self._process.wait(timeout=10)
        return pids

    def _family(self) -> list[psutil.Process]:
        if self._process is None or not self.is_running:
            return []
        return reaper.family(psutil.Process(self._process.pid))

    def _text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""
