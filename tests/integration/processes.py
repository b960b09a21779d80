"""Processes that a test starts, and that do not outlive it, however it ends."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil

from tests.services import reaper


@contextmanager
def process(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process; at the end it and its children are killed, if it still runs."""
    with subprocess.Popen(command, **options) as started:
        try:
            yield started
        finally:
            if started.poll() is None:
                reaper.send(signal.SIGKILL, reaper.family(psutil.Process(started.pid)))
