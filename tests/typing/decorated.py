"""Type-checked, never run: what a type checker knows of decorated handlers, blocks and policies.

An `ignore` that is not needed is an error too, so each one says what a type checker has to refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from datetime import timedelta
from typing import Any, assert_type

from idem_tasks import (
    Claim,
    Idempotency,
    IdempotentFunction,
    MemoryStore,
    Policy,
    Record,
    SQLStore,
    State,
    Store,
    configure,
    current_claim,
    current_claims,
    idempotency_of,
    idempotent_batch,
    idempotent_task,
    log_event,
    store_from_url,
)

idem = Idempotency(store=MemoryStore(), observers=[log_event])


# A function keeps its parameters and what it returns.


@idempotent_task(key="{order}")
def charge(order: str, amount: int = 5, *, note: str | None = None) -> float:
    return amount * 1.0


assert_type(charge("A-1"), float)
assert_type(charge("A-1", 6, note="n"), float)
charge(17)  # type: ignore[arg-type]
charge("A-1", note=5)  # type: ignore[arg-type]
charge()  # type: ignore[call-arg]
charge("A-1", colour="red")  # type: ignore[call-arg]
handler: Callable[[str], float] = charge


@idempotent_task(key=lambda order, amount: f"{order}/{amount}", scope="{order}/charge", fingerprint=["order"])
async def charge_later(order: str, amount: int) -> list[str]:
    return [order]


started: Callable[[str, int], Coroutine[Any, Any, list[str]]] = charge_later


async def main() -> None:
    assert_type(await charge_later("A-1", amount=5), list[str])
    await charge_later("A-1")  # type: ignore[call-arg]


# So do methods.


class Shop:
    @idempotent_task(key="{self.name}/{order}", fingerprint=None)
    def charge(self, order: str) -> int:
        return 1

    @idempotent_task(key="{order}")
    async def charge_later(self, order: str) -> int:
        return 1

    @staticmethod
    @idempotent_task(key="{order}")
    def fixed(order: str) -> int:
        return len(order)

    @classmethod
    @idempotent_task(key="{order}")
    def made(cls, order: str) -> int:
        return len(order)


assert_type(Shop().charge("A-1"), int)
assert_type(Shop.charge(Shop(), "A-1"), int)
started_method: Callable[[str], Coroutine[Any, Any, int]] = Shop().charge_later
assert_type(Shop().fixed("A-1"), int)
assert_type(Shop.made("A-1"), int)
Shop().charge(5)  # type: ignore[arg-type]


# A handler of many messages returns a list or a mapping, and its caller gets a list.


@idempotent_batch(key="{message}", scope=str, fingerprint=None, lease=60)
def ship(orders: list[str]) -> list[int]:
    return [len(order) for order in orders]


@idempotent_batch(key=str)
def ship_by_key(orders: list[str], *, session: object = None) -> dict[str, float | Exception]:
    return dict.fromkeys(orders, 1.0)


@idempotent_batch(key="{message[id]}")
async def ship_later(orders: list[dict[str, str]]) -> Mapping[str, bool]:
    return {order["id"]: True for order in orders}


@idempotent_batch(key="{message[id]}")
async def list_later(orders: list[dict[str, str]]) -> tuple[bool, ...]:
    return tuple(True for _ in orders)


assert_type(ship(["A"]), list[int])
assert_type(ship_by_key(["A"]), list[float | Exception])
ship("A")  # type: ignore[arg-type]
idempotent_batch(key="{message}", fingerprint=["id"])  # type: ignore[arg-type]
idempotent_batch(scope="s")  # type: ignore[call-arg]


@idempotent_batch(key="{message}")  # type: ignore[arg-type]
def ships_nothing(orders: list[str]) -> int:
    return len(orders)


async def batches() -> None:
    assert_type(await ship_later([{"id": "A"}]), list[bool])
    assert_type(await list_later([]), list[bool])
    assert_type(await idem.arun_batch(ship_all_later, ["A"], scope="s", key=str), list[int])


async def ship_all_later(orders: list[str]) -> list[int]:
    return [len(order) for order in orders]


def ship_all(orders: list[str]) -> dict[str, int]:
    return {order: len(order) for order in orders}


assert_type(idem.run_batch(ship_all, ["A"], scope="s", key="{message}"), list[int])
idem.run_batch(ship_all, ["A"], scope="s")  # type: ignore[call-arg]
assert_type(current_claims(), list[Claim])


# The policy's fields are keywords with their types.


idempotent_task(key="{order}", lease=60, retention=timedelta(days=7), on_crash="hold", safe_to_retry=(OSError,))
idempotent_task(key="{order}", record_failures=ValueError, max_attempts=None, shadow=True, policy=Policy(lease=5))
idempotent_task(key="{order}", lease="long")  # type: ignore[arg-type]
idempotent_task(key="{order}", on_crash="ignore")  # type: ignore[arg-type]
idempotent_task(key="{order}", leese=60)  # type: ignore[call-arg]
idempotent_task(key="{order}", record_failures=KeyboardInterrupt)  # type: ignore[arg-type]
idempotent_task(scope="s")  # type: ignore[call-arg]
idempotent_task("{order}")  # type: ignore[arg-type, call-arg]
configure(database_url="sqlite://", lease=timedelta(minutes=1), on_duplicate="raise")
configure(leese=60)  # type: ignore[call-arg]
assert_type(configure(store=MemoryStore()), Idempotency)


# Without the decorator.


def double(number: int) -> int:
    return 2 * number


async def double_later(number: int) -> int:
    return 2 * number


assert_type(idem.run(double, 1, scope="s", key=1), int)
idem.run(double, 1, key=1)  # type: ignore[call-arg]


async def by_hand() -> None:
    assert_type(await idem.arun(double_later, 1, scope="s", key="k"), int)
    await idem.arun(double, 1, scope="s", key="k")  # type: ignore[arg-type]
    assert_type(await current_claim().step("double", double_later, 1), int)
    async with idem.aclaim(scope="s", key="k", lease=5, outcome_type=int) as block:
        assert_type(block.replayed, bool)
        assert_type(block.claim, Claim)
        await block.complete(1)
    assert_type(await idem.aget("s", "k"), Record | None)


with idem.claim(scope="s", key="k", fingerprint={"a": 1}) as block:
    block.complete(1)
    assert_type(block.outcome, Any)
assert_type(idem.get("s", "k"), Record | None)
assert_type(idem.forget("s", "k"), bool)
assert_type(idem.resolve("s", "k", rerun=True), Record | None)
assert_type(idem.stats(), dict[State, int])
assert_type(idem.purge(batch=10), int)
assert_type([record.key for record in idem.records(state="parked")], list[str])


# What is at hand, and what is known.


assert_type(current_claim(), Claim)
assert_type(current_claim().fencing_token, int)
assert_type(current_claim().lost, bool)
assert_type(current_claim().provider_key("charge"), str)
assert_type(current_claim().step("double", double, 1), int)
current_claim().step("double", double, "1")  # type: ignore[arg-type]
assert_type(idempotency_of(charge), IdempotentFunction)
assert_type(idempotency_of(charge).key_for("A-1"), str)
stores: list[Store] = [MemoryStore(), SQLStore("sqlite://"), store_from_url("memory://")]
