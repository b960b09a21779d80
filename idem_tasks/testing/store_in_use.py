"""A store as the contract's tests use it: plain calls with short arguments."""

from __future__ import annotations

import uuid
from functools import partial
from typing import Any

from idem_tasks.claims import (
    AuditEntry,
    ClaimAnswer,
    ClaimRequest,
    EncodedOutcome,
    Finished,
    Granted,
    InProgress,
    Lease,
    Lost,
    Record,
    Recorded,
    Release,
    Released,
    State,
    StepBegun,
    StepFinished,
    StepRecord,
    StepsDiffer,
    new_owner,
)
from idem_tasks.events import Announcer
from idem_tasks.policy import Policy
from idem_tasks.stores.base import Store, journal_of
from idem_tasks.testing.driver import Driver

SHORT = 0.3
"""Seconds of a lease that a test waits out: long enough for a slow machine to act within it."""

LONG = 60.0
"""Seconds of a lease that no test outlives."""

WORKERS = 100
TAKERS = 20

DONE = EncodedOutcome(body=b'"done"', codec="json")
OTHER = EncodedOutcome(body=b'"other"', codec="json")
DECLINED = EncodedOutcome(State.FAILED, error_type="shop.Declined", error_message="the card was declined")

MEETING_KEYS = (
    ("order", "Order", "ORDER"),
    ("order", "order ", " order", "order\t", "order\n"),
    ("cafe", "caf\u00e9", "cafe\u0301"),
    ("strasse", "stra\u00dfe"),
    ("I", "i", "\u0130", "\u0131"),
    ("1", "\u0661", "\uff11", "01", "1.0"),
    ("\U0001f600", "\U0001f601"),
    ("\U00010400", "\U00010428"),
    ("%", "_", "*", "?", "\\", "'", '"', "{a}", "[a]", "%s", ":k", "$1"),
    ("null", "None", "0", "false"),
    ("k" * 254 + "a", "k" * 254 + "b", "k" * 254, "k" * 255),
    ("\u00e9" * 127 + "a", "\u00e9" * 127 + "b"),
    ("\U0001f600" * 63 + "abc", "\U0001f600" * 63 + "abd"),
)
"""Groups of keys that a collation, a pattern or a column's length could take for one another."""


class StoreInUse:
    """A store's verbs as plain calls with short arguments, on records of one scope of its own."""

    def __init__(self, store: Store, driver: Driver) -> None:
        self.driver = driver
        self.store = store.on(driver.runtime, Announcer(()))
        self.scope = f"contract.{uuid.uuid4().hex}"

    def request(self, key: str = "key", *, scope: str | None = None, **wanted: Any) -> ClaimRequest:
        """Make a request with a new owner; keywords are those of `ClaimRequest` and of `Policy`."""
        owner = wanted.pop("owner", None) or new_owner()
        fingerprint = wanted.pop("fingerprint", "f" * 64)
        holder = wanted.pop("holder", "host:1")
        traceparent = wanted.pop("traceparent", None)
        policy = Policy(**{"lease": LONG, "max_hold": 3600.0, "retention": 3600.0, **wanted})
        return ClaimRequest(scope or self.scope, key, fingerprint, owner, policy, holder, traceparent)

    def claim(self, request: ClaimRequest | str = "key", **wanted: Any) -> ClaimAnswer:
        """Claim by a request, or by a key with the keywords of `request`."""
        if isinstance(request, str):
            request = self.request(request, **wanted)
        return self.driver(self.store.claim(request))

    def granted(self, request: ClaimRequest | str = "key", **wanted: Any) -> Lease:
        """Claim, expect it to be granted, and return its lease."""
        answer = self.claim(request, **wanted)
        assert isinstance(answer, Granted)
        return answer.lease

    def after_the_lease(self, key: str = "key", **wanted: Any) -> ClaimAnswer:
        """Claim again and again until the key is no longer in progress, and return that answer."""
        request = self.request(key, **wanted)
        return self.driver.poll(partial(self.store.claim, request), lambda answer: not isinstance(answer, InProgress))

    def taken_over(self, key: str = "key", **wanted: Any) -> Lease:
        """Wait for the holder's lease to run out, take its claim over and return ours."""
        answer = self.after_the_lease(key, **wanted)
        assert isinstance(answer, Granted)
        return answer.lease

    def let_expire(self, lease: Lease) -> None:
        """Wait until this lease, which nobody renews, is over by any clock."""
        self.driver.pause(lease.policy.lease + 0.1)

    def finish(
        self, lease: Lease, outcome: EncodedOutcome = DONE, *, may_insert: bool = False
    ) -> Recorded | Finished | Lost:
        return self.driver(self.store.finish(lease, outcome, may_insert=may_insert))

    def release(self, lease: Lease, **how: Any) -> Released | Finished | Lost:
        return self.driver(self.store.release(lease, Release(**how)))

    def decide(self, dead: Lease, request: ClaimRequest, outcome: EncodedOutcome | None) -> Granted | Finished | Lost:
        return self.driver(self.store.decide(dead, request, outcome))

    def begin_step(
        self, lease: Lease, position: int = 1, name: str = "charge"
    ) -> StepBegun | StepFinished | StepsDiffer | Lost:
        return self.driver(journal_of(self.store).begin_step(lease, position, name))

    def finish_step(
        self, lease: Lease, outcome: EncodedOutcome = DONE, position: int = 1, name: str = "charge"
    ) -> Recorded | StepFinished | Lost:
        return self.driver(journal_of(self.store).finish_step(lease, position, name, outcome))

    def steps(self, key: str = "key") -> list[StepRecord]:
        return self.driver(journal_of(self.store).steps(self.scope, key))

    def renew(self, *leases: Lease) -> frozenset[str]:
        return self.driver(self.store.renew(leases, lambda _owner: True))

    def forget(self, key: str = "key", **by: Any) -> AuditEntry | None:
        return self.driver(self.store.forget(self.scope, key, **by))

    def resolve(self, outcome: EncodedOutcome | None, key: str = "key", **by: Any) -> Record | None:
        """Resolve it, and return the record as it is then."""
        done = self.driver(self.store.resolve(self.scope, key, outcome, **by))
        return None if done is None else self.get(key)

    def get(self, key: str = "key") -> Record | None:
        return self.driver(self.store.get(self.scope, key))

    def record(self, key: str = "key") -> Record:
        """Return the record, which has to be there."""
        record = self.get(key)
        assert record is not None
        return record

    def purge(self, *, limit: int = 1000, grace: float = 0.0) -> list[tuple[str, str]]:
        return self.driver(self.store.purge(limit=limit, grace=grace))

    def claim_together(self, requests: list[ClaimRequest]) -> list[ClaimAnswer]:
        """Send all these claims at the same moment."""
        return self.driver.together([partial(self.store.claim, request) for request in requests])
