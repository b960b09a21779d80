"""A clock that stands still until it is moved."""

from __future__ import annotations

import threading


class ManualClock:
    """Tells seconds since the epoch, which pass only when `advance` or `set` is called. Safe for threads."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self._now = now
        self._lock = threading.Lock()

    def __call__(self) -> float:
        """Return the time in seconds since the epoch."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let this many seconds pass."""
        with self._lock:
            self._now += seconds

    def set(self, now: float) -> None:
        """Step to this time in seconds since the epoch, backwards too."""
        with self._lock:
            self._now = now
