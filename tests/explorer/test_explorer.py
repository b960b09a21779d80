"""Every interleaving, every crash point: the shipped protocol breaks no law, and the explorer goes where it says."""

from __future__ import annotations

import inspect
import os
import secrets
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import idem_tasks
from idem_tasks import asking, endings, outbox, session_run, steps, task
from idem_tasks.runtime import deadline_clock_from
from idem_tasks.stores import tiered
from idem_tasks.stores.base import Transaction
from idem_tasks.testing import ManualClock, explorer, stepped
from idem_tasks.testing.explorer import AT_RANDOM, EXHAUSTIVE, Scenario, explore, explore_at_random, policy
from idem_tasks.testing.explorer.laws import Law
from idem_tasks.testing.explorer.search import replay as go_again
from idem_tasks.testing.explorer.world import Action, World
from tests.explorer.finds import assert_no_find
from tests.explorer.unchanged import PROTOCOL, codes_in, functions_of

SEED = int(os.environ.get("EXPLORER_SEED") or secrets.randbits(32))
"""Of what is drawn at random: another one in each process, unless EXPLORER_SEED says which."""

STORES = Path(tiered.__file__).parent


LARGE = (
    *("two faults", "two faults, hold", "a late command", "a late command, hold"),
    *("a crash every time", "heartbeats in time", "little retention is left"),
)
"""Half of all states; a run of all tests can leave these to `make prove`, which then is another run: -m "not large"."""


def scenarios() -> list[Any]:
    marked = [pytest.param(each, id=each.name, marks=[pytest.mark.large] * (each.name in LARGE)) for each in EXHAUSTIVE]
    assert sum(bool(each.marks) for each in marked) == len(LARGE)
    return marked


@pytest.mark.timeout(900)
@pytest.mark.parametrize("scenario", scenarios())
def test_no_law_is_broken(scenario: Scenario, record_property: Callable[[str, object], None]) -> None:
    """Every interleaving and every placing of the faults was gone through, and no law was broken."""
    explored = explore(scenario, seconds=800)
    record_property("explored_states", explored.states)
    assert_no_find(explored)
    assert explored.complete


@pytest.mark.timeout(300)
@pytest.mark.parametrize("scenario", AT_RANDOM, ids=lambda scenario: scenario.name)
def test_no_law_is_broken_by_many_faults(scenario: Scenario, record_property: Callable[[str, object], None]) -> None:
    """Beyond the bound, executions with up to six faults are drawn at random, and no law is broken."""
    explored = explore_at_random(scenario, SEED, executions=450, seconds=8)
    record_property("explored_states", explored.states)
    assert_no_find(explored, f"EXPLORER_SEED={SEED}\n")


# It explores what is shipped.


def test_the_protocol_is_explored_as_it_is_shipped() -> None:
    """While an exploration goes on, every function of the protocol is the one that its file says."""
    # In a process of its own: here pytest has rewritten the modules' assertions.
    told = subprocess.run(
        [sys.executable, "-m", "tests.explorer.unchanged"], check=True, capture_output=True, text=True
    )
    assert told.stdout.splitlines() == [f"{module.__name__}: as shipped" for module in PROTOCOL]


def test_no_step_of_the_protocol_is_copied() -> None:
    """The explorer has no function by the name of a step: it calls those that are shipped."""
    parts = (task, session_run, endings, asking, steps, outbox, tiered)
    told = {name.rpartition(".")[2] for part in parts for name, _ in functions_of(part)} - {"__init__"}
    folder = Path(inspect.getfile(explorer)).parent
    files = [*folder.glob("*.py"), Path(inspect.getfile(stepped))]
    assert len(files) > 5
    own: set[str] = set()
    for file in files:
        code = compile(file.read_text(encoding="utf-8"), str(file), "exec")
        own |= {inner.co_name for inner in codes_in(code)}
    by_trade = {"on", "close", "ask"} | {name for name in dir(Transaction) if not name.startswith("_")}
    assert own & told <= by_trade, "a tier, a runtime and a transaction have these"


def test_every_step_of_the_story_is_gone_through() -> None:
    """Executions stop within the shipped steps, from the claim to the publish: nothing stands in for them."""
    seen: set[str] = set()
    for behaviours in ((), ("raise",)):
        scenario, clock = Scenario(name="look", policy=policy(), copies=1, behaviours=behaviours), ManualClock()
        with deadline_clock_from(clock):
            world = World(scenario, clock)
            world.act(world.actions()[0])
            while world.actors:
                awaited: Any = next(iter(world.actors.values())).coroutine
                while hasattr(awaited, "cr_frame"):
                    if Path(awaited.cr_code.co_filename).parent in {Path(idem_tasks.__file__).parent, STORES}:
                        seen.add(awaited.cr_code.co_qualname)
                    awaited = awaited.cr_await
                world.act(world.actions()[0])
            world.close()
    assert seen >= {
        "perform", "open_claim", "claim_or_wait", "claim_or_withdraw", "record", "finish", "give_up", "let_go",
        "TieredStore.claim", "TieredStore._claim_record", "TieredStore.finish", "TieredStore._publish",
        "TieredStore.release", "TieredStore._give_back", "Blocking.shield",
    }  # fmt: skip


def test_a_late_command_takes_effect_when_its_sender_is_gone() -> None:
    """It is on its way until then, which makes another state; and nobody hears its answer."""
    scenario = Scenario(name="look", policy=policy(), copies=1, faults={"command late": 1})
    clock, arrival = ManualClock(), Action("arrives", "delivery 1's take")
    with deadline_clock_from(clock):
        world = World(scenario, clock)
        world.act(Action("deliver"))
        world.act(Action("command late", "delivery 1"))
        assert world.log[-1] == "delivery 1: asks the marker: take - the command is LATE"
        while world.actors:
            world.act(Action("go", "delivery 1"))
        assert arrival in world.actions()
        key, late = world.key(), dict(world._on_their_way)
        world._on_their_way.clear()
        assert world.key() != key
        world._on_their_way.update(late)
        world.act(arrival)
        assert world.log[-1] == "delivery 1's take ARRIVES late -> MarkerTaken"
        assert arrival not in world.actions()
        world.settle()
        world.close()


# It misses nothing by what it leaves out, and finds the same again.


@pytest.mark.timeout(300)
@pytest.mark.parametrize("on_crash", ["rerun", pytest.param("hold", marks=pytest.mark.large)])
@pytest.mark.parametrize(
    "faults",
    [
        ("killed", "lease over"),
        ("reply lost", "markers lost"),
        ("forget", "lease over"),
        ("soft limit", "SQL down"),
        ("command late", "Redis down"),
    ],
    ids=" and ".join,
)
def test_what_is_left_out_makes_no_difference(on_crash: str, faults: tuple[str, ...]) -> None:
    """With the orders that the reduction leaves out, executions end in the same ways and in no other."""
    ends = []
    for reduced in (True, False):
        made: dict[str, object] = {"faults": dict.fromkeys(faults, 1), "most_faults": 1, "reduced": reduced}
        scenario = Scenario(name="reduced", policy=policy(on_crash), **made)  # type: ignore[arg-type]
        explored = explore(scenario, seconds=240)
        assert explored.complete
        assert_no_find(explored)
        ends.append(explored.endings_seen)
    assert ends[0] == ends[1]


def test_the_same_seed_draws_the_same() -> None:
    """A seed is all that is needed to see it again."""
    first, again, other = (explore_at_random(AT_RANDOM[0], seed, executions=20) for seed in (7, 7, 8))
    assert (first.states, first.steps) == (again.states, again.steps)
    assert (first.states, first.steps) != (other.states, other.steps)


def test_a_find_is_short_and_can_be_seen_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A law that cannot hold is broken: the trace is in words, as short as can be, and its numbers replay it."""
    scenario = Scenario(name="a find", policy=policy(), faults={"killed": 1, "lease over": 1}, most_faults=2)
    happened = World.act

    def act(self: World, action: Action) -> None:
        happened(self, action)
        if action.what == "killed":
            raise explorer.Violation(Law.NOT_STUCK, "a worker was killed")

    monkeypatch.setattr(World, "act", act)
    explored = explore(scenario)
    assert explored.find is not None
    assert [action.what for action in explored.find.path] == ["deliver", "go", "killed"]
    numbers = [int(number) for number in explored.find.replay.rpartition(":")[2].split(".")]
    again = go_again(scenario, numbers)
    assert again is not None
    assert again.log == explored.find.log
    text = str(explored.find)
    assert "BROKEN: no key stays in progress" in text
    assert "worker 1 is KILLED: the broker has its message again" in text
    assert f"--replay '{explored.find.replay}'" in text
