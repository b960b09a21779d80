"""A time limit that strikes a call in the middle, wherever it is then."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Struck = Callable[[float, Callable[[], object]], None]


class TimeLimitError(Exception):
    """Strikes at any instruction."""


@contextmanager
def time_limits() -> Iterator[Struck]:
    """Give a function that makes a call, and strikes it if it is not over after so many seconds."""

    def strike(*_: object) -> None:
        raise TimeLimitError

    def struck(seconds: float, call: Callable[[], object]) -> None:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            call()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except TimeLimitError:
            pass

    before, tracer = signal.signal(signal.SIGALRM, strike), sys.gettrace()
    sys.settrace(None)  # struck with its lock held, the tracer of coverage would wait for itself
    try:
        yield struck
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        sys.settrace(tracer)
