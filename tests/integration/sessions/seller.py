"""A seller whose handlers write orders through a session of their own, in either runtime, on any database."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Self

from sqlalchemy import String, create_engine, func, make_url, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from idem_tasks import Idempotency, OutboxMessage, SQLStore, current_claim, idempotent_task
from idem_tasks.claims import ClaimRequest, EncodedOutcome, Granted, InProgress, Lease, State, new_owner
from idem_tasks.events import Announcer, Event, EventName
from idem_tasks.policy import Policy
from idem_tasks.runtime import run_sync
from idem_tasks.testing import Driver

SCOPE = "seller.order"
SHORT = 1.5
"""Seconds of a lease that is waited out, and within which a busy machine still grants it."""

Body = Callable[..., Any]
"""What a handler does, as a plain function of a session."""


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    number: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100))


class Stock(Base):
    __tablename__ = "stock"

    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    sold: Mapped[int] = mapped_column(default=0)


class Seller:
    """One database with orders and records, and another worker that has the same records."""

    asyncio_drivers: ClassVar = {
        "sqlite": "sqlite+aiosqlite",
        "postgresql": "postgresql+psycopg",
        "mysql": "mysql+asyncmy",
    }

    def __init__(self, driver: Driver, url: str, store: Any = None) -> None:
        quiet = Announcer(())
        self.driver = driver
        self.url = url
        self.is_asyncio = driver.runtime == "asyncio"
        self.events: list[Event] = []
        self.mails: list[OutboxMessage] = []
        self.idem = Idempotency(
            store=store or SQLStore(url, create_schema=True),
            observers=[self.events.append],
            senders={"mail": self.mails.append},
        )
        self.elsewhere = SQLStore(url, create_schema=True).on("blocking", quiet)
        self.engine = create_engine(url)
        self._made: list[Any] = []

    def __enter__(self) -> Self:
        run_sync(self.elsewhere.prepare())
        Base.metadata.create_all(self.engine)
        self.sessions = self.sessionmaker()
        # A first connection may take longer than a short lease: then no handler would begin.
        if self.is_asyncio:
            self.driver(self.idem.aget(SCOPE, "warm up"))
        else:
            self.idem.get(SCOPE, "warm up")
        return self

    def __exit__(self, *exc_info: object) -> None:
        for engine in self._made:
            if self.is_asyncio:
                self.driver(engine.dispose())
            else:
                engine.dispose()
        if self.is_asyncio:
            self.driver(self.idem.aclose())
        else:
            self.idem.close()
        run_sync(self.elsewhere.close())
        self.engine.dispose()

    def new_engine(self, url: str | None = None, **options: Any) -> Any:
        """Make an engine of this runtime."""
        place = make_url(url or self.url)
        if self.is_asyncio:
            from sqlalchemy.ext.asyncio import create_async_engine

            made: Any = create_async_engine(
                place.set(drivername=self.asyncio_drivers[place.get_backend_name()]), **options
            )
        else:
            made = create_engine(place, **options)
        self._made.append(made)
        return made

    def sessionmaker(self, engine: Any = None, **options: Any) -> Any:
        """Make a sessionmaker of this runtime; its sessions are of the class `Listened`, unless options say else."""
        options = {"bind": engine or self.new_engine()} | options
        if self.is_asyncio:
            from sqlalchemy.ext.asyncio import async_sessionmaker

            return async_sessionmaker(**({"sync_session_class": Listened} | options))
        return sessionmaker(**({"class_": Listened} | options))

    def task(self, body: Body, **options: Any) -> Callable[..., Any]:
        """Decorate a plain function of an order's name and a session for this runtime; returns a plain call."""
        handler: Callable[..., Any]
        if self.is_asyncio:

            async def handle(name: str, session: Any) -> Any:
                return await session.run_sync(partial(_in_order, body, name))

            handler = handle
        else:

            def handle_blocking(name: str, session: Any) -> Any:
                return body(name, session)

            handler = handle_blocking
        options = {"key": "{name}", "scope": SCOPE, "idempotency": self.idem, "session": self.sessions} | options
        decorated = idempotent_task(**options)(handler)
        if not self.is_asyncio:
            return decorated

        def call(*args: Any, **kwargs: Any) -> Any:
            return self.driver(decorated(*args, **kwargs))

        call.idempotency = decorated.idempotency  # type: ignore[attr-defined]
        return call

    def orders(self, name: str | None = None) -> int:
        """Return how many orders are committed."""
        count = select(func.count()).select_from(Order)
        with self.engine.connect() as connection:
            found: int = connection.scalar(count if name is None else count.where(Order.name == name)) or 0
            return found

    def state(self, key: str = "A-1") -> State | None:
        found = run_sync(self.elsewhere.get(SCOPE, key))
        return None if found is None else found.state

    def names(self) -> list[EventName]:
        return [event.name for event in self.events]

    # The other worker

    def stop_renewing(self) -> None:
        """Within a handler: be paused, as far as the heartbeat goes, so that the lease runs out."""
        heartbeat = self.idem.services(self.driver.runtime).heartbeat
        heartbeat.let_go(current_claim().lease.owner)

    def take_over(self, key: str = "A-1") -> Lease:
        """Claim a key on the other worker as soon as the lease of its holder is over."""
        request = ClaimRequest(SCOPE, key, None, new_owner(), Policy())
        with Driver("blocking") as driver:
            answer = driver.poll(partial(self.elsewhere.claim, request), lambda got: not isinstance(got, InProgress))
        assert isinstance(answer, Granted)
        return answer.lease

    def finish_elsewhere(self, lease: Lease) -> None:
        """Write the other worker's order and finish its claim."""
        with Session(self.engine) as session, session.begin():
            session.add(Order(name="of the other one"))
        run_sync(self.elsewhere.finish(lease, EncodedOutcome(body=b'"the other one"', codec="json")))

    def renew_elsewhere(self) -> None:
        """Within a handler: renew its claim as the heartbeat does, in another transaction."""
        lease = current_claim().lease
        assert run_sync(self.elsewhere.renew([lease], lambda _owner: True)) == {lease.owner}


class Listened(Session):
    """A session class of a test's own, to listen to all of them and to no other."""


def _in_order(body: Body, name: str, session: Session) -> Any:
    return body(name, session)


def order(name: str, session: Session) -> str:
    """What most handlers do."""
    session.add(Order(name=name))
    return f"ordered {name}"
