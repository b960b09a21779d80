"""What a peer's process and the benchmark say to each other: a line of JSON each, over standard input and output.

This runs in the peer's own environment, so it imports nothing but the standard library.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import secrets
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

NOTE = "x" * 50


def charge(order_id: str, amount: int) -> dict[str, Any]:
    """Do nothing for an order: the handler of `benchmarks/orders.py`."""
    return {"receipt": f"R-{order_id}", "amount": amount, "note": NOTE}


def new_orders() -> Callable[[], str]:
    """Return a function that gives another number at each call."""
    beginning, numbers = secrets.token_hex(4), itertools.count()
    return lambda: f"{beginning}-{next(numbers):08}"


def serve(ways: dict[str, Callable[[], Any]]) -> None:
    """Do what is asked for, as often as is asked for, until nothing is; a way may be a coroutine function."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer of ours
    with asyncio.Runner() as runner:
        print(json.dumps({"ready": sorted(ways)}), file=answers, flush=True)
        for line in sys.stdin:
            name, times = json.loads(line)
            way = ways[name]
            taken = runner.run(take_async(way, times)) if asyncio.iscoroutinefunction(way) else take(way, times)
            print(json.dumps(taken), file=answers, flush=True)


def take(way: Callable[[], Any], times: int) -> dict[str, list[float]]:
    """Do it so many times, and tell what each took."""
    clock, cpu_clock = time.perf_counter, time.process_time
    elapsed, cpu = [], []
    for _ in range(times):
        cpu_begun, begun = cpu_clock(), clock()
        way()
        ended = clock()
        cpu.append(cpu_clock() - cpu_begun)
        elapsed.append(ended - begun)
    return {"elapsed": elapsed, "cpu": cpu}


async def take_async(way: Callable[[], Awaitable[Any]], times: int) -> dict[str, list[float]]:
    """Do the same within an event loop."""
    clock, cpu_clock = time.perf_counter, time.process_time
    elapsed, cpu = [], []
    for _ in range(times):
        cpu_begun, begun = cpu_clock(), clock()
        await way()
        ended = clock()
        cpu.append(cpu_clock() - cpu_begun)
        elapsed.append(ended - begun)
    return {"elapsed": elapsed, "cpu": cpu}
