"""Finds an execution that breaks a law: all of them up to a bound, then at random beyond it.

Exhaustive: depth first over all actions at every state, from the beginning for each branch (a coroutine cannot be
copied), never twice from an equal state. Two executions are in an equal state when the record, the marker, the clock,
the faults that are left, what the laws remember, and all that each actor was told so far are equal.
"""

from __future__ import annotations

import random
import shlex
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from idem_tasks.runtime import deadline_clock_from
from idem_tasks.testing.clock import ManualClock
from idem_tasks.testing.explorer.laws import Violation
from idem_tasks.testing.explorer.scenario import Scenario
from idem_tasks.testing.explorer.world import Action, World

_SHARE_OF_FAULTS = 0.15
"""Of the actions in a random execution that are faults, while there are other actions."""

_LINES_SHOWN = 60

_PATIENCE = 5.0
"""Seconds to look for a shorter execution."""

_LONGEST = 600
"""Actions of one execution, at most."""


@dataclass(frozen=True, slots=True)
class Find:
    """An execution that breaks a law, as short as it could be made."""

    scenario: Scenario
    violation: Violation
    path: tuple[Action, ...]
    log: tuple[str, ...]
    seed: int | None = None

    @property
    def replay(self) -> str:
        """What `--replay` takes to see it again: the scenario, and the number of each action taken."""
        return f"{self.scenario.name}:{'.'.join(map(str, _numbers(self.scenario, self.path)))}"

    def __str__(self) -> str:
        lines = [f"{number:3}. {line}" for number, line in enumerate(self.log[:_LINES_SHOWN], 1)]
        if len(self.log) > _LINES_SHOWN:
            lines.append(f"     ... and {len(self.log) - _LINES_SHOWN} more")
        seed = "" if self.seed is None else f", found with seed {self.seed}"
        return "\n".join(
            [
                f"BROKEN: {self.violation}",
                f"in {self.scenario.name}{seed}",
                *lines,
                f"again: python -m idem_tasks.testing.explorer --replay {shlex.quote(self.replay)}",
            ]
        )


@dataclass(slots=True)
class Explored:
    """What an exploration went through."""

    scenario: Scenario
    states: int = 0
    steps: int = 0
    executions: int = 0
    endings: int = 0
    seconds: float = 0.0
    complete: bool = False
    find: Find | None = None
    endings_seen: set[tuple[Any, ...]] = field(default_factory=set)
    """How its executions ended, each way once."""
    _seen: set[int] = field(default_factory=set)


def explore(scenario: Scenario, *, seconds: float = 60.0, states: int | None = None) -> Explored:
    """Try every interleaving and every placing of the scenario's faults, until all are done or a bound is reached."""
    explored, began, clock = Explored(scenario), time.monotonic(), ManualClock()
    waiting: list[tuple[Action, ...]] = [()]
    with deadline_clock_from(clock):
        while waiting:
            if time.monotonic() - began > seconds or (states is not None and explored.states >= states):
                break
            try:
                _go_through(explored, waiting, waiting.pop(), clock)
            except _FoundError as found:
                explored.find = shorten(scenario, found.path, found.violation, clock)
                break
        else:
            explored.complete = True
    explored.seconds = time.monotonic() - began
    return explored


def explore_at_random(scenario: Scenario, seed: int, *, executions: int, seconds: float = 60.0) -> Explored:
    """Try executions drawn from this seed; the same seed draws the same ones."""
    explored, began, clock = Explored(scenario), time.monotonic(), ManualClock()
    with deadline_clock_from(clock):
        for number in range(executions):
            if time.monotonic() - began > seconds:
                break
            try:
                _draw(explored, random.Random(f"{seed}.{number}"), clock)  # noqa: S311 - to be drawn again
            except _FoundError as found:
                explored.find = shorten(scenario, found.path, found.violation, clock, seed=seed)
                break
        else:
            explored.complete = True
    explored.seconds = time.monotonic() - began
    return explored


def replay(scenario: Scenario, numbers: Sequence[int]) -> Find | None:
    """Go through one execution again, by the number of each action among those that could happen.

    Raises ValueError where there is no such action: the numbers are those of another scenario, or of other code.
    """
    clock = ManualClock()
    with deadline_clock_from(clock):
        path: list[Action] = []
        world = World(scenario, clock)
        try:
            for number in numbers:
                possible = world.actions()
                if not 0 <= number < len(possible):
                    raise ValueError(
                        f"after {len(path)} actions there are {len(possible)}, and none is number {number}: "
                        "these numbers are those of another scenario, or of other code"
                    )
                path.append(possible[number])
                world.act(path[-1])
            world.settle()
        except Violation as violation:
            return Find(scenario, violation, tuple(path), tuple(world.log))
        finally:
            world.close()
    return None


def shorten(
    scenario: Scenario, path: tuple[Action, ...], violation: Violation, clock: ManualClock, seed: int | None = None
) -> Find:
    """Leave out what is not needed to break the same law, then look for a shorter execution with the same faults."""
    found = _lenient(scenario, path, clock)
    if found is None or found.violation.law is not violation.law:
        raise RuntimeError(f"{violation} was not found again: an execution is not determined by its actions")
    shorter = True
    while shorter:
        shorter = False
        for size in (8, 4, 2, 1):
            start = len(found.path) - size
            while start >= 0:
                without = found.path[:start] + found.path[start + size :]
                again = _lenient(scenario, without, clock)
                if again is not None and again.violation.law is violation.law and len(again.log) < len(found.log):
                    found, shorter = again, True
                start -= 1
    found = _shortest(found, clock) or found
    return Find(scenario, found.violation, found.path, found.log, seed)


def _shortest(found: Find, clock: ManualClock) -> Find | None:
    """Return the shortest execution with no other faults that breaks the same law, if it is found in time."""
    faults = Counter(action.what for action in found.path if action.what in found.scenario.faults)
    scenario = replace(found.scenario, faults=dict(faults), most_faults=faults.total())  # type: ignore[arg-type]
    until, seen, waiting = time.monotonic() + _PATIENCE, set[int](), deque[tuple[Action, ...]]([()])
    while waiting and len(waiting[0]) < len(found.path) and time.monotonic() < until:
        path, world = waiting.popleft(), World(scenario, clock)
        try:
            for action in path:
                world.act(action)
            if (key := world.key()) in seen:
                continue
            seen.add(key)
            waiting += [(*path, action) for action in world.actions()]
            world.settle()
        except Violation as violation:
            if violation.law is found.violation.law:
                return Find(scenario, violation, path, tuple(world.log))
        finally:
            world.close()
    return None


class _FoundError(Exception):
    def __init__(self, path: tuple[Action, ...], violation: Violation) -> None:
        super().__init__(str(violation))
        self.path = path
        self.violation = violation


def _go_through(
    explored: Explored, waiting: list[tuple[Action, ...]], path: tuple[Action, ...], clock: ManualClock
) -> None:
    """Go along a path and on from its end, always by the first action; leave the others for later."""
    world = World(explored.scenario, clock, tells=False)
    explored.executions += 1
    try:
        for action in path:
            world.act(action)
        for _ in range(_LONGEST):
            explored.steps += 1
            key = world.key()
            if key in explored._seen:  # noqa: SLF001 - of this module
                return
            explored._seen.add(key)  # noqa: SLF001
            explored.states += 1
            actions = world.actions()
            if world.is_quiet:
                waiting += [(*path, action) for action in actions]
                explored.endings += 1
                explored.endings_seen.add(world.ending())
                world.settle()
                return
            waiting += [(*path, action) for action in reversed(actions[1:])]
            path = (*path, actions[0])
            world.act(actions[0])
    except Violation as violation:
        raise _FoundError(path, violation) from None
    finally:
        world.close()


def _draw(explored: Explored, chance: random.Random, clock: ManualClock) -> None:
    world, path = World(explored.scenario, clock, tells=False), []
    explored.executions += 1
    try:
        for _ in range(_LONGEST):
            explored.steps += 1
            key = world.key()
            if key not in explored._seen:  # noqa: SLF001 - of this module
                explored._seen.add(key)  # noqa: SLF001
                explored.states += 1
            actions = world.actions()
            faults = [action for action in actions if action.what in explored.scenario.faults]
            others = [action for action in actions if action.what not in explored.scenario.faults]
            if world.is_quiet and (not actions or chance.random() > _SHARE_OF_FAULTS):
                explored.endings += 1
                world.settle()
                return
            from_faults = faults and (not others or chance.random() < _SHARE_OF_FAULTS)
            path.append(chance.choice(faults if from_faults else others))
            world.act(path[-1])
    except Violation as violation:
        raise _FoundError(tuple(path), violation) from None
    finally:
        world.close()


def _lenient(scenario: Scenario, path: Sequence[Action], clock: ManualClock) -> Find | None:
    """Go along a path, without the actions that cannot happen, and on to its end; None if no law is broken."""
    world, taken = World(scenario, clock), []
    try:
        for action in path:
            if action in world.actions():
                taken.append(action)
                world.act(action)
        world.settle()
    except Violation as violation:
        return Find(scenario, violation, tuple(taken), tuple(world.log))
    finally:
        world.close()
    return None


def _numbers(scenario: Scenario, path: Sequence[Action]) -> list[int]:
    numbers, clock = [], ManualClock()
    with deadline_clock_from(clock):
        world = World(scenario, clock)
        try:
            for action in path:
                numbers.append(world.actions().index(action))
                world.act(action)
        except Violation:
            pass
        finally:
            world.close()
    return numbers
