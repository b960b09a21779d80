"""`python -m idem_tasks.testing.explorer`: goes through the scenarios, or through one execution again."""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Iterator

from idem_tasks.testing.explorer.laws import Law
from idem_tasks.testing.explorer.scenario import Scenario
from idem_tasks.testing.explorer.scenarios import AT_RANDOM, EXHAUSTIVE
from idem_tasks.testing.explorer.search import Explored, explore, explore_at_random, replay

_BY_NAME = {scenario.name: scenario for scenario in (*EXHAUSTIVE, *AT_RANDOM)}


def main() -> int:
    """Return 1 if a law was broken, else 0."""
    parser = argparse.ArgumentParser(prog="python -m idem_tasks.testing.explorer", description=__doc__)
    parser.add_argument("--only", metavar="NAME", choices=_BY_NAME, help="one scenario")
    parser.add_argument("--seconds", type=float, default=600.0, help="for each scenario, at most (600)")
    parser.add_argument("--executions", type=int, default=2000, help="drawn from each scenario at random (2000)")
    parser.add_argument("--seed", type=int, default=None, help="of what is drawn at random; another one each time")
    parser.add_argument("--replay", metavar="NAME:N.N.N", help="one execution, as a find names it")
    options = parser.parse_args()
    if options.replay is not None:
        return _replay(options.replay)
    seed = secrets.randbits(32) if options.seed is None else options.seed
    sys.stdout.write(f"{len(Law)} laws; what is drawn at random has the seed {seed}\n")
    states = 0
    for explored in _explored(options.only, options.seconds, options.executions, seed):
        states += explored.states
        end = "to the end" if explored.complete else "not to the end"
        sys.stdout.write(
            f"{explored.scenario.name:40} {explored.states:8,} states {explored.executions:8,} executions "
            f"{explored.seconds:6.1f} s, {end}\n"
        )
        sys.stdout.flush()
        if explored.find is not None:
            sys.stdout.write(f"{explored.find}\n")
            return 1
    sys.stdout.write(f"{states:,} states, no law broken\n")
    return 0


def _explored(only: str | None, seconds: float, executions: int, seed: int) -> Iterator[Explored]:
    chosen: list[Scenario] = list(_BY_NAME.values()) if only is None else [_BY_NAME[only]]
    for scenario in chosen:
        if scenario in EXHAUSTIVE:
            yield explore(scenario, seconds=seconds)
        else:
            yield explore_at_random(scenario, seed, executions=executions, seconds=seconds)


def _replay(text: str) -> int:
    name, _, path = text.rpartition(":")
    if name not in _BY_NAME:
        sys.stderr.write(f"no such scenario: {name!r}; known: {', '.join(_BY_NAME)}\n")
        return 2
    found = replay(_BY_NAME[name], [int(number) for number in path.split(".") if number])
    sys.stdout.write("no law broken\n" if found is None else f"{found}\n")
    return 0 if found is None else 1


if __name__ == "__main__":
    sys.exit(main())
