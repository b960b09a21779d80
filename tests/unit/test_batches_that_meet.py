"""Batches that overlap, stopped at every round trip: killed, paused, struck, with lost commands and lost replies."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Coroutine, Generator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from idem_tasks import MemoryStore, Policy, TieredStore
from idem_tasks.batch import perform_batch
from idem_tasks.batch_members import Batch, members_of
from idem_tasks.call import Call, Services
from idem_tasks.claims import ClaimRequest, current_claims, new_owner
from idem_tasks.errors import BatchError, InDoubtError, StoreUnavailableError, comes_again
from idem_tasks.events import Announcer
from idem_tasks.outcomes import UNANNOTATED, JsonCodec
from idem_tasks.runtime import deadline_clock_from, run_sync
from idem_tasks.stores.memory_marker import MemoryMarker
from idem_tasks.testing import ManualClock
from idem_tasks.testing.explorer.processes import KilledError, Runtime, SoftLimitError, StillHeartbeat
from idem_tasks.testing.stepped import Step, stepped_marker, stepped_record

LEASE = 60.0
STEPS = 2000
"""Steps after which an execution is taken to go round in a circle."""

BATCHES = (("A", "B", "C"), ("C", "B", "D"), ("D", "A", "A"))
FAULTS = ("killed", "paused", "lost", "lost", "soft limit")


class Stop:
    """Suspends a worker at a step."""

    def __init__(self, step: Step) -> None:
        self._step = step

    def __await__(self) -> Generator[Step, BaseException | None, None]:
        struck = yield self._step
        if struck is not None:
            raise struck


class Shop:
    """Records and markers that workers share, and what they have done."""

    def __init__(self, clock: ManualClock, tiers: int, policy: Policy) -> None:
        self.clock = clock
        self.record = MemoryStore(clock)
        self.marker = MemoryMarker(clock) if tiers == 2 else None
        self.policy = policy
        self.effects: Counter[str] = Counter()
        self.told: dict[str, set[str]] = defaultdict(set)

    def tell(self, keys: tuple[str, ...], results: list[Any]) -> bool:
        """Note the outcomes that a caller got; returns whether all of its messages are settled."""
        for key, result in zip(keys, results, strict=True):
            if not isinstance(result, BaseException):
                self.told[key].add(result)
        return not any(isinstance(result, BaseException) and comes_again(result) for result in results)


class Worker:
    """A process with a batch: it stops at every round trip, or at none."""

    def __init__(self, shop: Shop, name: str, keys: tuple[str, ...], *, stops: bool = True) -> None:
        self.shop = shop
        self.name = name
        self.keys = keys
        self.dead = False
        self.stops = stops
        store: Any = stepped_record(shop.record, self.reach)
        if shop.marker is not None:
            store = TieredStore(stepped_marker(shop.marker, self.reach), store)
        announce = Announcer(())
        runtime: Any = Runtime(self)  # type: ignore[arg-type] # all that it needs of a worker
        services = Services(store, StillHeartbeat(store, announce), announce, JsonCodec(), runtime)

        def call_of(key: str) -> Call:
            request = ClaimRequest("meet", key, None, new_owner(), shop.policy, name)
            return Call(request, services, lambda: UNANNOTATED)

        self.batch = Batch(members_of(keys, call_of), services, self.handle)
        self.story: Coroutine[Step, BaseException | None, list[Any]] = perform_batch(self.batch)

    async def reach(self, step: Step) -> bool:
        if self.dead:
            raise KilledError
        if step.tier == "clock":
            self.shop.clock.advance(float(step.answer))
        if self.stops:
            await Stop(step)
        return False

    async def handle(self, keys: list[str]) -> list[str]:
        assert [claim.key for claim in current_claims()] == keys
        outcomes = []
        for key in keys:
            await self.reach(Step("handler", key, "before"))
            self.shop.effects[key] += 1
            outcomes.append(f"{self.name} did {key}")
        await self.reach(Step("handler", "its end", "before"))
        return outcomes


def explore(shop: Shop, schedule: list[int]) -> int:
    """Let the workers go on as the schedule says, and then in turn; returns how many faults there were."""
    workers = [Worker(shop, f"worker {number}", keys) for number, keys in enumerate(BATCHES)]
    at: dict[Worker, Step | None] = dict.fromkeys(workers)
    faults = 0
    for turn in range(STEPS):
        if not at:
            return faults
        drawn = schedule[turn] if turn < len(schedule) else 99 * len(workers) + turn
        worker = list(at)[drawn % len(at)]
        fault = FAULTS[drawn // 8] if drawn // 8 < len(FAULTS) else ""
        step = at[worker]
        struck: BaseException | None = None
        if step is not None and fault:
            faults += 1
            match fault:
                case "paused":
                    shop.clock.advance(LEASE + 1)
                case "killed":
                    worker.dead, struck = True, KilledError()
                case "soft limit":
                    struck = SoftLimitError()
                case _ if step.tier in ("record", "marker"):
                    struck = StoreUnavailableError("lost")
        try:
            at[worker] = worker.story.send(struck if step is not None else None)
        except StopIteration as ended:
            shop.tell(worker.keys, ended.value)
        except BatchError as error:
            shop.tell(worker.keys, error.results)
        except (KilledError, SoftLimitError):
            pass
        else:
            continue
        del at[worker]
    raise AssertionError("it never ends")


def redeliver(shop: Shop) -> list[Any]:
    """Deliver all batches until each message is settled, with nothing in their way; returns all results."""
    found: list[Any] = []
    for number, keys in enumerate(BATCHES):
        results: list[Any] = []
        for _ in range(4):
            shop.clock.advance(LEASE + 1)
            worker = Worker(shop, f"the last worker {number}", keys, stops=False)
            try:
                results = run_sync(perform_batch(worker.batch))
            except BatchError as error:
                results = error.results
            worker.story.close()
            if shop.tell(keys, results):
                break
        else:
            raise AssertionError(f"{results} and never settled")
        found += results
    return found


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("tiers", [1, 2])
@pytest.mark.parametrize("on_crash", ["rerun", "hold"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schedule=st.lists(st.integers(0, 160), max_size=60))
def test_every_message_keeps_its_promise(tiers: int, on_crash: Any, schedule: list[int]) -> None:
    """Each key has one outcome for all who ask, under `hold` at most one effect, else one more for each fault at most;
    and once nothing is in the way every message is settled (F1, F38, F66)."""  # noqa: D205, D209
    clock = ManualClock()
    policy = Policy(lease=LEASE, on_crash=on_crash, max_crashes=None, cache_ttl=3600)
    with deadline_clock_from(clock):
        shop = Shop(clock, tiers, policy)
        faults = explore(shop, schedule)
        results = redeliver(shop)
    if on_crash == "hold":
        assert max(shop.effects.values(), default=0) <= 1
        assert all(isinstance(result, str | InDoubtError) for result in results)
    else:
        assert all(isinstance(result, str) for result in results)
        assert max(shop.effects.values()) <= 1 + faults
        assert min(shop.effects.values()) >= 1
    for key, told in shop.told.items():
        assert len(told) == 1, (key, told)
