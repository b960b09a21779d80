"""One handler writes for many claims in a session: its rows and all outcomes are one transaction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.orm import Session

from idem_tasks import OutboxMessage, RedisStore, SQLStore, TieredStore
from idem_tasks.claims import ClaimRequest, EncodedOutcome, Finished, Granted, Lease, Lost, Recorded, State, new_owner
from idem_tasks.errors import ConfigurationError, StoreUnavailableError
from idem_tasks.events import Announcer
from idem_tasks.policy import Policy
from idem_tasks.runtime import run_sync
from idem_tasks.stores.base import BatchTransaction, batch_transaction_of
from idem_tasks.stores.sql_sessions import Sessions
from idem_tasks.testing import Driver
from idem_tasks.testing.driver import PATIENCE
from tests.integration.sessions.seller import SCOPE, Order, Seller
from tests.integration.sessions.test_sessions import SERVERS
from tests.integration.sql_proxy import Proxy

KEYS = ("A-1", "A-2", "A-3")
DONE = EncodedOutcome(body=b'"ordered"', codec="json")
OTHER = EncodedOutcome(body=b'"other"', codec="json")


class Batch:
    """The claims of some orders, and the transaction in which they are ordered together."""

    def __init__(self, seller: Seller, store: Any = None, sessions: Any = None, keys: Sequence[str] = KEYS) -> None:
        self.seller = seller
        self.driver = seller.driver
        given: Any = store or seller.idem.store
        self.store = given.on(self.driver.runtime, Announcer(()))
        requests = [ClaimRequest(SCOPE, key, None, new_owner(), Policy(lease=60.0), "host:1") for key in keys]
        answers = self.driver(self.store.claim_batch(requests))
        self.leases: list[Lease] = [answer.lease for answer in answers if isinstance(answer, Granted)]
        self.transaction: BatchTransaction = batch_transaction_of(
            self.store, self.leases, Sessions(sessions or seller.sessions, self.driver.runtime), None
        )

    def begin(self) -> Any:
        return self.driver(self.transaction.begin_all())

    def order(self, *names: str) -> None:
        """Write these orders, as a handler does."""
        self.transaction.session.add_all([Order(name=name) for name in names])

    def commit(self, *outcomes: EncodedOutcome) -> Any:
        return self.driver(self.transaction.commit_all(outcomes or [DONE] * len(self.leases)))

    def look(self) -> Any:
        return self.driver(self.transaction.look_all())

    def end(self) -> None:
        self.driver(self.transaction.roll_back(throw_away=False))
        self.driver(self.transaction.close())

    def states(self) -> list[State | None]:
        return [self.seller.state(lease.key) for lease in self.leases]


def test_all_rows_and_outcomes_are_committed_together(seller: Seller) -> None:
    """Nothing is there before, and everything after one commit (F14)."""
    batch = Batch(seller)
    assert batch.begin() == [None] * 3
    batch.order(*KEYS)
    assert (seller.orders(), batch.transaction.may_be_committed) == (0, False)
    assert batch.commit(DONE, OTHER, DONE) == [True] * 3
    assert batch.transaction.commit_begun
    assert batch.transaction.may_be_committed
    assert not batch.transaction.is_cut_off
    batch.end()
    assert (seller.orders(), batch.states()) == (3, [State.COMPLETED] * 3)
    assert batch.look() == [Recorded()] * 3
    record = run_sync(seller.elsewhere.get(SCOPE, "A-2"))
    assert record is not None
    assert record.outcome == OTHER.body


@pytest.mark.parametrize("url", SERVERS, indirect=True)
def test_nothing_is_committed_where_one_fence_missed(seller: Seller) -> None:
    """It tells which one, and the others are still held (F1). On SQLite nobody else can write meanwhile."""
    batch = Batch(seller)
    assert batch.begin() == [None] * 3
    batch.order(*KEYS)
    run_sync(seller.elsewhere.finish(batch.leases[1], OTHER))
    assert batch.commit() == [True, False, True]
    assert not batch.transaction.may_be_committed
    batch.end()
    assert (seller.orders(), batch.states()) == (0, [State.RUNNING, State.COMPLETED, State.RUNNING])
    assert batch.look() == [None, Recorded(), None]


def test_it_does_not_begin_where_one_is_lost(seller: Seller) -> None:
    """It tells who has that one, and nothing is left open."""
    batch = Batch(seller)
    run_sync(seller.elsewhere.finish(batch.leases[2], OTHER))
    assert batch.begin() == [None, None, Lost()]
    batch.end()
    assert batch.look() == [None, None, Recorded()]


def test_its_messages_are_committed_with_it(seller: Seller) -> None:
    """Outcomes with messages and without, in one transaction."""
    batch = Batch(seller)
    batch.begin()
    batch.order("A-1")
    lease = batch.leases[0]
    message = OutboxMessage("0" * 32, SCOPE, lease.key, lease.fencing_token, 0, "mail", b'{"body":1}')
    assert batch.commit(EncodedOutcome(body=b"1", codec="json", messages=(message,)), DONE, DONE) == [True] * 3
    batch.end()
    taken = run_sync(seller.elsewhere.outbox.take("relay", lease=60.0, limit=10))
    assert (taken, seller.orders()) == ([message], 1)


def test_one_claim_is_a_batch_too(seller: Seller) -> None:
    """By the statements for one."""
    batch = Batch(seller, keys=["A-1"])
    assert batch.begin() == [None]
    batch.order("A-1")
    assert batch.commit() == [True]
    batch.end()
    assert (seller.orders(), batch.look()) == (1, [Recorded()])


def test_sessions_of_another_database_are_refused(seller: Seller, tmp_path: Any) -> None:
    """Its records are not there, and cannot be committed together with rows."""
    other = seller.sessionmaker(seller.new_engine(f"sqlite:///{tmp_path}/other.db"))
    batch = Batch(seller, sessions=other)
    with pytest.raises(ConfigurationError, match="have to be in one database"):
        batch.begin()
    batch.end()


def test_the_markers_follow_the_commit(driver: Driver, postgres_url: str, redis_url: str) -> None:
    """With Redis in front, duplicates of a committed batch are answered by the markers."""
    store = TieredStore(RedisStore(redis_url, socket_timeout=PATIENCE), SQLStore(postgres_url, create_schema=True))
    with Seller(driver, postgres_url, store) as seller:
        batch = Batch(seller)
        assert batch.begin() == [None] * 3
        batch.order(*KEYS)
        assert not batch.transaction.is_conflict(ValueError())
        assert batch.commit() == [True] * 3
        assert (batch.transaction.commit_begun, batch.transaction.may_be_committed) == (True, True)
        assert not batch.transaction.is_cut_off
        batch.end()
        with seller.engine.begin() as connection:
            connection.execute(text("DELETE FROM idem_tasks_records"))
        again = [ClaimRequest(SCOPE, key, None, new_owner(), Policy()) for key in KEYS]
        assert all(isinstance(answer, Finished) for answer in batch.driver(batch.store.claim_batch(again)))


@pytest.mark.parametrize("url", SERVERS, indirect=True)
@pytest.mark.parametrize("committed", [True, False])
def test_a_look_tells_what_became_of_a_commit(seller: Seller, url: str, committed: bool) -> None:
    """The commit's reply was lost, or the commit never came: all of it is there, or nothing (F14, F21)."""
    with Proxy(url) as proxy:
        batch = Batch(seller, sessions=seller.sessionmaker(seller.new_engine(proxy.url)))
        assert batch.begin() == [None] * 3
        batch.order(*KEYS)
        leave: Callable[..., Any] = proxy.go_away_with_next_reply if committed else proxy.go_away
        session = getattr(batch.transaction.session, "sync_session", batch.transaction.session)
        event.listen(session, "before_commit", lambda _session: leave())
        with pytest.raises(StoreUnavailableError):
            batch.commit()
        assert batch.transaction.may_be_committed
        batch.driver(batch.transaction.roll_back(throw_away=True))
        proxy.come_back()
        assert batch.look() == ([Recorded()] * 3 if committed else [None] * 3)
        batch.driver(batch.transaction.close())
    assert seller.orders() == (3 if committed else 0)


def test_a_handler_of_many_must_not_commit(seller: Seller) -> None:
    """Its rows without its outcomes would be there again at the next delivery (F63)."""
    batch = Batch(seller)
    batch.begin()
    batch.order("A-1")
    session = batch.transaction.session
    work: Callable[[Session], None] = Session.commit
    with pytest.raises(ConfigurationError, match="must not commit"):
        batch.driver(session.run_sync(work)) if seller.is_asyncio else work(session)
    with pytest.raises(ConfigurationError, match="must not commit"):
        batch.commit()
    batch.end()
    assert (seller.orders(), batch.states()) == (0, [State.RUNNING] * 3)
