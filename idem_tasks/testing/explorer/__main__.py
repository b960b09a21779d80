"""`python -m idem_tasks.testing.explorer`: goes through the scenarios, or through one execution again."""

from __future__ import annotations

import argparse
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence

from idem_tasks.testing.explorer.laws import Law
from idem_tasks.testing.explorer.scenario import Scenario
from idem_tasks.testing.explorer.scenarios import AT_RANDOM, EXHAUSTIVE
from idem_tasks.testing.explorer.search import Explored, explore, explore_at_random, replay

_BY_NAME = {scenario.name: scenario for scenario in (*EXHAUSTIVE, *AT_RANDOM)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 1 if a law was broken, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m idem_tasks.testing.explorer",
        description="Go through the shipped protocol's interleavings and crash points; check its laws at each step.",
        epilog=f"gone through to the end:{_listed(EXHAUSTIVE)}\n\ndrawn at random:{_listed(AT_RANDOM)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", metavar="NAME", choices=_BY_NAME, help="one scenario of those below, not all")
    parser.add_argument(
        "--seconds", metavar="S", type=_some(float), default=600.0, help="at most, for each scenario; 600"
    )
    parser.add_argument(
        "--executions", metavar="N", type=_some(int), default=2000, help="so many of each that is drawn at random; 2000"
    )
    parser.add_argument("--seed", metavar="N", type=int, help="of what is drawn at random; another one each time")
    parser.add_argument("--replay", metavar="NAME:N.N.N", help="one execution again, as a find names it")
    options = parser.parse_args(arguments)
    if options.replay is not None:
        try:
            return _replay(options.replay)
        except ValueError as error:
            parser.error(f"argument --replay: {error}")
    seed = secrets.randbits(32) if options.seed is None else options.seed
    sys.stdout.write(f"{len(Law)} laws; what is drawn at random has the seed {seed}\n")
    states = 0
    for explored in _explored(options.only, options.seconds, options.executions, seed):
        states += explored.states
        sys.stdout.write(
            f"{explored.scenario.name:40} {explored.states:8,} states {explored.executions:8,} executions "
            f"{explored.seconds:6.1f} s, {_how_far(explored)}\n"
        )
        sys.stdout.flush()
        if explored.find is not None:
            sys.stdout.write(f"{explored.find}\n")
            return 1
    sys.stdout.write(f"{states:,} states, no law broken\n")
    return 0


def _listed(scenarios: Sequence[Scenario]) -> str:
    return "".join(f"\n  {scenario.name!r}" for scenario in scenarios)


def _some(kind: Callable[[str], float]) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError("must be more than 0")
        return value

    return number


def _how_far(explored: Explored) -> str:
    if explored.scenario in AT_RANDOM:
        return "drawn at random"
    return "to the end" if explored.complete else "not to the end"


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
        raise ValueError(f"no such scenario: {name!r} (choose from {', '.join(map(repr, _BY_NAME))})")
    if not re.fullmatch(r"\d+(\.\d+)*", path):
        raise ValueError(f"{path!r} are no numbers with dots between them")
    found = replay(_BY_NAME[name], [int(number) for number in path.split(".")])
    sys.stdout.write("no law broken\n" if found is None else f"{found}\n")
    return 0 if found is None else 1


if __name__ == "__main__":
    sys.exit(main())
