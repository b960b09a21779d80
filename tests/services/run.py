"""One run of the tests: its folder, its processes and its ports, over all xdist workers."""

import fcntl
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.services import reaper

# Below the range that Linux (32768) and macOS (49152) take the ports of outgoing connections from. A client that
# retries a stopped server's port inside that range can connect to itself, and the server then cannot have it back.
# The range is no wider because the nodes of a Redis Cluster take the port that is 10000 higher, too.
PORTS = range(11000, 21000)
CLUSTER_OFFSET = 10000

REPOSITORY = Path(__file__).parents[2]


class Run:
    """A folder that every process of the run knows; `end` (or the death of the process that began it) removes all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reaper: subprocess.Popen[bytes] | None = None
        self._started: list[subprocess.Popen[bytes]] = []

    @classmethod
    def begin(cls) -> "Run":
        run = cls(Path(tempfile.mkdtemp(prefix="idem-tasks-tests-")))
        run.folder.chmod(0o711)  # servers that run as another user reach their own folders in it
        for part in ("containers", "ports", "processes", "servers", "shared"):
            (run.folder / part).mkdir()
        run._reaper = subprocess.Popen(
            [sys.executable, "-m", reaper.__name__, run.folder],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in the terminal is for the tests, not for what cleans up after them
        )
        return run

    def end(self) -> None:
        """Stop every server that is still there, wherever it was started, and remove the folder."""
        assert self._reaper is not None
        assert self._reaper.stdin is not None
        self._reaper.stdin.write(b"end")
        self._reaper.stdin.close()
        self._reaper.wait(timeout=60)
        for process in self._started:
            process.wait()

    def new_folder(self, name: str, *, owner: int | None = None) -> Path:
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.folder / "servers"))
        if owner is not None:
            os.chown(folder, owner, -1)
        return folder

    def remove_folder(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)

    def free_port(self) -> int:
        """A port that no process of this run was given, and on which nothing listens, nor on its cluster bus."""
        for port in random.SystemRandom().sample(PORTS, k=200):  # two runs may have one seed
            with socket.socket() as probe, socket.socket() as cluster_probe:
                try:
                    probe.bind(("127.0.0.1", port))
                    cluster_probe.bind(("127.0.0.1", port + CLUSTER_OFFSET))
                    (self.folder / "ports" / str(port)).touch(exist_ok=False)
                except OSError:  # taken: FileExistsError is one too
                    continue
            return port
        raise RuntimeError("no free port among 200 tried")

    def start(
        self,
        command: list[str],
        *,
        log: Path,
        cwd: Path,
        env: dict[str, str],
        user: int | None,
        group: int | None,
        stop_signal: signal.Signals,
    ) -> subprocess.Popen[bytes]:
        """Start a server in a session of its own and note it for the reaper."""
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env=env,
                user=user,
                group=group,
                extra_groups=None if user is None else [],
                start_new_session=True,
            )
        reaper.note(self.folder, process.pid, stop_signal)
        self._started.append(process)
        return process

    def once(self, name: str, make: Callable[[], str]) -> str:
        """What `make` returns, made by whichever process of the run comes first and known to all of them."""
        record = self.folder / "shared" / f"{name}.json"
        with (self.folder / "shared" / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not record.exists():
                record.write_text(json.dumps(make()))
            made: str = json.loads(record.read_text())
            return made
