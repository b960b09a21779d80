"""Any sequence of verbs is answered by every store as `MemoryStore` answers it."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings, strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from idem_tasks.claims import (
    AuditEntry,
    ClaimRequest,
    EncodedOutcome,
    Finished,
    Granted,
    InProgress,
    Lease,
    Release,
    State,
    new_owner,
)
from idem_tasks.errors import IdemTasksError
from idem_tasks.events import Announcer
from idem_tasks.policy import Policy
from idem_tasks.runtime import run_sync
from idem_tasks.stores.base import Store
from idem_tasks.stores.memory import MemoryStore
from idem_tasks.stores.memory_marker import MemoryMarker
from idem_tasks.stores.redis import RedisStore
from idem_tasks.stores.sql import SQLStore
from idem_tasks.stores.tiered import TieredStore
from idem_tasks.testing.driver import PATIENCE

T = TypeVar("T")

BRIEF = 0.1
"""Seconds: the shortest lease there is. Everything else in here takes no time."""

KEYS = st.sampled_from(["a", "A"])
OUTCOMES = st.sampled_from(
    [
        EncodedOutcome(body=b"1", codec="json"),
        EncodedOutcome(body=b"", codec="json+zlib"),
        EncodedOutcome(not_kept="too_large"),
        EncodedOutcome(State.FAILED, error_type="shop.Declined", error_message="no"),
    ]
)
RELEASES = st.builds(
    Release,
    failed=st.booleans(),
    in_doubt=st.booleans(),
    error_type=st.sampled_from([None, "KeyError"]),
    error_message=st.sampled_from([None, "'x'"]),
)
POLICIES = st.builds(
    Policy,
    on_crash=st.sampled_from(["rerun", "hold"]),
    max_attempts=st.sampled_from([None, 1, 2]),
    max_crashes=st.sampled_from([None, 0, 1]),
)


@dataclasses.dataclass(frozen=True)
class Pair:
    """One claim as the model granted it and as the store did: they differ by fencing token only."""

    model: Lease
    tested: Lease


class SameAnswers(RuleBasedStateMachine):
    """Sends every verb to both, and compares the answers and then the records."""

    pairs = Bundle("pairs")

    def __init__(self, tested: Store) -> None:
        super().__init__()
        self.model = MemoryStore()
        self.tested = tested.on("blocking", Announcer(()))
        self.scope = f"model.{uuid.uuid4().hex}"
        self.highest: dict[str, int] = {}

    @initialize()
    def prepare(self) -> None:
        run_sync(self.tested.prepare())

    def both(self, model: Coroutine[Any, Any, T], tested: Coroutine[Any, Any, T]) -> tuple[T, T]:
        """Call both; where one raises an error of ours, the other has to raise the same kind."""
        try:
            expected = run_sync(model)
        except IdemTasksError as error:
            with pytest.raises(type(error)):
                run_sync(tested)
            raise
        try:
            return expected, run_sync(tested)
        except IdemTasksError as error:
            raise AssertionError(f"{error!r} instead of {expected!r}") from error

    def ask(self, request: ClaimRequest) -> Pair | None:
        expected, answer = self.both(self.model.claim(request), self.tested.claim(request))
        assert type(answer) is type(expected)
        match expected, answer:
            case Granted(model), Granted(tested):
                assert same_but_for_the_token(tested) == same_but_for_the_token(model)
                is_again = self.highest.get(request.key) == tested.fencing_token
                assert is_again or tested.fencing_token > self.highest.get(request.key, 0)
                self.highest[request.key] = tested.fencing_token
                return Pair(model, tested)
            case Finished(), Finished():
                assert (answer.outcome, answer.fingerprint) == (expected.outcome, expected.fingerprint)
            case InProgress(), InProgress():
                assert answer.retry_after == pytest.approx(expected.retry_after, abs=5)
            case _:
                assert answer == expected
        return None

    def request(self, key: str, policy: Policy, fingerprint: str | None = None) -> ClaimRequest:
        return ClaimRequest(self.scope, key, fingerprint, new_owner(), policy, "host:1")

    @rule(target=pairs, key=KEYS, policy=POLICIES, fingerprint=st.sampled_from([None, "a" * 64, "b" * 64]))
    def claim(self, key: str, policy: Policy, fingerprint: str | None) -> Any:
        return granted(self.ask(self.request(key, policy, fingerprint)))

    @rule(target=pairs, key=KEYS, policy=POLICIES)
    def claim_and_die(self, key: str, policy: Policy) -> Any:
        """A holder whose lease runs out before anything else happens."""
        pair = self.ask(self.request(key, policy.replace(lease=BRIEF)))
        outlive(pair)
        return granted(pair)

    @rule(target=pairs, pair=pairs)
    def claim_again(self, pair: Pair) -> Any:
        """The same request once more, whatever has happened since."""
        again = self.ask(pair.model.request)
        outlive(again)
        return granted(again)

    @rule(pair=pairs, outcome=OUTCOMES, may_insert=st.booleans())
    def finish(self, pair: Pair, outcome: EncodedOutcome, may_insert: bool) -> None:
        expected, answer = self.both(
            self.model.finish(pair.model, outcome, may_insert=may_insert),
            self.tested.finish(pair.tested, outcome, may_insert=may_insert),
        )
        self.compare(expected, answer)

    @rule(pair=pairs, how=RELEASES)
    def release(self, pair: Pair, how: Release) -> None:
        self.compare(*self.both(self.model.release(pair.model, how), self.tested.release(pair.tested, how)))

    def compare(self, expected: Any, answer: Any) -> None:
        if isinstance(expected, Finished):
            assert isinstance(answer, Finished)
            assert (answer.outcome, answer.fingerprint) == (expected.outcome, expected.fingerprint)
        else:
            assert answer == expected

    @rule(some=st.lists(pairs, max_size=3, unique_by=lambda pair: pair.model.owner))
    def renew(self, some: list[Pair]) -> None:
        expected, answer = self.both(
            self.model.renew([pair.model for pair in some], lambda _owner: True),
            self.tested.renew([pair.tested for pair in some], lambda _owner: True),
        )
        assert answer == expected
        outlive(*some)

    @rule(key=KEYS)
    def forget(self, key: str) -> None:
        try:
            expected, answer = self.both(self.model.forget(self.scope, key), self.tested.forget(self.scope, key))
        except IdemTasksError:
            return
        assert what_was_done(answer) == what_was_done(expected)

    @rule(key=KEYS, outcome=st.none() | OUTCOMES)
    def resolve(self, key: str, outcome: EncodedOutcome | None) -> None:
        try:
            expected, answer = self.both(
                self.model.resolve(self.scope, key, outcome), self.tested.resolve(self.scope, key, outcome)
            )
        except IdemTasksError:
            return
        assert what_was_done(answer) == what_was_done(expected)
        if answer is not None:
            assert answer.token_after is not None
            assert answer.token_after > self.highest[key]
            self.highest[key] = answer.token_after

    @invariant()
    def same_records(self) -> None:
        for key in ("a", "A"):
            expected = run_sync(self.model.get(self.scope, key))
            record = run_sync(self.tested.get(self.scope, key))
            assert what_people_see(record) == what_people_see(expected)


def what_was_done(entry: AuditEntry | None) -> Any:
    """Return what both have to say of a person's action: all but times and tokens."""
    return entry and (entry.action, entry.scope, entry.key, entry.state_before, entry.state_after)


def outlive(*pairs: Pair | None) -> None:
    """Wait until every brief lease is over, so that no answer depends on how fast this machine is."""
    if any(pair is not None and pair.model.policy.lease == BRIEF for pair in pairs):
        time.sleep(1.5 * BRIEF)


def granted(pair: Pair | None) -> Any:
    """Add a granted claim to the bundle, and nothing where none was granted."""
    return multiple() if pair is None else pair


def same_but_for_the_token(lease: Lease) -> Lease:
    return dataclasses.replace(lease, fencing_token=0)


def what_people_see(record: Any) -> Any:
    """All of a record that does not depend on whose clock made it."""
    if record is None:
        return None
    fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    for name in ("fencing_token", "owner", "created_at", "updated_at", "lease_expires_at", "expires_at", "generation"):
        del fields[name]
    fields["completed_at"] = record.completed_at is not None
    fields["attention"] = None if record.attention == "overdue" else record.attention
    return fields


STORES = ["memory_tiers", "sqlite", "postgres", "mariadb", "redis", "redis_and_sqlite"]


@pytest.fixture
def tested(name: str, request: pytest.FixtureRequest) -> Store:
    """The store of this name; its server is asked for only when it is needed."""

    def url(fixture: str) -> str:
        found: str = request.getfixturevalue(fixture)
        return found

    match name:
        case "memory_tiers":
            return TieredStore(MemoryMarker(), MemoryStore())
        case "sqlite":
            return SQLStore(url("sqlite_tables_url"))
        case "postgres":
            return SQLStore(url("postgres_database"), create_schema=True)
        case "mariadb":
            return SQLStore(url("mariadb_database"), create_schema=True)
        case "redis":
            return RedisStore(url("redis_url"), socket_timeout=PATIENCE)
        case _:
            return TieredStore(
                RedisStore(url("redis_url"), socket_timeout=PATIENCE), SQLStore(url("sqlite_tables_url"))
            )


@pytest.mark.parametrize("name", STORES)
def test_any_sequence_is_answered_as_the_model_answers_it(name: str, tested: Store) -> None:
    """Claims, crashes, finishes, releases and a person's verbs, in any order, end alike on every store."""

    class Machine(SameAnswers):
        def __init__(self) -> None:
            super().__init__(tested)

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=20,
            stateful_step_count=15,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        ),
    )
    run_sync(tested.on("blocking", Announcer(())).close())
