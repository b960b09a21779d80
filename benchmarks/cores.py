"""Which cores the client and the servers run on: never the same one, where there are two.

Unpinned, a run takes up to twice as long as another, for the client wanders between the servers' cores.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

ALL = frozenset(os.sched_getaffinity(0))


def client_cores() -> frozenset[int]:
    """Return the one core of the client."""
    return frozenset({min(ALL)})


def server_cores() -> frozenset[int]:
    """Return all others; on a machine of one core, that one."""
    return ALL - client_cores() or ALL


@contextmanager
def on_cores(cores: frozenset[int]) -> Iterator[None]:
    """Run on these cores meanwhile: this thread and, for good, all threads and processes that it starts."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
