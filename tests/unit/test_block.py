"""A claim around a block of code ends in every way a handler can."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from idem_tasks import Idempotency, MemoryStore, current_claim
from idem_tasks.claims import State
from idem_tasks.errors import (
    ConfigurationError,
    DuplicateError,
    FingerprintMismatchError,
    InDoubtError,
    InProgressError,
    InvalidKeyError,
    LeaseLostError,
    StoreUnavailableError,
)
from idem_tasks.events import EventName
from idem_tasks.runtime import run_sync
from idem_tasks.stores.base import RuntimeName
from tests.unit.scripted import LEASE, SCOPE, World, world_on


class DeclinedError(Exception):
    """The bank said no."""


@pytest.fixture(params=[("blocking", 1), ("blocking", 2), ("asyncio", 1), ("asyncio", 2)], ids=str)
def world(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[World]:
    runtime, tiers = request.param
    with world_on(monkeypatch, cast(RuntimeName, runtime), tiers) as world:
        yield world


def run(world: World, body: Callable[[Any], Any], key: str = "A-1", **options: Any) -> Any:
    """Run the body in a block of this world's runtime; a value it returns (not None) is completed."""
    options = {"lease": LEASE, **options}
    if world.runtime == "blocking":
        with world.idem.claim(scope=SCOPE, key=key, **options) as claim:
            if not claim.replayed:
                value = body(claim)
                if value is not None:
                    claim.complete(value)
        return claim

    async def block() -> Any:
        async with world.idem.aclaim(scope=SCOPE, key=key, **options) as claim:
            if not claim.replayed:
                value = body(claim)
                if value is not None:
                    await claim.complete(value)
        return claim

    return world.driver(block())


def ending(value: int) -> Callable[[Any], int]:
    """Make the body of a block that ends with this value."""
    return lambda _: value


def test_a_block_is_run_once(world: World) -> None:
    """The second block of a key is a replay that has the outcome of the first."""
    bodies: list[str] = []

    def body(claim: Any) -> str:
        bodies.append(current_claim().key)
        assert claim.claim is current_claim()
        return "done"

    first, second = run(world, body), run(world, body)
    assert bodies == ["A-1"]
    assert (first.replayed, first.outcome) == (False, "done")
    assert (second.replayed, second.outcome) == (True, "done")
    assert world.held() == 0
    with pytest.raises(ConfigurationError):
        current_claim()


def test_a_claim_shows_what_people_look_for(world: World) -> None:
    """In a log a claim is its place and its fence, and never arguments or outcomes."""
    shown: list[str] = []
    block = run(world, lambda claim: shown.append(repr(claim.claim)), fingerprint={"card": "4111"})
    assert shown == [f"<Claim {SCOPE} 'A-1' fencing token {block.claim.fencing_token}, attempt 1>"]


def test_a_block_without_complete_is_completed_with_none(world: World) -> None:
    """A block that ends well has ended, with no outcome to show."""
    claim = run(world, lambda _: None)
    assert claim.outcome is None
    assert world.state() is State.COMPLETED
    assert run(world, lambda _: None).replayed


def test_a_block_that_raises_releases_its_claim(world: World) -> None:
    """The exception goes on, and the next block runs (F32)."""

    def body(_: Any) -> None:
        raise DeclinedError

    with pytest.raises(DeclinedError):
        run(world, body)
    assert world.state() is State.RELEASED
    assert run(world, lambda _: "done").outcome == "done"


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, StopIteration, StopAsyncIteration, GeneratorExit])
def test_a_block_lets_every_exception_go_on(monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]) -> None:
    """Also those that Python gives a meaning of their own, as `next(empty)` in the block does."""
    with world_on(monkeypatch, "blocking", 2) as world:
        error = kind()

        def body(_: Any) -> None:
            raise error

        with pytest.raises(kind) as caught:
            run(world, body)
        assert caught.value is error
        assert world.state() is State.RELEASED
        assert world.held() == 0


def test_an_asyncio_block_lets_stop_iteration_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """`next(empty)` in an `async with` block releases the claim and leaves the block as StopIteration."""
    with world_on(monkeypatch, "asyncio", 2) as world:
        error = StopIteration()

        async def block() -> bool:
            try:
                async with world.idem.aclaim(scope=SCOPE, key="A-1"):
                    raise error
            except StopIteration as caught:
                return caught is error
            return False

        assert world.driver(block())
        assert world.state() is State.RELEASED


def test_an_error_after_complete_keeps_the_record(world: World) -> None:
    """What was completed stays so; the exception goes on."""
    if world.runtime == "blocking":

        def block() -> None:
            with world.idem.claim(scope=SCOPE, key="A-1") as claim:
                assert claim.complete("done") == "done"
                raise DeclinedError
    else:

        async def block() -> None:  # type: ignore[misc]
            async with world.idem.aclaim(scope=SCOPE, key="A-1") as claim:
                assert await claim.complete("done") == "done"
                raise DeclinedError

    with pytest.raises(DeclinedError):
        world.drive(block)
    assert world.state() is State.COMPLETED
    assert run(world, lambda _: None).outcome == "done"


def test_completing_twice_is_an_error(world: World) -> None:
    """A second `complete` is refused, and the first one's outcome stands."""
    if world.runtime == "blocking":

        def block() -> None:
            with world.idem.claim(scope=SCOPE, key="A-1") as claim:
                claim.complete(1)
                claim.complete(2)
    else:

        async def block() -> None:  # type: ignore[misc]
            async with world.idem.aclaim(scope=SCOPE, key="A-1") as claim:
                await claim.complete(1)
                await claim.complete(2)

    with pytest.raises(ConfigurationError, match="already"):
        world.drive(block)
    assert run(world, lambda _: None).outcome == 1


def test_a_replay_cannot_be_completed(world: World) -> None:
    """A block that was handled before has nothing to complete and no claim."""
    run(world, lambda _: "done")
    replayed = run(world, lambda _: None)
    with pytest.raises(ConfigurationError, match="replay"):
        replayed.complete("again") if world.runtime == "blocking" else world.drive(replayed.complete, "again")
    with pytest.raises(ConfigurationError):
        _ = replayed.claim


def test_there_is_no_outcome_before_complete(world: World) -> None:
    """Nobody takes the None before `complete` for an outcome (F28)."""

    def body(claim: Any) -> str:
        with pytest.raises(ConfigurationError, match="no outcome"):
            _ = claim.outcome
        return "done"

    assert run(world, body).outcome == "done"


def test_there_is_no_outcome_where_none_was_recorded(world: World) -> None:
    """A `complete` that could not reach SQL raises, and leaves no outcome that could be sent on."""
    world.record_tier.down("finish")
    seen: list[Any] = []

    def body(claim: Any) -> str:
        seen.append(claim)
        return "done"

    with pytest.raises(StoreUnavailableError):
        run(world, body)
    with pytest.raises(ConfigurationError, match="no outcome"):
        _ = seen[0].outcome
    assert world.state() is State.RUNNING
    world.record_tier.up()
    world.pass_time(2)
    world.beat()
    assert run(world, lambda _: None).outcome == "done"


def test_a_block_in_progress_elsewhere_is_not_entered(world: World) -> None:
    """Nothing runs, and what was current before still is."""
    world.claim_elsewhere()
    with pytest.raises(InProgressError):
        run(world, lambda _: pytest.fail("it ran"))


def test_what_is_fingerprinted_is_the_callers_choice(world: World) -> None:
    """By default nothing is compared; data that is given must be the same."""
    run(world, lambda _: "done", fingerprint={"amount": 5})
    assert run(world, lambda _: None, fingerprint={"amount": 5}).outcome == "done"
    assert run(world, lambda _: None).outcome == "done"
    with pytest.raises(FingerprintMismatchError):
        run(world, lambda _: None, fingerprint={"amount": 6})


def test_a_superseded_block_has_the_outcome_that_was_recorded(world: World) -> None:
    """Its own value gives way, and so does its exception, which is announced (F58)."""

    def overtaken(_: Any) -> str:
        world.finish_elsewhere(world.take_over())
        return "mine"

    assert run(world, overtaken).outcome == "the other one"

    def fails(_: Any) -> str:
        world.finish_elsewhere(world.take_over("B-2"))
        raise DeclinedError

    assert run(world, fails, "B-2").outcome == "the other one"
    assert world.names() == [EventName.SUPERSEDED] * 2


def test_a_block_that_was_overtaken_has_lost_its_lease(world: World) -> None:
    """Whoever runs now decides; this one's message comes again."""

    def overtaken(_: Any) -> str:
        world.take_over()
        return "mine"

    with pytest.raises(LeaseLostError):
        run(world, overtaken)


def test_hold_leaves_a_block_that_raised_in_doubt(world: World) -> None:
    """The policy's fields are keywords here too (F55)."""

    def body(_: Any) -> None:
        raise DeclinedError

    with pytest.raises(DeclinedError):
        run(world, body, on_crash="hold")
    with pytest.raises(InDoubtError):
        run(world, lambda _: None, on_crash="hold")


def test_on_duplicate_holds_for_blocks(world: World) -> None:
    """`skip` replays None, `raise` raises with the outcome."""
    run(world, lambda _: "done", on_duplicate="raise")
    with pytest.raises(DuplicateError) as caught:
        run(world, lambda _: None, on_duplicate="raise")
    assert caught.value.outcome == "done"
    assert run(world, lambda _: None, on_duplicate="skip").outcome is None


def test_a_block_needs_a_key(world: World) -> None:
    """No key is an error before anything is claimed (F29)."""
    with pytest.raises(InvalidKeyError):
        run(world, lambda _: None, key="")


def test_a_block_is_entered_once(world: World) -> None:
    """A block that is entered again would run again under a claim that has ended."""
    claim = run(world, lambda _: "done")
    if world.runtime == "blocking":
        with pytest.raises(ConfigurationError, match="once"):
            claim.__enter__()
    else:
        with pytest.raises(ConfigurationError, match="once"):
            world.drive(claim.__aenter__)
    assert world.held() == 0


def test_an_asyncio_block_that_was_not_entered_says_so() -> None:
    """`complete` without `async with` is an error that names it."""
    block = Idempotency(store=MemoryStore()).aclaim(scope="s", key="A-1")
    with pytest.raises(ConfigurationError, match="not entered"):
        asyncio.run(block.complete(1))


def test_blocks_nest(world: World) -> None:
    """The inner block's claim is current in it only, also when it is a replay."""
    seen: list[str] = []

    def see() -> None:
        seen.append(current_claim().key)

    if world.runtime == "blocking":

        def block() -> None:
            with world.idem.claim(scope=SCOPE, key="A-1"):
                for _ in range(2):
                    with world.idem.claim(scope=SCOPE, key="B-2"):
                        see()
                    see()
    else:

        async def block() -> None:  # type: ignore[misc]
            async with world.idem.aclaim(scope=SCOPE, key="A-1"):
                for _ in range(2):
                    async with world.idem.aclaim(scope=SCOPE, key="B-2"):
                        see()
                    see()

    world.drive(block)
    assert seen == ["B-2", "A-1", "A-1", "A-1"]


def test_a_block_may_end_in_another_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """A web framework enters a dependency in one context and leaves it in another: it is recorded all the same."""
    with world_on(monkeypatch, "blocking", 2) as world:
        block = world.idem.claim(scope=SCOPE, key="A-1")
        contextvars.copy_context().run(block.__enter__)
        contextvars.copy_context().run(block.__exit__, None, None, None)
        assert world.state() is State.COMPLETED
        assert world.held() == 0


def test_a_generator_that_is_closed_in_its_block_releases_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator that waits in a block and is thrown away gives its claim back."""
    with world_on(monkeypatch, "blocking", 2) as world:

        def generator() -> Iterator[int]:
            with world.idem.claim(scope=SCOPE, key="A-1"):
                yield 1

        running = generator()
        next(running)
        assert world.state() is State.RUNNING
        cast(Any, running).close()
        assert world.state() is State.RELEASED


def test_an_async_generator_that_is_closed_in_its_block_is_not_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    """There nothing may be awaited any more: its lease runs out by itself."""
    with world_on(monkeypatch, "asyncio", 2) as world:

        async def generator() -> Any:
            async with world.idem.aclaim(scope=SCOPE, key="A-1"):
                yield 1

        async def main() -> None:
            running = generator()
            await anext(running)
            await running.aclose()

        world.driver(main())
        assert world.held() == 0
        assert world.state() is State.RUNNING


def test_a_cancelled_block_releases_its_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that is cancelled in its block is released and ends cancelled."""
    with world_on(monkeypatch, "asyncio", 2) as world:

        async def block(entered: asyncio.Event) -> None:
            async with world.idem.aclaim(scope=SCOPE, key="A-1"):
                entered.set()
                await asyncio.Event().wait()

        async def main() -> bool:
            entered = asyncio.Event()
            task = asyncio.ensure_future(block(entered))
            await entered.wait()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            return task.cancelled()

        assert world.driver(main())
        assert world.state() is State.RELEASED


def test_a_disabled_or_shadow_block_runs(world: World) -> None:
    """Turned off or in shadow a block always runs and shows its own outcome."""
    for n in (1, 2):
        assert run(world, ending(n), enabled=False).outcome == n
    assert run_sync(world.real.stats())[State.COMPLETED] == 0
    for n in (1, 2):
        assert run(world, ending(n), shadow=True).outcome == n
    assert run(world, lambda _: 3, key="", shadow=True).outcome == 3


def test_the_outcome_type_is_what_an_annotation_is_for_a_handler(world: World) -> None:
    """A block's outcome of a class comes back as that class."""

    @dataclasses.dataclass
    class Receipt:
        amount: int

    run(world, lambda _: Receipt(5), outcome_type=Receipt)
    assert run(world, lambda _: None, outcome_type=Receipt).outcome == Receipt(5)
