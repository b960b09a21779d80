"""Peers, each in an environment of its own, so that none of them chooses the versions of another's clients."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks.measuring import Times

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parents[1] / ".benchmarks"
"""Ignored by git, and kept: the next run need not install them again."""

SECONDS_TO_INSTALL = 300


@dataclass(frozen=True)
class Peer:
    """A package of somebody else's; `script` measures it and is run in its environment."""

    name: str
    version: str
    script: str
    requirements: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Name and version."""
        return f"{self.name} {self.version}"


POWERTOOLS = Peer("aws-lambda-powertools", "3.37.0", "with_powertools.py", ("boto3", "redis[hiredis]"))
FENCEKIT = Peer("fencekit", "0.6.1", "with_fencekit.py", ("celery", "redis[hiredis]"))
CELERY_ONCE = Peer("celery-once", "3.0.1", "with_celery_once.py", ("redis[hiredis]",))
IDEMKIT = Peer("idemkit", "1.0.2", "with_idemkit.py", ("asyncpg", "redis[hiredis]"))
DBOS = Peer("dbos", "3.4.0", "with_dbos.py")


class CannotRun(Exception):  # noqa: N818 - it is no error: the table says so
    """This machine cannot install or run the peer; the message says what was in the way."""


def install(peer: Peer) -> Path:
    """Return the interpreter of the peer's environment, made now if it is not there yet; raises `CannotRun`."""
    folder = ENVIRONMENTS / f"{peer.name}-{peer.version}-python-{sys.version_info.major}.{sys.version_info.minor}"
    python, installed = folder / "bin" / "python", folder / "installed"
    wanted = [f"{peer.name}=={peer.version}", *peer.requirements]
    if installed.exists() and installed.read_text(encoding="utf-8") == " ".join(wanted):
        return python
    shutil.rmtree(folder, ignore_errors=True)
    try:
        subprocess.run(  # noqa: S603 - a program of our own choice
            [sys.executable, "-m", "venv", folder], check=True, capture_output=True, timeout=SECONDS_TO_INSTALL
        )
        subprocess.run(  # noqa: S603 - as above
            [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted],
            check=True,
            capture_output=True,
            timeout=SECONDS_TO_INSTALL,
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error).encode()
        raise CannotRun(f"cannot be installed: {_last_line(said)}") from error
    installed.write_text(" ".join(wanted), encoding="utf-8")
    return python


def _last_line(said: bytes) -> str:
    lines = [line for line in said.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "it said nothing"


class PeerProcess:
    """A peer at work in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes], errors: Path) -> None:
        self._process = process
        self._errors = errors
        self.ways: list[str] = self.hear()["ready"]

    def ask(self, way: str, times: int) -> Times:
        """Let it do so many calls, and return what they took there."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([way, times]).encode() + b"\n")
        self._process.stdin.flush()
        heard = self.hear()
        return Times(heard["elapsed"], heard["cpu"])

    def hear(self) -> dict[str, list]:
        """Read its next answer; raises `CannotRun` if it has ended instead."""
        answers: IO[bytes] | None = self._process.stdout
        assert answers is not None
        line = answers.readline()
        if not line:
            raise CannotRun(f"does not run: {_last_line(self._errors.read_bytes())}")
        answer: dict[str, list] = json.loads(line)
        return answer


@dataclass(frozen=True)
class PeersWay:
    """A way that a peer's process takes; it times itself."""

    process: PeerProcess
    name: str

    def take(self, times: int) -> Times:
        """Let it be done so many times."""
        return self.process.ask(self.name, times)


@contextmanager
def running(peer: Peer, url: str, folder: Path) -> Iterator[PeerProcess]:
    """Start the peer's script with this URL, and end it; raises `CannotRun`."""
    python, errors = install(peer), folder / f"{peer.name}.log"
    with errors.open("ab") as log:
        process = subprocess.Popen(  # noqa: S603 - as above
            [python, HERE / peer.script, url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=folder,
            env={"PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8"},
        )
    try:
        yield PeerProcess(process, errors)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()
