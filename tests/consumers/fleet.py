"""The processes of the consumers, of which one is killed now and then and another takes its place."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.consumers.consumer import LOG
from tests.consumers.plan import Plan
from tests.services.run import REPOSITORY
from tests.services.waiting import wait_until


class Fleet:
    """Its processes are children of a nursery (nursery.py), and end with it."""

    def __init__(self, plan: Plan) -> None:
        self.kills = 0
        self._plan = plan
        self._chance = random.Random(plan.seed)
        self._pids: list[int] = []
        self._next_kill = 0.0
        self._nursery = subprocess.Popen(
            [sys.executable, "-m", "tests.consumers.nursery", plan.broker],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self) -> None:
        while len(self._pids) < self._plan.consumers:
            self._pids.append(self._started())
        self._put_off()

    def check(self) -> None:
        """Raise an error if one has ended by itself."""
        for pid in self._pids:
            if not _lives(pid):
                raise RuntimeError(f"consumer {pid} ended by itself: {self._log_end()}")

    def kill_one_if_it_is_time(self) -> bool:
        """Kill one with SIGKILL, wherever it is, and start another; tells whether it did."""
        if time.monotonic() <= self._next_kill:
            return False
        self._kill(self._pids.pop(self._chance.randrange(len(self._pids))))
        self.kills += 1
        self._pids.append(self._started())
        self._put_off()
        return True

    def kill_all(self) -> None:
        while self._pids:
            self._kill(self._pids.pop())

    def close(self) -> None:
        self.kill_all()
        self._nursery.communicate(timeout=10)

    def _put_off(self) -> None:
        self._next_kill = time.monotonic() + self._plan.kill_every * self._chance.uniform(0.5, 1.5)

    def _started(self) -> int:
        assert self._nursery.stdin is not None
        assert self._nursery.stdout is not None
        self._nursery.stdin.write(f"{self._plan.to_json()}\n")
        self._nursery.stdin.flush()
        return int(self._nursery.stdout.readline())

    def _log_end(self) -> str:
        return (Path(self._plan.folder) / LOG).read_text(errors="replace")[-2000:]

    @staticmethod
    def _kill(pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not _lives(pid), seconds=10, what=f"the end of consumer {pid}")


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
