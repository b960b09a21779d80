"""What a case is, and the list of all of them: each module in `cases/` adds its own when it is imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from benchmarks.measuring import Absent, Way
from benchmarks.place import Place, Server

Make = Callable[[Place], AbstractContextManager[Mapping[str, Way | Absent]]]

FLOOR = "by hand"
"""The way that the others are put beside, unless the case names another."""


@dataclass(frozen=True)
class Case:
    """Something to be done, in several ways; `make` prepares them in a place of their own, and cleans up."""

    group: str
    name: str
    make: Make
    needs: tuple[Server, ...] = ()
    floor: str = FLOOR
    turn: int = 10
    """Calls one after another, before it is another way's turn."""
    calls: int = 1
    """How many calls one call of a way holds; what is shown is for each of them."""
    counted: bool = True
    """Whether its round trips and commits mean anything."""
    all_cores: bool = False
    """Whether the clients may use the servers' cores too: they are several processes."""
    in_quick: bool = True


CASES: list[Case] = []


def case(
    group: str,
    name: str,
    *,
    needs: tuple[Server, ...] = (),
    floor: str = FLOOR,
    turn: int = 10,
    calls: int = 1,
    counted: bool = True,
    all_cores: bool = False,
    in_quick: bool = True,
) -> Callable[[Make], Make]:
    """Add the decorated function as a case; see `Case` for what the keywords mean."""

    def add(make: Make) -> Make:
        CASES.append(Case(group, name, make, needs, floor, turn, calls, counted, all_cores, in_quick))
        return make

    return add
