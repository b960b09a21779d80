"""One transaction: the handler's rows and its outcome are committed together, or neither is."""

from sqlalchemy import create_engine, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from idem_tasks import ConfigurationError, Idempotency, State, idempotent_task

URL = "sqlite:///shop.db"
engine = create_engine(URL)
Sessions = sessionmaker(engine)
idem = Idempotency.from_urls(database_url=URL)  # the same database


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    number: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str]


Base.metadata.create_all(engine)
broken = ["the warehouse is on fire"]


@idempotent_task(key="{message_id}", idempotency=idem, session=Sessions)
def order(message_id: str, item: str, *, session: Session | None = None) -> int:  # noqa: ARG001 - it is the key
    assert session is not None
    new = Order(item=item)
    session.add(new)
    session.flush()  # so that it has its number; nobody else sees it yet
    if broken:
        raise RuntimeError(broken.pop())
    if item == "committed":
        session.commit()
    return new.number


def orders() -> int:
    with Sessions() as session:
        return session.scalar(select(func.count()).select_from(Order)) or 0


def fails(message_id: str, item: str) -> str:
    try:
        order(message_id, item)
    except (RuntimeError, ConfigurationError) as error:
        return str(error)
    raise AssertionError("it succeeded")


print(fails("m-1", "chair"), orders())
assert orders() == 0
assert [order("m-1", "chair"), order("m-1", "chair")] == [1, 1]  # the message comes twice
assert orders() == 1
print(fails("m-2", "committed"))  # the library commits, not the handler
assert orders() == 1
assert idem.stats()[State.COMPLETED] == 1
