"""`idem-tasks` for tests: in this process, where a command takes milliseconds, or in one of its own."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from idem_tasks import config
from idem_tasks.runtime import run_sync
from idem_tasks.stores import sql_clients

Done = subprocess.CompletedProcess[str]


def _environment(more: dict[str, str]) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("IDEM_TASKS_")}
    return {**clean, **more}


def in_its_own_process(*arguments: str, cwd: Path | None = None, **environment: str) -> Done:
    """Run a command as a shell does: what is about processes, pipes and signals needs that."""
    return subprocess.run(
        [sys.executable, "-m", "idem_tasks", *arguments],
        cwd=cwd,
        env=_environment(environment),
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )


def idem_tasks(*arguments: str, cwd: Path | None = None, **environment: str) -> Done:
    """Run a command in this process as `python -m idem_tasks` would, and leave nothing of it behind."""
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    out, err = _pipe(encoding, "strict"), _pipe(encoding, "backslashreplace")  # as Python makes them
    with (
        mock.patch.dict(os.environ, _environment(environment), clear=True),
        contextlib.chdir(cwd or Path.cwd()),
        mock.patch.multiple(sys, argv=["idem-tasks", *arguments], path=[*sys.path]),
        mock.patch.multiple(sys, stdin=io.StringIO(), stdout=out, stderr=err),
        _modules_of_its_own(),
        _databases_closed(),
        _no_log_handlers(),
        _signals_restored(),
        config.default_restored(),
    ):
        config._default = None  # as in a process that has just begun
        try:
            code = _run()
        finally:
            if config._default is not None:
                config._default.close()
    return Done(arguments, code, _text(out), _text(err))


def _run() -> int:
    try:
        importlib.import_module("idem_tasks.cli").main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:  # noqa: BLE001 - whatever nobody caught: what Python itself does then
        traceback.print_exc()
        return 1
    return 0


def _pipe(encoding: str, errors: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)


def _text(pipe: io.TextIOWrapper) -> str:
    pipe.seek(0)
    return pipe.read()


@contextlib.contextmanager
def _modules_of_its_own() -> Iterator[None]:
    """Import the command line anew, which looks at its terminal then, and forget what the command imported for a user.

    What is installed stays: to load a driver twice is no part of any test.
    """
    before = sys.modules.copy()
    ours = {name: module for name, module in before.items() if name.startswith("idem_tasks.cli")}
    for name in ours:
        del sys.modules[name]
    importlib.invalidate_caches()  # a test may have just written a module
    try:
        yield
    finally:
        for name, module in list(sys.modules.items()):
            new = name not in before and Path(getattr(module, "__file__", None) or "/").parent == Path.cwd()
            if new or name.startswith("idem_tasks.cli"):
                del sys.modules[name]
        sys.modules.update(ours)
        if "idem_tasks.cli" in ours:
            vars(before["idem_tasks"])["cli"] = ours["idem_tasks.cli"]


@contextlib.contextmanager
def _databases_closed() -> Iterator[None]:
    """Close what a user's module left open, as the end of its process would."""
    before = set(sql_clients._clients)
    try:
        yield
    finally:
        for client in set(sql_clients._clients) - before:
            if isinstance(client, sql_clients.BlockingClient):
                run_sync(client.close())


@contextlib.contextmanager
def _no_log_handlers() -> Iterator[None]:
    """Let logs go to stderr, as in a process that set nothing up; pytest has handlers of its own."""
    root = logging.getLogger()
    with mock.patch.object(root, "handlers", []):
        yield


@contextlib.contextmanager
def _signals_restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
