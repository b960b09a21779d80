"""A process that waits for the run to end or die, and then stops the run's servers and removes its folder.

It is told of the end by its standard input: a byte, or the end of file that comes when the run was killed outright.
"""

import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from tests.services import compose

GRACE = 10.0  # seconds that servers get for an orderly stop before they are killed


def note(folder: Path, pid: int, stop_signal: signal.Signals) -> None:
    (folder / "processes" / str(pid)).write_text(f"{psutil.Process(pid).create_time()} {stop_signal.value}")


def noted(folder: Path) -> list[tuple[psutil.Process, int]]:
    """The servers that still run, each with its stop signal; a pid that is another process's by now is left out."""
    found = []
    for path in (folder / "processes").iterdir():
        created, stop_signal = path.read_text().split()
        try:
            process = psutil.Process(int(path.name))
        except psutil.NoSuchProcess:
            continue
        if process.create_time() == float(created) and is_running(process):
            found.append((process, int(stop_signal)))
    return found


def is_running(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def family(process: psutil.Process) -> list[psutil.Process]:
    """The process and all its descendants."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def send(signal_number: int, processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal_number)


def pause(processes: list[psutil.Process]) -> None:
    """Return once all of them stand still: a signal is sent before it is heard, and a thread may answer meanwhile."""
    send(signal.SIGSTOP, processes)
    deadline = time.monotonic() + GRACE
    while any(is_going(process) for process in processes) and time.monotonic() < deadline:
        time.sleep(0.001)


def is_going(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    return False


def stop(servers: list[tuple[psutil.Process, int]], *, grace: float) -> None:
    """Ask each server to stop, wait, and kill those that did not, with their children."""
    families = [member for process, _ in servers for member in family(process)]
    for process, stop_signal in servers:
        send(signal.SIGCONT, family(process))  # a paused one would not hear it
        send(stop_signal, [process])
    deadline = time.monotonic() + grace
    while any(is_running(member) for member in families) and time.monotonic() < deadline:
        time.sleep(0.02)
    send(signal.SIGKILL, [member for member in families if is_running(member)])


def main(folder: Path) -> None:
    os.read(sys.stdin.fileno(), 1)
    stop(noted(folder), grace=GRACE)
    compose.remove_started(folder)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
