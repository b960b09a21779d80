"""Calls a store's coroutines from plain test functions, in either runtime."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, TypeVar

from idem_tasks.runtime import run_sync
from idem_tasks.stores.base import RuntimeName

T = TypeVar("T")

Verb = Callable[[], Coroutine[Any, Any, T]]

PATIENCE = 30.0
"""Seconds after which a wait in a test is a failure; far more than any of them needs."""


class Driver:
    """Runs coroutines to their end on this thread, or on one event loop of its own.

    So a test is written once, as a plain function, for both runtimes. Use it as a context manager: the event loop
    ends with it. `pause(seconds)` lets time pass; a store with a clock of its own may move that instead of waiting.
    """

    def __init__(self, runtime: RuntimeName, pause: Callable[[float], None] = time.sleep) -> None:
        self.runtime = runtime
        self.pause = pause
        self._runner = asyncio.Runner() if runtime == "asyncio" else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._runner is not None:
            self._runner.close()

    def __call__(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Return what the coroutine returns, or raise what it raises."""
        return run_sync(coroutine) if self._runner is None else self._runner.run(coroutine)

    def together(self, verbs: Sequence[Verb[T]]) -> list[T]:
        """Call all at the same moment, each on a thread of its own or as a task, and return what they return."""
        if self._runner is not None:
            return self._runner.run(_gather(verbs))
        start = threading.Barrier(len(verbs), timeout=PATIENCE)

        def call(verb: Verb[T]) -> T:
            start.wait()
            return run_sync(verb())

        with ThreadPoolExecutor(len(verbs)) as threads:
            return list(threads.map(call, verbs, timeout=PATIENCE))

    def poll(self, verb: Verb[T], accept: Callable[[T], bool], every: float = 0.05) -> T:
        """Call again every so many seconds until the answer is accepted, and return it."""
        answer = self(verb())
        for _ in range(int(PATIENCE / every)):
            if accept(answer):
                return answer
            self.pause(every)
            answer = self(verb())
        raise AssertionError(f"not accepted within {PATIENCE:.0f} s; the last answer was {answer!r}")


async def _gather(verbs: Sequence[Verb[T]]) -> list[T]:
    return await asyncio.gather(*(verb() for verb in verbs))
