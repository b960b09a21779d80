"""What becomes of messages of RabbitMQ, by each of its clients: replayed, put back, dead letters, never dropped."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import create_engine, func, select
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from idem_tasks import Idempotency
from tests.consumers.ledger import Effect, Table
from tests.integration.consumers.queues import Queues
from tests.integration.consumers.rigs import Heard, Rig
from tests.services.waiting import wait_until

MakeRig = Callable[..., Rig]


def refuse(body: str) -> None:
    raise ValueError(f"cannot handle {body}")


def test_a_duplicate_is_replayed_and_acknowledged(rig: MakeRig, queues: Queues, heard: Heard) -> None:
    """The handler runs once, and both messages leave the queue."""
    queues.publish("A-1")
    queues.publish("A-1")
    with rig() as consumer:
        consumer.wait_for("A-1")
        wait_until(lambda: heard.count("replayed") == 1, seconds=10, what="the replay")
    assert consumer.handled == ["A-1"]
    queues.wait_for(0)


def test_what_is_in_progress_is_put_back_unchanged_and_then_replayed(
    rig: MakeRig, queues: Queues, idem: Idempotency, heard: Heard
) -> None:
    """It is neither acknowledged nor run, comes again, and gets the outcome of the one that was first (F31)."""
    seen: list[Any] = []

    def scope(*args: Any) -> str:
        seen.append(args)
        return queues.name

    with idem.claim(scope=queues.name, key="A-1", fingerprint=b"A-1") as claim:
        queues.publish("A-1", message_id="m-1", correlation_id="c-1", priority=3, app_id="shop", headers={"n": 1})
        with rig(scope=scope) as consumer:
            heard.wait_for("put_back", 2)
            claim.complete("done")
            heard.wait_for("replayed")
    assert consumer.begun == []
    queues.wait_for(0)
    expected = {"message_id": "m-1", "correlation_id": "c-1", "priority": 3, "app_id": "shop", "n": 1}
    assert [described(args)[0] for args in (seen[0], seen[-1])] == [expected, expected]
    assert described(seen[0])[1] is None
    assert described(seen[-1])[1] >= 2


def described(args: tuple[Any, ...]) -> tuple[dict[str, Any], Any]:
    """The properties of a message as any of the clients shows them, and how often it was put back."""
    message = args[2] if len(args) == 4 else args[-1]
    properties = message.properties if isinstance(getattr(message, "properties", None), dict) else vars_of(message)
    named = {name: properties[name] for name in ("message_id", "correlation_id", "priority", "app_id")}
    return {**named, "n": message.headers["n"]}, message.headers.get("idem_tasks_put_back")


def vars_of(message: Any) -> dict[str, Any]:
    return {name: getattr(message, name) for name in ("message_id", "correlation_id", "priority", "app_id")}


def test_a_poison_message_becomes_a_dead_letter(rig: MakeRig, queues: Queues) -> None:
    """It is parked after so many failures, and its dead letter says why, and nothing of its content."""
    queues.publish("A-1", message_id="m-1", expiration="600000")
    with rig(refuse, max_attempts=2):
        properties, body = queues.next_dead_letter()
    assert (body, properties.message_id, properties.delivery_mode, properties.expiration) == ("A-1", "m-1", 2, None)
    assert {name: value for name, value in properties.headers.items() if name.startswith("idem_tasks_")} == {
        "idem_tasks_put_back": 2,
        "idem_tasks_reason": "parked",
        "idem_tasks_error_type": "ParkedError",
        "idem_tasks_origin": queues.name,
        "idem_tasks_scope": queues.name,
        "idem_tasks_key": "A-1",
    }
    queues.wait_for(0)


@pytest.mark.parametrize(
    "key, options, reason, error_type",
    [
        (None, {}, "invalid_key", "InvalidKeyError"),
        ("k", {"on_error": "dead_letter"}, "handler_error", "ValueError"),
        ("k", {"record_failures": ValueError}, "failed", "ValueError"),
        ("k", {"on_crash": "hold"}, "in_doubt", "InDoubtError"),
    ],
    ids=["invalid_key", "handler_error", "failed", "in_doubt"],
)
def test_what_can_never_be_handled_becomes_a_dead_letter(
    rig: MakeRig, queues: Queues, key: str | None, options: dict[str, Any], reason: str, error_type: str
) -> None:
    """With its reason, and the type of the error."""
    queues.publish("A-1", key)
    with rig(refuse, **options):
        properties, body = queues.next_dead_letter()
    assert body == "A-1"
    assert properties.headers["idem_tasks_reason"] == reason
    assert properties.headers["idem_tasks_error_type"] == error_type
    assert "cannot handle" not in str(properties.headers)
    queues.wait_for(0)


def test_another_message_under_the_same_key_becomes_a_dead_letter(rig: MakeRig, queues: Queues) -> None:
    """The body is the fingerprint: it is not taken for a duplicate of the first."""
    queues.publish("A-1", "k")
    with rig() as consumer:
        consumer.wait_for("A-1")
        queues.publish("A-2", "k")
        properties, body = queues.next_dead_letter()
    assert (body, properties.headers["idem_tasks_reason"]) == ("A-2", "fingerprint_mismatch")


def test_without_a_road_nothing_is_dropped(
    rig: MakeRig, queues: Queues, heard: Heard, caplog: pytest.LogCaptureFixture
) -> None:
    """What should be a dead letter comes again and again, and the log names the keyword to give."""
    queues.publish("A-1", None)
    with (
        caplog.at_level(logging.ERROR, "idem_tasks"),
        rig(dead_letter_exchange=None, dead_letter_routing_key=None) as consumer,
    ):
        heard.wait_for("put_back", 3)
    assert consumer.begun == []
    assert "should be a dead letter (invalid_key), and has nowhere to go: give dead_letter_exchange=" in caplog.text
    queues.wait_for(1)


@pytest.mark.parametrize("exchange", ["", "no_such_exchange"])
def test_a_dead_letter_that_nobody_takes_stays(
    rig: MakeRig, queues: Queues, heard: Heard, caplog: pytest.LogCaptureFixture, exchange: str
) -> None:
    """It is held on and tried again after a pause, whether no queue takes it or there is no such exchange."""
    queues.publish("A-1", None)
    road = {"dead_letter_exchange": exchange, "dead_letter_routing_key": f"{queues.name}_nowhere"}
    with caplog.at_level(logging.ERROR, "idem_tasks"), rig(**road) as consumer:
        heard.wait_for("dead_lettered", 2)
        queues.publish("A-2")
        consumer.wait_for("A-2")
    assert "could not be published again" in caplog.text
    assert heard.count("dead_lettered") <= 5, "it spins"
    queues.wait_for(1)


def test_a_copy_that_no_queue_takes_is_not_lost(
    rig: MakeRig, queues: Queues, idem: Idempotency, heard: Heard, caplog: pytest.LogCaptureFixture
) -> None:
    """Put back to a queue that is not there, the message is handled again after a pause, and replayed (F60)."""
    with idem.claim(scope="s", key="A-1", fingerprint=b"A-1") as claim:
        queues.publish("A-1")
        with caplog.at_level(logging.ERROR, "idem_tasks"), rig(queue=f"{queues.name}_gone", scope="s") as consumer:
            heard.wait_for("put_back", 2)
            claim.complete("done")
            heard.wait_for("replayed")
    assert "could not be published again" in caplog.text
    assert (consumer.begun, heard.count("put_back") <= 5) == ([], True)
    queues.wait_for(0)


@pytest.mark.parametrize("way", ["put back", "refused"])
def test_the_delivery_limit_of_a_quorum_queue_is_not_burnt(
    rig: MakeRig, queues: Queues, idem: Idempotency, heard: Heard, way: str
) -> None:
    """Put back, or held on since its copies are refused, more often than the limit allows, it is still there (F40)."""
    queues.delete()
    queues.declare(x_queue_type="quorum", x_delivery_limit=1)
    to = queues.name if way == "put back" else f"{queues.name}_gone"
    with idem.claim(scope="s", key="A-1", fingerprint=b"A-1") as claim:
        queues.publish("A-1")
        with rig(queue=to, scope="s", longest_delay=0.1):
            heard.wait_for("put_back", 4)
            claim.complete("done")
            heard.wait_for("replayed")
    queues.wait_for(0)


def test_a_message_with_a_cc_is_not_multiplied(rig: MakeRig, queues: Queues, idem: Idempotency, heard: Heard) -> None:
    """A copy goes to its own queue alone, though the message was sent to another one too (F64)."""
    queues.publish("A-1", headers={"CC": [queues.dead]})
    assert queues.next_dead_letter()[1] == "A-1"
    with idem.claim(scope=queues.name, key="A-1", fingerprint=b"A-1") as claim, rig():
        heard.wait_for("put_back", 3)
        claim.complete("done")
        heard.wait_for("replayed")
    with queues.channel() as channel:
        assert channel.queue_declare(queues.dead, passive=True).method.message_count == 0


def test_rows_of_a_session_are_written_once(
    client: str, rig: MakeRig, queues: Queues, heard: Heard, postgres_url: str
) -> None:
    """Each message comes three times, and its row is there once (F14)."""
    engine = create_engine(postgres_url)
    Table.metadata.create_all(engine)
    for number in range(5):
        for _ in range(3):
            queues.publish(f"A-{number}")

    def work(body: str, session: Any) -> None:
        session.add(Effect(key=body, pid=0))

    sessions = sessionmaker(engine)
    async_engine = create_async_engine(postgres_url)
    with rig(work, session=async_sessionmaker(async_engine) if client == "aio_pika" else sessions) as consumer:
        consumer.engine = async_engine
        heard.wait_for("replayed", 10)
    queues.wait_for(0)
    with Session(engine) as session:
        assert session.scalar(select(func.count(Effect.id))) == 5
    engine.dispose()


# aio-pika 9 leaves the socket of a connection that was cut to the garbage collector.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <function StreamWriter:pytest.PytestUnraisableExceptionWarning"
)
def test_a_handler_whose_connection_was_cut(
    rig: MakeRig, queues: Queues, client: str, heard: Heard, proxied: Any
) -> None:
    """It goes on and its outcome is replayed, or it was cancelled and runs again; the message is handled once."""
    begun, go_on = threading.Event(), threading.Event()

    def work(body: str) -> None:
        begun.set()
        go_on.wait(10)

    queues.publish("A-1")
    with rig(work, url=proxied.url) as consumer:
        assert begun.wait(10)
        proxied.proxy.cut()
        heard.wait_for("released" if client == "aio_pika" else "granted")
        go_on.set()
        wait_until(lambda: len(consumer.handled) == 1, seconds=15, what="the handler")
        if client != "aio_pika":
            heard.wait_for("replayed")
    assert consumer.handled == ["A-1"]
    assert consumer.begun == ["A-1"] * (2 if client == "aio_pika" else 1)
    queues.wait_for(0)
