"""Waiting for something to become true, with a limit."""

import time
from collections.abc import Callable


def wait_until(is_so: Callable[[], bool], *, seconds: float, what: str) -> None:
    """Return as soon as `is_so()`; after `seconds`, raise TimeoutError naming `what`."""
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(0.02)
