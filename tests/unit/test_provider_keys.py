"""The key that a handler gives a provider: the same at every attempt, and nobody else's."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, cast

import pytest
from hypothesis import given, strategies as st

from idem_tasks import ConfigurationError, Idempotency, MemoryStore, Policy, StoreUnavailableError, current_claim
from idem_tasks.claims import Claim, ClaimRequest, Lease, new_owner
from idem_tasks.testing import ManualClock


def claim_of(scope: str = "shop.charge", key: str = "A-1", generation: int = 1) -> Claim:
    request = ClaimRequest(scope, key, None, new_owner(), Policy())
    return Claim(Lease(request, 7, generation=generation), cast(Any, None), asked_at=0.0)


def test_it_never_changes() -> None:
    """A newer version of this library gives the provider the same key, or it would charge again (F15, F19)."""
    assert claim_of().provider_key("charge") == "idem-6ee2ebf74225503553bbcb1699a4c528"


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=60)


@given(TEXT, TEXT, TEXT, st.integers(1, 10))
def test_it_can_be_sent_in_a_header(scope: str, key: str, step: str, generation: int) -> None:
    """Whatever it is made of, it is 37 plain characters; Stripe and others take 255."""
    assert re.fullmatch(r"idem-[0-9a-f]{32}", claim_of(scope, key, generation).provider_key(step))


def test_it_differs_with_everything_it_is_made_of() -> None:
    """Another step, key, scope or generation has another key, wherever one of them ends and the next begins."""
    made = [
        claim_of().provider_key("charge"),
        claim_of().provider_key("mail"),
        claim_of(key="A-2").provider_key("charge"),
        claim_of(scope="shop.refund").provider_key("charge"),
        claim_of(generation=2).provider_key("charge"),
        claim_of("a", "bc").provider_key("d"),
        claim_of("ab", "c").provider_key("d"),
        claim_of("a", "b").provider_key("cd"),
        claim_of("a", "b1").provider_key("1d"),
        claim_of("a", "b", 11).provider_key("d"),
    ]
    assert len(set(made)) == len(made)


@pytest.mark.parametrize("step", ["", None, 7, "\0", "\ud800", "é" * 128])
def test_a_step_needs_a_name(step: str) -> None:
    """A step without a name, or with one that no database keeps, is a mistake that is told before any request."""
    with pytest.raises(ConfigurationError, match="a step is named by"):
        claim_of().provider_key(step)


def keys_of(idem: Idempotency, attempts: int, key: str = "A-1", **policy: Any) -> list[str]:
    """The provider keys that so many attempts of a handler make, all but the last of which fail."""
    made: list[str] = []

    def handler() -> None:
        made.append(current_claim().provider_key("charge"))
        if len(made) < attempts:
            raise TimeoutError

    for _ in range(attempts):
        try:
            idem.run(handler, scope="s", key=key, policy=Policy(**policy))
        except TimeoutError:
            continue
    return made


def test_every_attempt_has_the_same() -> None:
    """Until the record's retention is over: then it is another piece of work, and has another one (F15)."""
    clock = ManualClock()
    idem = Idempotency(store=MemoryStore(clock), observers=[])
    first = keys_of(idem, 3, retention=60)
    assert first == [first[0]] * 3
    clock.advance(100_000)
    second = keys_of(idem, 2, retention=60)
    assert second == [second[0]] * 2
    assert second[0] != first[0]


class Away(MemoryStore):
    async def claim(self, request: ClaimRequest) -> None:  # type: ignore[override]
        raise StoreUnavailableError("away")


@pytest.mark.parametrize(
    "store, policy",
    [(MemoryStore, {"shadow": True}), (MemoryStore, {"enabled": False}), (Away, {"on_store_unavailable": "run"})],
    ids=["shadow", "disabled", "without its store"],
)
def test_unprotected_runs_have_the_same_too(store: Callable[[], MemoryStore], policy: dict[str, Any]) -> None:
    """A handler that runs whatever happens still gives its provider the key of the first generation (F15)."""
    made = keys_of(Idempotency(store=store(), observers=[]), 2, **policy)
    assert made == [claim_of("s", "A-1").provider_key("charge")] * 2


def test_without_a_usable_key_each_delivery_has_its_own() -> None:
    """In shadow a message without a key runs as if undecorated: it must not share a provider's key with others."""
    idem = Idempotency(store=MemoryStore(), observers=[])
    made = keys_of(idem, 2, key="", shadow=True)
    assert len(set(made)) == 2
