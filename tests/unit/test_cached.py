"""Duplicates of what this process has recorded or replayed are answered without a word to the store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from idem_tasks import Idempotency, MemoryStore, RedisStore, configure, current_claim, idempotent_task
from idem_tasks.claims import State
from idem_tasks.config import default_restored
from idem_tasks.errors import (
    ConfigurationError,
    DuplicateError,
    FingerprintMismatchError,
    InDoubtError,
    InProgressError,
    StoreUnavailableError,
)
from idem_tasks.events import Announcer, EventName
from idem_tasks.policy import LOCAL_CACHE_TTL
from idem_tasks.runtime import deadline_clock_from, run_sync
from idem_tasks.stores.base import journal_of, outbox_of, sql_records, steps_of, watermarks_of
from idem_tasks.stores.cached import cached
from idem_tasks.stores.local_cache import LocalCache
from tests.unit.batches import batching, messages, one_at_a_time, shipping
from tests.unit.scripted import LEASE, SCOPE, Scripted, World, away

SIZE = 3


@pytest.fixture
def world(world: World) -> Iterator[World]:
    """One whose handlers have a cache in their process."""
    senders = {"mail": world.sent.append}
    world.idem = Idempotency(store=world.idem.store, observers=[world.events.append], senders=senders, local_cache=SIZE)
    with deadline_clock_from(world.local):
        yield world


def asked(world: World, call: Callable[[], object]) -> list[str]:
    """Return what the tiers are asked for by this call."""
    tiers = [tier for tier in (world.marker, world.record_tier) if tier is not None]
    before = [len(tier.verbs) for tier in tiers]
    call()
    return [verb for tier, number in zip(tiers, before, strict=True) for verb in tier.verbs[number:]]


def by_a_person(world: World, verb: str, *args: Any, **options: Any) -> Any:
    """Call a verb for people of this runtime."""
    if world.runtime == "blocking":
        return getattr(world.idem, verb)(*args, **options)
    return world.drive(getattr(world.idem, f"a{verb}"), *args, **options)


def forget_elsewhere(world: World, key: str = "A-1") -> None:
    assert run_sync(world.real.forget(SCOPE, key))
    if world.marker is not None:
        run_sync(world.marker.real.drop([(SCOPE, key)]))


# What is answered.


def test_a_duplicate_of_what_was_recorded_here_asks_nobody(world: World) -> None:
    """The same outcome and the same event as ever."""
    charge = world.charge()
    assert charge("A-1") == "charged 5 for A-1"
    assert asked(world, lambda: charge("A-1")) == []
    assert [event.details for event in world.events if event.name is EventName.REPLAYED] == [{"state": "completed"}]
    assert charge("A-1") == "charged 5 for A-1"
    assert world.effects == ["A-1"]


def test_a_duplicate_of_what_was_replayed_here_asks_nobody(world: World) -> None:
    """The first one asks, the next do not."""
    world.finish_elsewhere(world.claim_elsewhere())
    charge = world.charge()
    assert asked(world, lambda: charge("A-1")) != []
    assert asked(world, lambda: charge("A-1")) == []
    assert charge("A-1") == "the other one"
    assert world.effects == []


def test_it_answers_while_every_store_is_away(world: World) -> None:
    """It needs none."""
    charge = world.charge()
    charge("A-1")
    world.record_tier.down()
    if world.marker is not None:
        world.marker.down()
    assert charge("A-1") == "charged 5 for A-1"
    with pytest.raises(StoreUnavailableError):
        charge("A-2")


def test_a_failure_that_is_final_is_answered(world: World) -> None:
    """As its own type, as from the store."""

    def refuse(order: str) -> None:
        world.effects.append(order)
        raise ValueError(f"{order} is refused")

    refused = world.task(refuse, record_failures=ValueError)
    for _ in range(2):
        with pytest.raises(ValueError, match="A-1 is refused"):
            refused("A-1")
    with pytest.raises(ValueError, match="A-1 is refused") as error:
        assert asked(world, lambda: refused("A-1")) == []
    assert type(error.value) is ValueError
    assert world.effects == ["A-1"]


def test_every_duplicate_gets_an_object_of_its_own(world: World) -> None:
    """What one caller does to the outcome no other sees."""

    def items(order: str) -> list[str]:
        return [order]

    listed = world.task(items)
    for _ in range(3):
        outcome = listed("A-1")
        assert outcome == ["A-1"]
        outcome.append("changed by its caller")


def test_what_a_duplicate_gets_is_the_policys_to_say(world: World) -> None:
    """One handler recorded it, and each replays in its own way."""
    world.charge()("A-1")
    assert world.charge(on_duplicate="skip")("A-1") is None
    with pytest.raises(DuplicateError) as raised:
        world.charge(on_duplicate="raise")("A-1")
    assert raised.value.outcome == "charged 5 for A-1"


def test_other_arguments_are_a_mismatch(world: World) -> None:
    """By the record, which is asked: what this process kept may have been forgotten elsewhere."""
    charge = world.charge()
    charge("A-1", 5)
    with pytest.raises(FingerprintMismatchError):
        charge("A-1", 6)
    forget_elsewhere(world)
    assert charge("A-1", 6) == "charged 6 for A-1"
    assert charge("A-1", 6) == "charged 6 for A-1"
    assert world.effects == ["A-1", "A-1"]


def test_the_least_recently_used_goes_first(world: World) -> None:
    """It is asked for again then."""
    charge = world.charge()
    for order in ("A-1", "A-2", "A-3", "A-1", "A-4"):
        charge(order)
    asking = {order: asked(world, partial(charge, order)) != [] for order in ("A-1", "A-3", "A-4", "A-2")}
    assert asking == {"A-1": False, "A-3": False, "A-4": False, "A-2": True}


def test_a_duplicate_sends_no_messages(world: World) -> None:
    """They are in the outbox, and what is kept has none."""

    def order(order: str) -> None:
        current_claim().publish_message({"order": order}, to="mail")

    ordered = world.task(order)
    ordered("A-1")
    assert asked(world, lambda: ordered("A-1")) == []
    assert [message.body for message in world.sent] == [{"order": "A-1"}]


# What is not answered, or not for long.


def test_what_others_forgot_is_answered_for_its_time_and_no_longer(world: World) -> None:
    """This is what is given up: a minute, unless something else is said."""
    charge = world.charge()
    charge("A-1")
    forget_elsewhere(world)
    world.pass_time(LOCAL_CACHE_TTL - 1)
    assert charge("A-1") == "charged 5 for A-1"
    assert world.effects == ["A-1"]
    world.pass_time(1)
    assert charge("A-1") == "charged 5 for A-1"
    assert world.effects == ["A-1"] * 2


def test_what_is_forgotten_here_runs_again_at_once(world: World) -> None:
    """Through the same `Idempotency`, in whichever runtime."""
    charge = world.charge()
    charge("A-1")
    assert by_a_person(world, "forget", SCOPE, "A-1")
    charge("A-1")
    assert world.effects == ["A-1"] * 2


def test_forgetting_that_is_unfinished_is_heard_too(world: World) -> None:
    """The reply was lost, and the record is gone all the same."""
    charge = world.charge()
    charge("A-1")
    world.record_tier.after("forget", away())
    with pytest.raises(StoreUnavailableError):
        by_a_person(world, "forget", SCOPE, "A-1")
    assert asked(world, lambda: charge("A-1")) != []


def test_what_is_forgotten_while_its_answer_is_on_its_way_is_not_kept(world: World) -> None:
    """A duplicate asked before a person forgot the record, and hears after it."""
    world.finish_elsewhere(world.claim_elsewhere())
    charge = world.charge()
    store = world.idem.services("blocking").store

    async def forget() -> None:
        await store.forget(SCOPE, "A-1")

    world.record_tier.after("claim", forget)
    assert charge("A-1") == "the other one"
    if world.marker is not None:
        run_sync(world.marker.real.drop([(SCOPE, "A-1")]))  # published after it, as without a cache
    assert charge("A-1") == "charged 5 for A-1"


def test_what_is_resolved_here_is_heard_at_once(world: World) -> None:
    """A person's word counts from the moment it is given."""
    charge = world.charge(on_crash="hold")
    world.claim_elsewhere(on_crash="hold")
    world.pass_time(LEASE + 1)
    with pytest.raises(InDoubtError):
        charge("A-1")
    by_a_person(world, "resolve", SCOPE, "A-1", outcome="paid by hand")
    assert charge("A-1") == "paid by hand"
    assert asked(world, lambda: charge("A-1")) == []


def test_what_is_purged_is_not_kept(world: World) -> None:
    """Also where the store's clock says that retention is over, and this process's does not."""
    charge = world.charge(retention=100, max_hold=60, lease=60)
    charge("A-1")
    world.clock.advance(1000)
    run_sync(world.idem.services("blocking").store.purge(limit=10, grace=0.0))
    charge("A-1")
    assert world.effects == ["A-1"] * 2


def test_nothing_is_answered_while_it_is_in_progress_in_doubt_or_parked(world: World) -> None:
    """None of them is an outcome."""
    charge = world.charge()
    lease = world.claim_elsewhere()
    for _ in range(2):
        with pytest.raises(InProgressError):
            charge("A-1")
    world.release_elsewhere(lease)
    assert charge("A-1") == "charged 5 for A-1"


def test_a_handler_that_raised_runs_again(world: World) -> None:
    """Nothing is recorded of it, so nothing is kept."""

    def fails_once(order: str) -> str:
        world.effects.append(order)
        if len(world.effects) == 1:
            raise ValueError("no")
        return "at last"

    charge = world.task(fails_once)
    with pytest.raises(ValueError, match="no"):
        charge("A-1")
    assert charge("A-1") == "at last"


def test_an_outcome_that_could_not_be_recorded_is_not_kept(world: World) -> None:
    """It is pending, and never replayed before it is in its record."""
    charge = world.charge(lease=1, max_hold=60)
    world.record_tier.down("finish", "write_through")
    with pytest.raises(StoreUnavailableError):
        charge("A-1")
    with pytest.raises((StoreUnavailableError, InProgressError)):
        charge("A-1")
    world.record_tier.up()
    world.pass_time(30)
    world.beat()
    assert world.state() is State.COMPLETED
    assert charge("A-1") == "charged 5 for A-1"
    assert asked(world, lambda: charge("A-1")) == []
    assert world.effects == ["A-1"]


@pytest.mark.parametrize("policy", [{"shadow": True}, {"enabled": False}])
def test_what_is_turned_off_runs_each_time(world: World, policy: dict[str, bool]) -> None:
    """In shadow nothing is kept either, and what others keep is not answered there."""
    charge = world.charge(**policy)
    charge("A-1")
    assert world.charge()("A-1") == "charged 5 for A-1"
    kept = len(world.effects)
    charge("A-1")
    assert len(world.effects) == kept + 1


def test_who_asks_again_asks_the_store(world: World) -> None:
    """He may have been granted what he asked for, and has to give that back."""
    store = world.idem.services("blocking").store
    request = world.request()
    world.charge()("A-1")
    assert asked(world, lambda: run_sync(store.claim(request))) == []
    assert asked(world, lambda: run_sync(store.claim(request.again()))) != []


# Batches.


@pytest.mark.parametrize("made", [batching, one_at_a_time])
def test_a_batch_asks_only_for_what_is_not_known(world: World, made: Callable[[World], World]) -> None:
    """And what it records or hears is known from then on."""
    ship = shipping(made(world))
    world.finish_elsewhere(world.claim_elsewhere("A-2"))
    assert ship(messages("A-1", "A-2", "A-3")) == ["shipped A-1", "the other one", "shipped A-3"]
    assert asked(world, lambda: ship(messages("A-2", "A-3", "A-1", "A-2"))) == []
    assert ship(messages("A-4", "A-1")) == ["shipped A-4", "shipped A-1"]
    assert world.effects == ["A-1", "A-3", "A-4"]


# Threads, event loops, and what else a store can do.


def test_threads_and_event_loops_share_it() -> None:
    """What one has recorded, all others of the process answer."""
    store: Any = Scripted(MemoryStore())
    idem = Idempotency(store=store, observers=[], local_cache=100)
    idem.run(str, "done", scope=SCOPE, key="A-1")
    verbs = list(store.verbs)

    async def handler(value: str) -> str:
        return value

    def blocking(number: int) -> str:
        return idem.run(str, "done", scope=SCOPE, key="A-1")

    def loop(number: int) -> str:
        return asyncio.run(idem.arun(handler, "done", scope=SCOPE, key="A-1"))

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(blocking, range(100))) == set(threads.map(loop, range(20))) == {"done"}
    assert store.verbs == verbs


def test_what_a_store_cannot_do_it_cannot_do_behind_a_cache() -> None:
    """It is asked for by attributes that are there or not."""
    cache = LocalCache(1, 60.0)
    plain, able = cached(RedisStore("redis://nowhere.example"), cache), cached(MemoryStore(), cache)
    assert outbox_of(plain) is None
    assert outbox_of(able) is not None
    assert run_sync(journal_of(able).steps(SCOPE, "A-1")) == run_sync(steps_of(plain, SCOPE, "A-1")) == []
    for what in (journal_of, watermarks_of, sql_records):
        with pytest.raises(ConfigurationError):
            what(plain)


def test_it_is_off_unless_it_is_asked_for() -> None:
    """The store itself is used then; with it, the store that was given is still shown."""
    store = MemoryStore()
    assert Idempotency(store=store).services("blocking").store is store
    with_cache = Idempotency(store=store, local_cache=1)
    assert with_cache.store is store
    assert with_cache.services("blocking").store is not store


def test_configure_and_urls_take_it() -> None:
    """A wrong size or time is refused when it is given."""
    with default_restored():
        idem = configure(database_url="sqlite://", local_cache=10, local_cache_ttl=5)
        runs: list[str] = []

        @idempotent_task(key="{order}", scope=SCOPE)
        def charge(order: str) -> None:
            runs.append(order)

        charge("A-1")
        assert run_sync(idem.store.on("blocking", Announcer(())).forget(SCOPE, "A-1"))
        charge("A-1")
        assert runs == ["A-1"]
        idem.close()
    with pytest.raises(ConfigurationError, match="local_cache=-1"):
        Idempotency(store=MemoryStore(), local_cache=-1)
    with pytest.raises(ConfigurationError, match="local_cache_ttl"):
        Idempotency.from_urls(database_url="sqlite://", local_cache_ttl=-1)


def test_what_a_later_try_finds_recorded_is_asked_for(world: World) -> None:
    """The first try may have recorded it long ago, and its retention may be over: only the store knows."""
    world.record_tier.after("finish", away())
    charge = world.charge()
    assert charge("A-1") == "charged 5 for A-1"
    assert world.record_tier.verbs.count("finish") == 2
    assert asked(world, lambda: charge("A-1")) != []
    assert asked(world, lambda: charge("A-1")) == []


def test_what_a_batchs_later_try_finds_recorded_is_asked_for(world: World) -> None:
    """As with one message."""
    ship = shipping(batching(world))
    world.record_tier.after("finish_batch", away())
    assert ship(messages("A-1", "A-2")) == ["shipped A-1", "shipped A-2"]
    assert asked(world, lambda: ship(messages("A-1", "A-2"))) != []
    assert asked(world, lambda: ship(messages("A-1", "A-2"))) == []
    assert world.effects == ["A-1", "A-2"]


def test_no_more_doubts_are_kept_than_outcomes(world: World) -> None:
    """A store that is away for long costs no memory."""
    cache = LocalCache(SIZE, 60.0, world.local)
    cache.doubt(f"owner-{number}" for number in range(SIZE + 1))
    assert [cache.doubts(f"owner-{number}") for number in range(SIZE + 1)] == [False, True, True, True]
