"""What a crash of PostgreSQL forgets where commits of claims are not waited for, and what becomes of their calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from idem_tasks import Idempotency, Policy, RedisStore, SQLStore, TieredStore
from idem_tasks.claims import ClaimRequest, Granted, Recorded, State, new_owner
from idem_tasks.errors import ConfigurationError, InProgressError
from idem_tasks.events import Announcer
from idem_tasks.runtime import run_sync
from idem_tasks.testing.store_in_use import DONE
from tests.integration.sql_proxy import Proxy
from tests.services.postgres_server import PostgresServer

Start = Callable[..., PostgresServer]

SLOW = {"wal_writer_delay": "10s"}
"""What is not waited for stays in the server's memory for so long, in which a crash forgets it."""


def crash(server: PostgresServer) -> None:
    server.kill()
    server.start()


@pytest.mark.parametrize(
    "commit, marked, on_crash, is_forgotten",
    [
        ("durable", True, "rerun", False),
        ("auto", True, "rerun", True),
        ("auto", False, "rerun", False),
        ("auto", True, "hold", False),
        ("async", False, "rerun", True),
        ("async", True, "hold", False),
    ],
)
def test_only_what_may_be_lost_is_not_waited_for(
    private_postgres: Start, commit: Any, marked: bool, on_crash: Any, is_forgotten: bool
) -> None:
    """A crash right after the claim: under `hold`, and where nothing else keeps others off, it is on the disk."""
    server = private_postgres(**SLOW)
    store = SQLStore(server.url, create_schema=True, claim_commit=commit).on("blocking", Announcer(()))
    run_sync(store.prepare())
    request = ClaimRequest("shop.charge", "A-1", None, new_owner(), Policy(on_crash=on_crash))
    claimed = run_sync(store.claim(replace(request, marked=marked)))
    assert isinstance(claimed, Granted)
    crash(server)
    record = run_sync(store.get("shop.charge", "A-1"))
    assert record is None if is_forgotten else record is not None and record.state is State.RUNNING
    # Either way its outcome is recorded, by the same finish.
    assert run_sync(store.finish(claimed.lease, DONE, may_insert=True)) == Recorded()
    crash(server)
    record = run_sync(store.get("shop.charge", "A-1"))
    assert record is not None
    assert (record.state, record.outcome) == (State.COMPLETED, DONE.body)
    run_sync(store.close())


def test_a_forgotten_claim_is_still_kept_by_its_marker(private_postgres: Start, redis_url: str) -> None:
    """In mid-handler the server forgets it: others hear that it is in progress, and then get its outcome."""
    server = private_postgres(**SLOW)
    store = TieredStore(RedisStore(redis_url), SQLStore(server.url, create_schema=True, claim_commit="auto"))
    effects: list[str] = []

    def charge(order: str) -> str:
        crash(server)
        with pytest.raises(InProgressError):
            deliver(order)
        effects.append(order)
        return f"charged {order}"

    with Idempotency(store=store, observers=[]) as idempotency:

        def deliver(order: str) -> Any:
            return idempotency.run(charge, order, scope="shop.charge", key=order)

        idempotency.prepare()
        assert [deliver("A-1"), deliver("A-1")] == ["charged A-1"] * 2
        record = idempotency.get("shop.charge", "A-1")
        assert record is not None
        assert record.state is State.COMPLETED
    assert effects == ["A-1"]


def test_it_is_one_round_trip_all_the_same(postgres_url: str) -> None:
    """The setting travels with the claim."""
    with Proxy(postgres_url) as proxy:
        store = SQLStore(proxy.url, create_schema=True, claim_commit="async").on("blocking", Announcer(()))
        run_sync(store.prepare())
        before = proxy.round_trips
        for number in range(20):
            request = ClaimRequest("shop.charge", f"A-{number}", None, new_owner(), Policy())
            assert isinstance(run_sync(store.claim(request)), Granted)
        assert proxy.round_trips - before <= 20 + 1  # and one that prepares the statement
        run_sync(store.close())


def test_another_word_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="claim_commit='lazy' is none of 'durable', 'auto' and 'async'"):
        SQLStore("sqlite://", claim_commit="lazy")  # type: ignore[arg-type] # what a type checker would see
