"""A circuit breaker: while a server is away, calls fail at once instead of each waiting out its timeout (F49)."""

from __future__ import annotations

import threading
from collections.abc import Callable

from idem_tasks.runtime import deadline_clock

_FIRST_PAUSE = 1.0
"""Seconds after a first failure: long enough to spare a loaded worker, short enough to miss little of a restart."""

_LONGEST_PAUSE = 30.0
"""Seconds between two tries in a long outage."""


class CircuitBreaker:
    """Lets every call through until one fails; then one call per pause, until one succeeds.

    The pause is 1 s after the first failure and doubles up to 30 s. `patience` (seconds) is how long a call that is
    let through as a try may take until another one is. Safe for threads; one for each client.
    """

    def __init__(self, patience: float, clock: Callable[[], float] = deadline_clock) -> None:
        self._patience = patience
        self._clock = clock
        self._lock = threading.Lock()
        self._pause = 0.0
        self._next_try = 0.0
        self._trying = False
        self.reason: BaseException | None = None

    def wait(self) -> float:
        """Return 0 if a call may be made, else the seconds until the next may be."""
        if not self._pause:
            return 0.0
        with self._lock:
            now = self._clock()
            if self._pause and now < self._next_try:
                return self._next_try - now
            # This call is the one try. Should it never report, the next is let through after its patience.
            self._next_try = now + self._patience
            self._trying = True
            return 0.0

    def failed(self, reason: BaseException) -> None:
        """Take note that the server could not be reached."""
        self.reason = reason.with_traceback(None)
        with self._lock:
            if self._pause and not self._trying:
                return  # one of many calls that were under way together: an outage counts once
            self._pause = min(self._pause * 2, _LONGEST_PAUSE) if self._pause else _FIRST_PAUSE
            self._next_try = self._clock() + self._pause
            self._trying = False

    def answered(self) -> None:
        """Take note that the server answered, even if with an error."""
        if self._pause:
            with self._lock:
                self._pause = 0.0
                self.reason = None
