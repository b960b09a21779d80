"""What every server has in common that the tests start themselves."""

import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import psutil

from tests.services import reaper
from tests.services.run import Run
from tests.services.waiting import wait_until


class Unavailable(Exception):  # noqa: N818 - it is no error: the test is skipped
    """This machine has no such server; the message says what would help."""


def find_program(*names_and_places: str) -> str | None:
    """The first that can be run: names are looked up on the PATH, places are globs, of which the highest counts."""
    for candidate in names_and_places:
        places = sorted(Path("/").glob(candidate[1:]), reverse=True) if candidate.startswith("/") else [candidate]
        for place in places:
            if found := shutil.which(place):
                return str(found)
    return None


class Server:
    """A server on 127.0.0.1 with a port, a data folder and, where it refuses root, a user of its own.

    A test that was given one of its own may do anything to it: `stop`, `kill`, `pause`, `resume`, `restart`.
    """

    name: str
    programs: tuple[str, ...]
    users: tuple[str, ...] = ()  # whose rights it gets when the tests run as root; none: the tests' own
    stop_signal = signal.SIGTERM
    seconds_to_start = 30.0

    def __init__(self, run: Run, **options: str | int) -> None:
        self.program = self.find()
        self.options = options  # over what the subclass says, in the server's own words
        self.run = run
        self.port = run.free_port()
        self.account = self._account()
        self.folder = run.new_folder(self.name, owner=self.account and self.account.pw_uid)
        self.process: subprocess.Popen[bytes] | None = None

    @classmethod
    def find(cls) -> str:
        """The server's program; Unavailable when there is none."""
        program = find_program(*cls.programs)
        if program is None:
            raise Unavailable(f"no {cls.name} server on this machine: run `make services`")
        return program

    # What each kind of server says for itself.

    @property
    def url(self) -> str:
        raise NotImplementedError

    def prepare(self) -> None:
        """Make what the data folder must hold before the first start."""

    def command(self) -> list[str]:
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        """Nothing of the caller's but the PATH, so that no PGHOST or RABBITMQ_NODENAME gets in."""
        return {"PATH": os.environ["PATH"], "HOME": str(self.folder), "LANG": "C.UTF-8"}

    def answers(self) -> bool:
        """True when a client can work with it."""
        raise NotImplementedError

    # What a test may do.

    def start(self) -> Self:
        """Start it, and return when it answers."""
        if self.process is None:
            self.prepare()
        self.process = self.launch(self.command())
        try:
            wait_until(self._answers_or_died, seconds=self.seconds_to_start, what=f"{self.name} to answer")
        except TimeoutError as error:
            raise RuntimeError(f"{error}; its log ends: {self.log_end()}") from error
        return self

    def stop(self) -> None:
        """Stop it in good order; its data and its port stay for `start`."""
        reaper.stop([(self._running(), self.stop_signal)], grace=reaper.GRACE)
        self._waited()

    def kill(self) -> None:
        """Kill it and its children with SIGKILL, as a crash or the kernel would."""
        reaper.send(signal.SIGKILL, reaper.family(self._running()))
        self._waited()

    def pause(self) -> None:
        """Let it hang: connections stay open, nothing is answered."""
        reaper.pause(reaper.family(self._running()))

    def resume(self) -> None:
        reaper.send(signal.SIGCONT, reaper.family(self._running()))

    def restart(self) -> None:
        self.stop()
        self.start()

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def remove(self) -> None:
        """Stop it if it runs, and remove its data."""
        if self.is_running:
            self.stop()
        self.run.remove_folder(self.folder)

    def log_end(self) -> str:
        return self.log.read_text(errors="replace")[-2000:] if self.log.exists() else "(no log)"

    # Helpers of the subclasses.

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def launch(self, command: list[str]) -> subprocess.Popen[bytes]:
        return self.run.start(
            command,
            log=self.log,
            cwd=self.folder,
            env=self.environment(),
            user=self.account and self.account.pw_uid,
            group=self.account and self.account.pw_gid,
            stop_signal=self.stop_signal,
        )

    def run_to_end(self, command: list[str]) -> None:
        """Run one of the server's tools, as the server's user."""
        process = self.launch(command)
        if process.wait(timeout=60) != 0:
            raise RuntimeError(f"{command[0]} failed: {self.log_end()}")

    def _account(self) -> pwd.struct_passwd | None:
        if not self.users or os.geteuid() != 0:
            return None
        accounts = {account.pw_name: account for account in pwd.getpwall()}
        return next((accounts[user] for user in self.users if user in accounts), None)

    def _answers_or_died(self) -> bool:
        if not self.is_running:
            raise RuntimeError(f"{self.name} ended at once; its log ends: {self.log_end()}")
        return self.answers()

    def _running(self) -> psutil.Process:
        assert self.process is not None, f"{self.name} was never started"
        assert self.is_running, f"{self.name} is not running"
        return psutil.Process(self.process.pid)

    def _waited(self) -> None:
        assert self.process is not None
        self.process.wait(timeout=10)


def stop_all(servers: Iterable[Server]) -> None:
    for server in servers:
        server.remove()
