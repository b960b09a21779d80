"""A batch ends as the same messages, run one at a time, would: the same outcomes, effects and records."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from idem_tasks.claims import Release
from idem_tasks.errors import BatchError
from idem_tasks.runtime import run_sync
from idem_tasks.stores.base import RuntimeName
from tests.unit.batches import Message, batch_of, batching, one_at_a_time
from tests.unit.scripted import LEASE, World, world_on

KEYS = "ABCDE"
BEFORE = ("new", "completed", "released", "in progress", "dead", "in doubt")
ENDINGS = ("done", "fails", "declined")


class DeclinedError(Exception):
    """A failure that is recorded."""


def prepare(world: World, before: dict[str, str]) -> None:
    """Leave the records as earlier deliveries did."""
    for key, state in before.items():
        match state:
            case "completed":
                world.finish_elsewhere(world.claim_elsewhere(key))
            case "released":
                world.release_elsewhere(world.claim_elsewhere(key))
            case "in doubt":
                run_sync(world.real.release(world.claim_elsewhere(key), Release(in_doubt=True)))
            case "dead":
                world.claim_elsewhere(key)
    world.pass_time(LEASE + 1)
    for key, state in before.items():
        if state == "in progress":
            world.claim_elsewhere(key)


def handler(world: World, endings: dict[str, str]) -> Callable[[list[Message]], list[Any]]:
    def ship(messages: list[Message]) -> list[Any]:
        world.effects.extend(message["id"] for message in messages)
        errors = {"fails": ValueError("no"), "declined": DeclinedError("no")}
        return [errors.get(endings[message["id"]], f"done {message['id']}") for message in messages]

    return ship


def shown(result: Any) -> Any:
    return (type(result).__name__, str(result)) if isinstance(result, Exception) else result


def ended(call: Callable[..., Any], messages: list[Message]) -> list[Any]:
    """Return the outcomes, or what stands in their places."""
    try:
        return [shown(each) for each in call(messages)]
    except BatchError as error:
        return [shown(each) for each in error.results]


def records(world: World) -> dict[str, Any]:
    """Return what is recorded, but for what is random."""
    names = ("state", "outcome", "error_type", "failures", "crashes", "attempts", "generation")
    found = {key: world.get(key) for key in KEYS}
    return {key: record and tuple(getattr(record, name) for name in names) for key, record in found.items()}


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("tiers", [1, 2])
@pytest.mark.parametrize("runtime", ["blocking", "asyncio"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_batch_is_its_messages(runtime: RuntimeName, tiers: int, together: bool, data: st.DataObject) -> None:
    """Whatever stood before, and whichever of them fail (F38)."""
    before = data.draw(st.fixed_dictionaries({key: st.sampled_from(BEFORE) for key in KEYS}), label="before")
    endings = data.draw(st.fixed_dictionaries({key: st.sampled_from(ENDINGS) for key in KEYS}), label="endings")
    keys = data.draw(st.lists(st.sampled_from(KEYS), max_size=6), label="messages")
    # One that fails would run again at its next delivery; within a batch that is the batch's next one.
    keys = [key for place, key in enumerate(keys) if key not in keys[:place] or endings[key] != "fails"]
    on_crash = data.draw(st.sampled_from(["rerun", "hold"]), label="on_crash")
    options: Any = {"on_crash": on_crash, "record_failures": DeclinedError, "fingerprint": None, "max_attempts": 2}
    found = []
    for at_once in (True, False):
        with pytest.MonkeyPatch.context() as patch, world_on(patch, runtime, tiers) as world:
            batching(world) if together else one_at_a_time(world)
            prepare(world, before)
            task = batch_of(world, handler(world, endings), **options)
            messages = [{"id": key} for key in keys]
            if at_once:
                results = ended(task, messages)
            else:
                results = [result for message in messages for result in ended(task, [message])]
            found.append((results, world.effects, records(world), world.held()))
    assert found[0] == found[1]
