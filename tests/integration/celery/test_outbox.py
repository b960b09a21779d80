"""Tasks that a task publishes through its claim arrive once it is recorded, whoever is killed on the way."""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from celery import Celery, Signature, chain, chord, group
from kombu import Connection

from idem_tasks import (
    ConfigurationError,
    Idempotency,
    MemoryStore,
    MessageError,
    OutboxMessage,
    RelayReport,
    current_claim,
)
from idem_tasks.integrations.celery_outbox import CelerySender, encode, freeze, result_id
from tests.integration.celery.workers import Shop
from tests.services.waiting import wait_until

SECONDS = 30.0


@contextmanager
def relaying(shop: Shop) -> Iterator[Idempotency]:
    """The shop's outbox, relayed by this process."""
    store = {name: shop.store[name] for name in ("database_url", "redis_url")}
    with Idempotency.from_urls(**store, senders={"celery": CelerySender(shop.client)}, observers=[]) as idempotency:
        yield idempotency


def relayed(idempotency: Idempotency) -> RelayReport:
    """What the first relay did that had something to send: a lease of a dead sender has to run out."""
    deadline = time.monotonic() + SECONDS
    while not (report := idempotency.relay()).sent:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return report


def test_a_published_task_runs_once(shop: Shop, unique_name: str) -> None:
    """Sent at once, under the id that `publish` returned; a duplicate of its publisher sends nothing."""
    [published] = shop.send("order", unique_name).get(timeout=SECONDS)
    shop.ledger.wait("effect", f"{unique_name}-0")
    [started] = shop.ledger.rows("started", f"{unique_name}-0")
    assert started.details["id"] == published
    assert shop.send("order", unique_name).get(timeout=SECONDS) == [published]
    assert shop.ledger.count("outbox_sent", unique_name) == 1
    assert shop.ledger.count("started", f"{unique_name}-0") == 1


def test_it_belongs_to_the_task_that_published_it(shop: Shop, unique_name: str) -> None:
    """Its parent is the publishing task, its root the root of that one: traces go on."""
    result = shop.send("order", unique_name)
    [started] = shop.ledger.wait("started", f"{unique_name}-0")
    assert (started.details["parent_id"], started.details["root_id"]) == (result.id, result.id)


def test_killed_before_the_finish_nothing_is_sent(own_shop: Callable[..., Shop], unique_name: str) -> None:
    """F21: the handler had published; another delivery runs it again, and what that published is sent once."""
    shop = own_shop(transport={"visibility_timeout": 3})
    shop.start()
    published = shop.send("order", unique_name, dies=True).get(timeout=SECONDS)
    [started] = shop.ledger.wait("started", f"{unique_name}-0")
    assert [started.details["id"]] == published
    assert shop.ledger.count("ordering", unique_name) == 2
    with relaying(shop) as idempotency:
        assert idempotency.relay() == RelayReport(sent=0, failed=0, left=0)


def test_killed_between_the_finish_and_the_send_a_relay_sends(own_shop: Callable[..., Shop], unique_name: str) -> None:
    """The outcome is recorded; the second delivery replays it and sends nothing; the relay sends, and it runs once."""
    shop = own_shop(transport={"visibility_timeout": 3})
    shop.start()
    shop.ledger.note("dies before send", unique_name)
    published = shop.send("order", unique_name, number=3).get(timeout=SECONDS)
    assert shop.ledger.count("replayed", unique_name) == 1
    assert shop.ledger.count("started", f"{unique_name}-0") == 0
    with relaying(shop) as idempotency:
        assert relayed(idempotency) == RelayReport(sent=3, failed=0, left=0)
    for n in range(3):
        [started] = shop.ledger.wait("started", f"{unique_name}-{n}")
        assert started.details["id"] == published[n]
        shop.ledger.wait("effect", f"{unique_name}-{n}")
    assert shop.ledger.count("ordering", unique_name) == 1


def test_killed_after_the_send_it_is_sent_twice_and_runs_once(own_shop: Callable[..., Shop], unique_name: str) -> None:
    """F60: both have the same id and the same content, so the second finds the outcome of the first."""
    shop = own_shop(transport={"visibility_timeout": 3})
    shop.start()
    shop.ledger.note("dies after send", unique_name)
    [published] = shop.send("order", unique_name).get(timeout=SECONDS)
    with relaying(shop) as idempotency:
        assert relayed(idempotency) == RelayReport(sent=1, failed=0, left=0)
    key = f"{unique_name}-0"
    [first, second] = [shop.ledger.wait(what, key)[0].details for what in ("started", "seen")]
    shop.ledger.wait("replayed", key)
    # By whom and from where it was sent is not of the task.
    same = first.keys() & second.keys() - {"attempt", "amount", "origin", "reply_to", "ignore_result"}
    assert {name: first[name] for name in same} == {name: second[name] for name in same}
    assert first["id"] == published
    assert shop.ledger.count("effect", key) == 1


def test_beat_relays(own_shop: Callable[..., Shop], unique_name: str) -> None:
    """`idem_tasks.relay` is a task like any other: what a killed worker left behind is sent by another."""
    shop = own_shop(transport={"visibility_timeout": 3})
    shop.start()
    shop.ledger.note("dies before send", unique_name)
    shop.send("order", unique_name).get(timeout=SECONDS)
    relay = shop.client.signature("idem_tasks.relay")

    def is_sent() -> bool:
        relay.apply_async()
        return shop.ledger.count("effect", f"{unique_name}-0") > 0

    wait_until(is_sent, seconds=SECONDS, what="the relay to send")


FAR = Celery("far", broker="amqp://localhost:1//", set_as_current=False)
"""Whose broker is away, as at a wrong moment."""


@FAR.task
def ship(order_id: str, weight: int = 1) -> None: ...


@FAR.task(bind=True)
def bound(self: Any, order_id: str) -> None: ...


@FAR.task(typing=False)
def untyped(order_id: str) -> None: ...


def published(*args: Any, **kwargs: Any) -> None:
    """Let a handler publish this; no relay of this process sends it."""
    store = MemoryStore()
    with Idempotency(store=store, observers=[], senders={"celery": lambda _message: None}) as idempotency:
        idempotency.run(lambda: current_claim().publish(*args, **kwargs) and None, scope="s", key="k")


@pytest.mark.parametrize(
    "canvas",
    [
        ship.s(), ship.s("a", wieght=2), bound.s(), ship.si("a", 1, 2),
        chain(ship.s(), ship.s("a")), group(ship.s("a"), ship.s()), chord([ship.s("a"), ship.s()], ship.si("a")),
        group(chain(ship.s())), group(ship.s("a"), ship.s()) | ship.si("a"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused_at_publish(canvas: Any) -> None:
    """With TypeError, as `delay` does: such a message could never be sent, and its key would wait for ever."""
    with pytest.raises(TypeError):
        published(canvas)


def test_wrong_arguments_of_a_task_are_refused_at_publish() -> None:
    """As those of a signature."""
    for wrong in ((ship,), (ship, "a", 1, 2), (bound,)):
        with pytest.raises(TypeError):
            published(*wrong)
    with pytest.raises(TypeError):
        published(ship, "a", wieght=2)


@pytest.mark.parametrize(
    "canvas",
    [
        ship.s("a"), bound.s("a"), untyped.s(), chain(ship.s("a"), bound.s()), Signature("elsewhere", app=FAR),
        chord([ship.s("a")], bound.s()), ship.s("a").set(eta="2026-01-02T03:04:05Z", expires=5.0, priority=9),
        ship.s("a").set(countdown=1.5, expires="2026-01-02", headers={"n": 2**63 - 1}), ship.map(["a", "b"]),
        ship.s("a").set(eta=datetime(2026, 1, 2, tzinfo=UTC), expires=datetime(2026, 1, 2, tzinfo=UTC)),
    ],
)  # fmt: skip
def test_what_celery_would_send_is_published(canvas: Any) -> None:
    """Arguments that a task takes; arguments that an earlier one of a chain gives it; tasks of other processes."""
    published(canvas)


@pytest.mark.parametrize(
    "options",
    [
        {"priority": "high"}, {"priority": 256}, {"routing_key": "r" * 256}, {"queue": 1}, {"countdown": "soon"},
        {"expires": "tomorrow"}, {"eta": "tomorrow"}, {"eta": 5}, {"expiration": "soon"},
    ],
    ids=str,
)  # fmt: skip
def test_options_that_can_never_be_sent_are_refused_at_publish(options: dict[str, Any]) -> None:
    """And those of a part of a canvas too."""
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        published(ship.s("a").set(**options))
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        published(group(ship.s("a"), ship.s("a").set(**options)))


def test_headers_that_can_never_be_sent_are_refused_at_publish() -> None:
    """More than 64 bits are more than AMQP has."""
    with pytest.raises(MessageError, match="'n' must be a whole number of at most 64 bits"):
        published(ship.s("a").set(headers={"x": [{"n": 2**63}]}))


CANVASES: dict[str, Callable[[Shop, str], Any]] = {
    "chain": lambda shop, key: chain(shop.task("add", "0", f"{key}-a"), shop.task("add", f"{key}-b")),
    "group": lambda shop, key: group(shop.task("add", "0", f"{key}-{n}") for n in range(3)),
    "chord": lambda shop, key: chord(
        [shop.task("add", "0", f"{key}-{n}") for n in range(2)], shop.task("collect", key=key)
    ),
    "group and chain": lambda shop, key: (
        group(shop.task("add", "0", f"{key}-{n}") for n in range(2)) | shop.task("collect", key=key)
    ),
    "chain of links": lambda shop, key: shop.task("add", "0", f"{key}-a").set(link=shop.task("add", f"{key}-b")),
}


def ids_in(value: Any) -> list[str]:
    """All ids in what was sent, in order."""
    if isinstance(value, dict):
        own = [str(value[name]) for name in ("task_id", "group_id") if value.get(name)]
        return own + [id_ for part in value.values() for id_ in ids_in(part)]
    if isinstance(value, list | tuple):
        return [id_ for part in value for id_ in ids_in(part)]
    return []


@pytest.mark.parametrize("kind", CANVASES)
def test_canvases(shop: Shop, unique_name: str, kind: str) -> None:
    """A canvas is published whole: its result is found under the id that `publish` returned."""
    canvas = CANVASES[kind](shop, unique_name)
    [published] = shop.send("order", unique_name, canvas=canvas).get(timeout=SECONDS)
    expected = {
        "chain": f"0+{unique_name}-a+{unique_name}-b",
        "chain of links": f"0+{unique_name}-a",
        "chord": [f"0+{unique_name}-{n}" for n in range(2)],
        "group and chain": [f"0+{unique_name}-{n}" for n in range(2)],
    }
    if kind == "group":
        for n in range(3):
            shop.ledger.wait("effect", f"{unique_name}-{n}")
    else:
        assert shop.client.AsyncResult(published).get(timeout=SECONDS) == expected[kind]
    if kind == "chain of links":
        shop.ledger.wait("effect", f"{unique_name}-b")


def sent_by(shop: Shop, content: bytes, queue: str, number: int) -> list[Any]:
    """Send a frozen canvas into a queue that nobody consumes, and return the messages: ids, group, embedded tasks."""
    CelerySender(shop.client)(OutboxMessage("0" * 32, "s", "k", 1, 0, "celery", content))
    found = []
    with Connection(shop.broker) as connection, closing(connection.SimpleQueue(queue)) as messages:
        for _ in range(number):
            message = messages.get(timeout=5)
            message.ack()
            names = ("task", "id", "root_id", "parent_id", "group")
            args, kwargs, embed = message.payload
            found.append([[message.headers[name] for name in names], args, kwargs, embed])
    return sorted(found, key=repr)


@pytest.mark.parametrize("kind", CANVASES)
def test_a_second_send_is_an_exact_duplicate(shop: Shop, unique_name: str, kind: str) -> None:
    """Every id in every message is the same, those of tasks that come later too."""
    queue = f"{unique_name}_nobody"
    canvas = CANVASES[kind](shop, unique_name)
    for task in getattr(canvas, "tasks", [canvas]):
        task.set(queue=queue)
    number = {"group": 3, "chord": 2, "group and chain": 2}.get(kind, 1)
    plain = freeze(canvas, (), {}, "f" * 32)
    assert result_id(plain) == "f" * 32
    content = msgspec.json.encode({"body": encode(plain)})
    first, second = (sent_by(shop, content, queue, number) for _ in range(2))
    assert first == second
    assert all(len(id_) == 32 for id_ in ids_in(first)), "none is a random one of Celery's"
    with Connection(shop.broker) as connection, connection.channel() as channel:
        channel.queue_delete(queue)
