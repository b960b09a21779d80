"""Compares the functions that an exploration runs with those of the files: `python -m tests.explorer.unchanged`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, ModuleType

from idem_tasks import (
    asking,
    block,
    call,
    claims,
    endings,
    heartbeat,
    outbox,
    replay,
    runtime,
    session_run,
    steps,
    task,
)
from idem_tasks.runtime import deadline_clock_from
from idem_tasks.stores import cached, local_cache, memory, memory_marker, memory_outbox, tiered
from idem_tasks.testing.clock import ManualClock
from idem_tasks.testing.explorer.scenario import Scenario, policy
from idem_tasks.testing.explorer.world import World

PROTOCOL = (
    *(task, session_run, endings, asking, steps, outbox),
    *(block, call, replay, heartbeat, claims, runtime),
    *(tiered, cached, local_cache, memory, memory_marker, memory_outbox),
)


def functions_of(module: ModuleType) -> Iterator[tuple[str, CodeType]]:
    """The code of every function and method that a module defines, as it is now."""
    for name, thing in vars(module).items():
        if inspect.isfunction(thing) and thing.__module__ == module.__name__:
            yield name, inspect.unwrap(thing).__code__
        elif inspect.isclass(thing) and thing.__module__ == module.__name__:
            for method, member in vars(thing).items():
                function = getattr(member, "fget", member)
                if inspect.isfunction(function) and function.__code__.co_filename == module.__file__:
                    yield f"{name}.{method}", function.__code__


def codes_in(code: CodeType) -> Iterator[CodeType]:
    """A code and all that is defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes_in(constant)


def changed(module: ModuleType) -> list[str]:
    """The functions of a module that are not those of its file, in the middle of an exploration."""
    file = Path(str(module.__file__))
    shipped = set(codes_in(compile(file.read_text(encoding="utf-8"), str(file), "exec", dont_inherit=True)))
    clock = ManualClock()
    with deadline_clock_from(clock):
        world = World(Scenario(name="look", policy=policy()), clock)
        world.act(world.actions()[0])
        live = dict(functions_of(module))
        world.close()
    if not live:
        raise RuntimeError(f"{module.__name__} has no functions")
    return [name for name, code in live.items() if code not in shipped]


if __name__ == "__main__":
    for each in PROTOCOL:
        different = changed(each)
        sys.stdout.write(f"{each.__name__}: {', '.join(different) or 'as shipped'}\n")
