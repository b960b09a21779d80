"""Whatever strikes a batch, and wherever: nothing is released after the effect, and nothing held on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest

from idem_tasks.claims import State
from idem_tasks.errors import BatchError, StoreUnavailableError
from tests.unit.batches import Message, batch_of, messages, one_at_a_time
from tests.unit.scripted import World
from tests.unit.test_interruptions import NEVER_BEGUN, SoftLimitError, strike_everywhere

KEYS = ("A-1", "A-2")


def calling(world: World, task: Callable[..., Any]) -> Callable[[str], Any]:
    """Return a call of the task with two messages, which fails as a batch only."""

    def run(key: str) -> None:
        keys = KEYS if key == "A-1" else ("warm-1", "warm-2")
        with contextlib.suppress(BatchError):
            task(messages(*keys))
        if key == "warm":
            world.effects.clear()

    return run


@NEVER_BEGUN
@pytest.mark.parametrize(
    "tiers, kind, fails, together",
    [
        (2, KeyboardInterrupt, False, True),
        (2, SoftLimitError, True, True),
        (1, KeyboardInterrupt, True, False),
        (1, SoftLimitError, False, False),
    ],
)
def test_struck_at_any_line(
    monkeypatch: pytest.MonkeyPatch, tiers: int, kind: type[BaseException], fails: bool, together: bool
) -> None:
    """An interruption at any line comes out as itself; no claim is renewed after it; before the handler all are given
    back; after it each is recorded, released by its own failure, or left to its lease (F62)."""  # noqa: D205, D209

    def call(world: World) -> Callable[[str], Any]:
        def ship(messages: list[Message]) -> list[Any]:
            world.effects.extend(message["id"] for message in messages)
            return [ValueError("no") if fails and message["id"].endswith("2") else "done" for message in messages]

        if not together:
            one_at_a_time(world)
        return calling(world, batch_of(world, ship))

    seen: dict[tuple[bool, State | None, State | None], list[str]] = {}
    for world, striker, raised in strike_everywhere(monkeypatch, tiers, kind, call):
        where = striker.line
        assert raised is striker.error, f"{raised!r} came out when struck at {where}"
        assert world.held() == 0, f"held on when struck at {where}"
        states = (world.state(KEYS[0]), world.state(KEYS[1]))
        seen.setdefault((bool(world.effects), *states), []).append(where)
        for state, failed in zip(states, (False, fails), strict=True):
            allowed = {None, State.RELEASED, State.RUNNING}
            if world.effects:
                allowed = {State.RUNNING, State.RELEASED if failed else State.COMPLETED}
            assert state in allowed, f"{states} when struck at {where}"
    last = State.RELEASED if fails else State.COMPLETED
    assert seen[True, State.COMPLETED, last]
    assert seen[False, State.RELEASED, State.RELEASED]
    running = [(ended[0], where) for ended, lines in seen.items() if State.RUNNING in ended for where in lines]
    left = [where for ran, where in running if ran]
    # Between two protected stretches claims are left to their leases: some lines, not whole steps.
    assert len(left) <= 24, left
    waiting = [where for ran, where in running if not ran]
    assert len(waiting) <= 16, waiting


@NEVER_BEGUN
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SoftLimitError])
def test_a_handler_that_raises_struck_at_any_line(monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]) -> None:
    """Once the handler raised, both messages are released, or left to their leases."""

    def call(world: World) -> Callable[[str], Any]:
        def ship(messages: list[Message]) -> list[Any]:
            world.effects.extend(message["id"] for message in messages)
            raise ValueError

        return calling(world, batch_of(world, ship))

    released = 0
    for world, striker, raised in strike_everywhere(monkeypatch, 1, kind, call):
        assert raised is striker.error, f"{raised!r} came out when struck at {striker.line}"
        assert world.held() == 0, striker.line
        states = {world.state(key) for key in KEYS}
        assert states <= {None, State.RELEASED, State.RUNNING}, striker.line
        released += bool(world.effects) and states == {State.RELEASED}
    assert released > 30


@NEVER_BEGUN
def test_the_finish_is_begun_again_while_the_store_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Struck at any line while outcomes cannot be recorded at first, none is released, and all are at the end."""

    def call(world: World) -> Callable[[str], Any]:
        def ship(messages: list[Message]) -> list[str]:
            if messages[0]["id"] == "A-1":
                world.effects.append("A-1")
                world.record_tier.before("finish_batch", StoreUnavailableError("away"))
            return ["done" for _ in messages]

        return calling(world, batch_of(world, ship))

    for world, striker, raised in strike_everywhere(monkeypatch, 1, SoftLimitError, call):
        assert raised is striker.error, striker.line
        if world.effects:
            assert {world.state(key) for key in KEYS} <= {State.RUNNING, State.COMPLETED}, striker.line
