"""What a handler publishes is sent once its outcome is recorded, in order, and in no other case."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from idem_tasks import (
    Claim,
    ConfigurationError,
    Event,
    EventName,
    Idempotency,
    MemoryStore,
    MessageError,
    OutboxMessage,
    Policy,
    RedisStore,
    RelayReport,
    SQLStore,
    StoreUnavailableError,
    TieredStore,
    current_claim,
    outbox,
)
from idem_tasks.integrations.celery_outbox import CelerySender
from idem_tasks.outbox import Senders
from idem_tasks.stores.base import outbox_of
from idem_tasks.stores.memory_marker import MemoryMarker
from idem_tasks.stores.schema import SENDER_CHARACTERS
from idem_tasks.testing import ManualClock


class Post:
    """A sender that can be broken, and what it sent."""

    def __init__(self) -> None:
        self.sent: list[OutboxMessage] = []
        self.is_down: Callable[[OutboxMessage], bool] = lambda _message: False
        self.threads: set[str] = set()

    def __call__(self, message: OutboxMessage) -> None:
        self.threads.add(threading.current_thread().name)
        if self.is_down(message):
            raise OSError("the network is down")
        self.sent.append(message)

    @property
    def bodies(self) -> list[Any]:
        return [message.body for message in self.sent]


@pytest.fixture
def post() -> Post:
    return Post()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def idem(clock: ManualClock, post: Post, events: list[Event]) -> Idempotency:
    store = TieredStore(MemoryMarker(clock), MemoryStore(clock))
    return Idempotency(store=store, senders={"mail": post}, observers=[events.append])


def publish(*bodies: Any) -> str:
    for body in bodies:
        current_claim().publish_message(body, to="mail")
    return "done"


def run(idem: Idempotency, handler: Callable[..., Any] = publish, *args: Any, key: str = "k", **policy: Any) -> Any:
    return idem.run(handler, *args, scope="s", key=key, fingerprint=None, policy=Policy(**policy))


def test_messages_are_sent_after_the_outcome_is_recorded(idem: Idempotency, post: Post, events: list[Event]) -> None:
    """In order, with ids of their own; a replay sends nothing again."""
    during: list[list[Any]] = []

    def handler() -> str:
        publish("a", "b")
        during.append(post.bodies)
        return "done"

    assert run(idem, handler) == run(idem, handler) == "done"
    assert during == [[]]
    assert post.bodies == ["a", "b"]
    assert [event.name.value for event in events] == ["granted", "completed", "outbox_sent", "outbox_sent", "replayed"]
    assert idem.relay() == RelayReport(sent=0, failed=0, left=0)


def test_a_message_has_what_it_was_published_with(idem: Idempotency, post: Post) -> None:
    """Id, body as JSON, headers, options, scope and key; `publish_message` returns the id."""
    body = {"at": datetime(2026, 1, 2, tzinfo=UTC), "amounts": (1, 2)}
    headers = {"tenant": "t"}
    id_ = run(idem, lambda: current_claim().publish_message(body, to="mail", headers=headers, routing_key="x"))
    [message] = post.sent
    assert message.json == b'{"at":"2026-01-02T00:00:00Z","amounts":[1,2]}'
    assert (message.id, message.scope, message.key, message.number) == (id_, "s", "k", 0)
    assert (message.headers, message.options, message.attempts) == (headers, {"routing_key": "x"}, 0)
    assert len(message.id) == 32
    assert "amounts" not in repr(message)


def test_a_handler_that_raises_sends_nothing(idem: Idempotency, post: Post) -> None:
    """Neither a released claim nor a recorded failure does."""

    def handler() -> None:
        publish("a")
        raise LookupError

    for key, policy in (
        ("released", {}),
        ("failed", {"record_failures": LookupError}),
        ("doubt", {"on_crash": "hold"}),
    ):
        with pytest.raises(LookupError):
            run(idem, handler, key=key, **policy)
    assert (post.sent, idem.relay().left) == ([], 0)


def test_a_superseded_claim_sends_nothing(idem: Idempotency, post: Post, clock: ManualClock) -> None:
    """F1: only the messages of the run whose outcome is recorded are sent."""

    def paused() -> str:
        publish("late")
        clock.advance(61)
        run(idem, publish, "first")
        return "late"

    assert run(idem, paused) == "done"
    assert post.bodies == ["first"]


def test_a_run_after_a_forget_has_other_ids(idem: Idempotency, post: Post) -> None:
    """The receiver takes it for another operation, as it is."""
    run(idem, publish, "a")
    idem.forget("s", "k")
    run(idem, publish, "a")
    assert len({message.id for message in post.sent}) == 2


def test_a_send_that_fails_is_announced_and_left_to_a_relay(
    idem: Idempotency, post: Post, events: list[Event], clock: ManualClock
) -> None:
    """It does not fail the call; later messages of the key wait, and every send has the same id."""
    seen: list[str] = []

    def refuse(message: OutboxMessage) -> bool:
        seen.append(message.id)
        return True

    post.is_down = refuse
    assert run(idem, publish, "a", "b") == "done"
    [failed] = [event for event in events if event.name is EventName.OUTBOX_FAILED]
    assert failed.details == {"id": seen[0], "to": "mail", "attempts": 1, "error": "OSError"}
    assert idem.relay() == RelayReport(sent=0, failed=0, left=2), "it waits for a second"
    clock.advance(1.01)
    assert idem.relay() == RelayReport(sent=0, failed=1, left=2)
    post.is_down = lambda _message: False
    clock.advance(1.01)
    assert idem.relay().sent == 0, "now it waits for two"
    clock.advance(1.01)
    assert idem.relay() == RelayReport(sent=2, failed=0, left=0)
    assert post.bodies == ["a", "b"]
    assert {post.sent[0].id} == set(seen)


def test_the_pause_after_a_failure_grows_to_a_minute(idem: Idempotency, post: Post, clock: ManualClock) -> None:
    """1, 2, 4 .. 60 seconds; and it is never given up."""
    post.is_down = lambda _message: True
    run(idem, publish, "a")
    for pause in (1, 2, 4, 8, 16, 32, 60, 60, 60):
        clock.advance(pause - 0.01)
        assert idem.relay().failed == 0
        clock.advance(0.02)
        assert idem.relay().failed == 1


def test_keys_do_not_wait_for_one_another(idem: Idempotency, post: Post, clock: ManualClock) -> None:
    """A message that nobody takes holds up its own key only."""
    post.is_down = lambda _message: True
    run(idem, publish, "a", "b", key="poison")
    run(idem, publish, "c", key="other")
    clock.advance(5)
    post.is_down = lambda message: message.key == "poison"
    assert idem.relay() == RelayReport(sent=1, failed=1, left=2)
    assert post.bodies == ["c"]


def test_a_relay_ends_between_two_messages(idem: Idempotency, post: Post, clock: ManualClock) -> None:
    """The rest is free at once for another."""
    post.is_down = lambda _message: True
    run(idem, publish, *range(5))
    clock.advance(2)
    post.is_down = lambda _message: False
    assert idem.relay(should_stop=lambda: len(post.sent) == 2) == RelayReport(sent=2, failed=0, left=3)
    assert idem.relay(2) == RelayReport(sent=2, failed=0, left=1)
    assert idem.relay() == RelayReport(sent=1, failed=0, left=0)
    assert post.bodies == [0, 1, 2, 3, 4]


def test_a_slow_sender_gives_the_rest_back(idem: Idempotency, clock: ManualClock) -> None:
    """In the second half of its lease a relay begins no send: the lease is taken anew."""
    from idem_tasks.runtime import deadline_clock_from

    sent: list[int] = []

    def slow(message: OutboxMessage) -> None:
        clock.advance(31)
        sent.append(message.number)

    slow_idem = Idempotency(store=idem.store, senders={"mail": slow}, observers=[])
    with deadline_clock_from(clock):
        assert run(slow_idem, publish, *range(3), lease=600) == "done"
    assert sent == [0, 1, 2]


def test_asyncio_sends_in_a_thread(idem: Idempotency, post: Post, clock: ManualClock) -> None:
    """A sender blocks; the event loop goes on. `arelay` too."""

    async def handler() -> str:
        return publish("a", "b")

    async def main() -> list[Any]:
        assert await idem.arun(handler, scope="s", key="k") == "done"
        post.is_down = lambda _message: True
        assert await idem.arun(handler, scope="s", key="l") == "done"
        post.is_down = lambda _message: False
        clock.advance(1.01)
        return [await idem.arelay()]

    assert asyncio.run(main()) == [RelayReport(sent=2, failed=0, left=0)]
    assert post.bodies == ["a", "b", "a", "b"]
    assert threading.current_thread().name not in post.threads


@pytest.mark.parametrize("ends_in_time", [True, False])
def test_a_call_that_is_cancelled_while_it_sends_settles_what_was_sent(
    idem: Idempotency, post: Post, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, ends_in_time: bool
) -> None:
    """Its key does not wait for the lease, unless the message in hand is not done in time: that may be sent again."""
    begun, going_on = threading.Event(), threading.Event()

    def is_down(message: OutboxMessage) -> bool:
        if message.number == 1:
            begun.set()
            assert going_on.wait(30)
        return False

    post.is_down = is_down

    async def handler() -> str:
        return publish("a", "b", "c")

    async def main() -> RelayReport:
        call = asyncio.create_task(idem.arun(handler, scope="s", key="k"))
        await asyncio.to_thread(begun.wait, 30)
        call.cancel()
        await asyncio.sleep(0)
        if ends_in_time:
            going_on.set()
        else:
            monkeypatch.setattr(outbox, "_PATIENCE", 0.01)
        with pytest.raises(asyncio.CancelledError):
            await call
        going_on.set()
        return await idem.arelay()

    if ends_in_time:
        assert asyncio.run(main()) == RelayReport(sent=1, failed=0, left=0)
        assert post.bodies == ["a", "b", "c"]
    else:
        assert asyncio.run(main()) == RelayReport(sent=0, failed=0, left=2)
        clock.advance(61)
        assert idem.relay() == RelayReport(sent=2, failed=0, left=0)
        assert post.bodies == ["a", "b", "b", "c"]


def test_a_send_that_is_cancelled_and_fails_is_tried_again(idem: Idempotency, post: Post, clock: ManualClock) -> None:
    """The call ends as cancelled, and the message waits for the lease."""
    begun, going_on = threading.Event(), threading.Event()

    def is_down(_message: OutboxMessage) -> bool:
        begun.set()
        assert going_on.wait(30)
        return True

    post.is_down = is_down

    async def handler() -> str:
        return publish("a")

    async def main() -> None:
        call = asyncio.create_task(idem.arun(handler, scope="s", key="k"))
        await asyncio.to_thread(begun.wait, 30)
        call.cancel()
        await asyncio.sleep(0)
        going_on.set()
        with pytest.raises(asyncio.CancelledError):
            await call

    asyncio.run(main())
    post.is_down = lambda _message: False
    clock.advance(61)
    assert idem.relay() == RelayReport(sent=1, failed=0, left=0)


def test_a_send_that_nobody_awaits_any_more_ends_at_once(idem: Idempotency, post: Post, clock: ManualClock) -> None:
    """Its event loop is gone perhaps: nothing can be settled, and the lease runs out."""
    post.is_down = lambda _message: True
    run(idem, publish, "a")
    clock.advance(2)
    going_on = threading.Event()
    post.is_down = lambda _message: not going_on.wait(30)

    async def main() -> None:
        sending = idem.services("asyncio").relay.send(10)
        sending.send(None)
        sending.close()
        going_on.set()

    asyncio.run(main())
    assert idem.relay() == RelayReport(sent=0, failed=0, left=1)
    clock.advance(61)
    assert idem.relay() == RelayReport(sent=1, failed=0, left=0)


def test_an_unrecorded_send_that_is_cancelled_ends_as_cancelled(idem: Idempotency, post: Post) -> None:
    """After the message that is being sent; no further one is sent."""
    begun, going_on = threading.Event(), threading.Event()

    def is_down(_message: OutboxMessage) -> bool:
        begun.set()
        assert going_on.wait(30)
        return False

    post.is_down = is_down

    async def handler() -> str:
        return publish("a", "b")

    async def main() -> None:
        call = asyncio.create_task(idem.arun(handler, scope="s", key="k", policy=Policy(enabled=False)))
        await asyncio.to_thread(begun.wait, 30)
        call.cancel()
        await asyncio.sleep(0)
        going_on.set()
        with pytest.raises(asyncio.CancelledError):
            await call

    asyncio.run(main())
    assert post.bodies == ["a"]


@pytest.mark.parametrize("is_away", [False, True])
def test_a_shutdown_while_it_sends_settles_what_was_sent(
    idem: Idempotency, post: Post, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, is_away: bool
) -> None:
    """If the store can be reached; the message in hand may have been sent, and waits for the lease."""

    def is_down(message: OutboxMessage) -> bool:
        if message.number == 1:
            raise SystemExit
        return False

    async def away(*_args: Any, **_kwargs: Any) -> None:
        raise StoreUnavailableError("away")

    post.is_down = is_down
    box = outbox_of(idem.store)
    assert box is not None
    with monkeypatch.context() as context:
        if is_away:
            context.setattr(box, "settle", away)
        with pytest.raises(SystemExit):
            run(idem, publish, "a", "b", "c")
    left = 3 if is_away else 2
    assert idem.relay() == RelayReport(sent=0, failed=0, left=left)
    post.is_down = lambda _message: False
    clock.advance(61)
    assert idem.relay() == RelayReport(sent=left, failed=0, left=0)


def test_a_shutdown_that_a_sender_makes_an_error_of_is_no_failure(
    idem: Idempotency, post: Post, clock: ManualClock
) -> None:
    """As drivers do with what strikes them: it ends the sending, and the message, perhaps sent, waits for the lease."""

    def is_down(message: OutboxMessage) -> bool:
        if message.number == 1:
            raise OSError("interrupted") from SystemExit()
        return False

    post.is_down = is_down
    with pytest.raises(OSError, match="interrupted"):
        run(idem, publish, "a", "b", "c")
    post.is_down = lambda _message: False
    assert idem.relay() == RelayReport(sent=0, failed=0, left=2)
    clock.advance(61)
    assert idem.relay() == RelayReport(sent=2, failed=0, left=0)


def test_a_shutdown_while_a_body_is_written_is_raised(
    idem: Idempotency, post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no fault of the body's, and nothing of the message is kept."""

    def strike(_message: object) -> bytes:
        raise OSError("interrupted") from SystemExit()

    with monkeypatch.context() as patch:
        patch.setattr("idem_tasks.outbox._encode", strike)
        with pytest.raises(OSError, match="interrupted"):
            run(idem, publish, "a")
    assert run(idem, publish, "b") == "done"
    assert post.bodies == ["b"]


def test_a_handler_that_published_nothing_publishes_nothing_after_its_end(idem: Idempotency, post: Post) -> None:
    """A thread that it left behind hears that its message would never be sent."""
    claims: list[Claim] = []
    idem.run(lambda: claims.append(current_claim()), scope="s", key="k")
    with pytest.raises(ConfigurationError, match="has ended"):
        claims[0].publish_message("late", to="mail")
    assert post.bodies == []


def test_a_block_publishes_too(idem: Idempotency, post: Post) -> None:
    """Until `complete`, and not after it."""
    with idem.claim(scope="s", key="k") as block:
        block.claim.publish_message("a", to="mail")
        block.complete()
        with pytest.raises(ConfigurationError, match="has ended"):
            block.claim.publish_message("b", to="mail")
    assert post.bodies == ["a"]


def test_an_outcome_that_waits_in_a_marker_keeps_its_messages(
    clock: ManualClock, post: Post, events: list[Event]
) -> None:
    """F57: written through by the next delivery with its messages, which a relay then sends."""

    class Away(MemoryStore):
        is_away = False

        async def finish(self, *args: Any, **kwargs: Any) -> Any:
            if self.is_away:
                raise StoreUnavailableError("away")
            return await super().finish(*args, **kwargs)

    record = Away(clock)
    idem = Idempotency(
        store=TieredStore(MemoryMarker(clock), record), senders={"mail": post}, observers=[events.append]
    )

    def handler() -> str:
        record.is_away = True
        return publish("a", "b")

    with pytest.raises(StoreUnavailableError):
        run(idem, handler, lease=1.0)
    idem.services("blocking").heartbeat.forget_all()  # as if this process had ended
    assert idem.relay().left == 0
    record.is_away = False
    assert run(idem, handler) == "done"
    assert "outcome_written_through" in [event.name.value for event in events]
    assert idem.relay() == RelayReport(sent=2, failed=0, left=0)
    assert post.bodies == ["a", "b"]


UNPROTECTED: list[dict[str, Any]] = [{"enabled": False}, {"shadow": True}]


@pytest.mark.parametrize("policy", UNPROTECTED)
def test_unprotected_runs_send_at_their_end(idem: Idempotency, post: Post, policy: dict[str, Any]) -> None:
    """Disabled or in shadow each run sends, in order, with ids of its own; a handler that raises sends nothing."""
    for _ in range(2):
        run(idem, publish, "a", "b", **policy)
    assert post.bodies == ["a", "b"] * 2
    assert len({message.id for message in post.sent}) == 4

    def raising() -> None:
        publish("c")
        raise LookupError

    with pytest.raises(LookupError):
        run(idem, raising, **policy)
    assert "c" not in post.bodies


def test_a_direct_send_that_fails_is_the_handlers_failure(idem: Idempotency, post: Post) -> None:
    """There is no record that it could wait in."""
    post.is_down = lambda _message: True
    with pytest.raises(OSError, match="network"):
        run(idem, publish, "a", enabled=False)


def test_without_its_store_it_sends_at_its_end(post: Post) -> None:
    """`on_store_unavailable="run"`, when a claim or a finish fails."""

    class Away(MemoryStore):
        is_away = True

        async def claim(self, request: Any) -> Any:
            if self.is_away:
                raise StoreUnavailableError("away")
            return await super().claim(request)

        async def finish(self, *args: Any, **kwargs: Any) -> Any:
            raise StoreUnavailableError("away")

    store = Away()
    idem = Idempotency(store=store, senders={"mail": post}, observers=[])
    assert run(idem, publish, "a", on_store_unavailable="run") == "done"
    store.is_away = False
    assert run(idem, publish, "b", on_store_unavailable="run", lease=1.0) == "done"
    assert post.bodies == ["a", "b"]


def test_records_in_redis_have_no_outbox() -> None:
    """It is said at `publish`, before anything, and nothing is connected to."""
    idem = Idempotency(store=RedisStore("redis://localhost:1/0"), senders={"mail": print})
    with pytest.raises(ConfigurationError, match="needs records in SQL"):
        run(idem, publish, "a", on_store_unavailable="run")
    with pytest.raises(ConfigurationError, match="no outbox"):
        idem.relay()


class Unknown:
    pass


@pytest.mark.parametrize("body", [Unknown(), {"x": Unknown()}, "\ud800", {1, Unknown()}, object])
def test_a_body_that_is_no_json_is_refused_at_publish(idem: Idempotency, post: Post, body: Any) -> None:
    """The handler hears of it, and nothing is recorded."""
    with pytest.raises(MessageError):
        run(idem, publish, body)
    record = idem.get("s", "k")
    assert record is not None
    assert (record.state.value, post.sent) == ("released", [])


def test_a_message_that_is_too_large_is_refused_at_publish(idem: Idempotency, post: Post) -> None:
    """More than 1 MiB as JSON: before anything is recorded, and not when the database refuses it."""
    largest = 1024 * 1024 - len(b'{"body":"","headers":{},"options":{}}')
    assert run(idem, publish, "x" * largest) == "done"
    with pytest.raises(MessageError, match="message 0 has 1048577 bytes as JSON; 1048576 are the most"):
        run(idem, publish, "x" * (largest + 1), key="l")
    assert [len(body) for body in post.bodies] == [largest]


@pytest.mark.parametrize(
    "senders, why",
    [([print], "a dict of functions by their names"), ({"mail": "smtp://"}, "'mail' must be a function")],
)
def test_what_is_no_sender_is_refused(senders: Any, why: str) -> None:
    """When it is given, and not when the first message is to be sent."""
    with pytest.raises(ConfigurationError, match=why):
        Idempotency(store=MemoryStore(), senders=senders)


@pytest.mark.parametrize("name", ["", "m" * (SENDER_CHARACTERS + 1), "m\0", "m\ud800"])
def test_a_sender_has_a_name_that_can_be_kept(name: str) -> None:
    """At once: a database would refuse the outcome with it."""
    Idempotency(store=MemoryStore(), senders={"m" * SENDER_CHARACTERS: print})
    with pytest.raises(ConfigurationError, match="must have a name of 1 to 100 printable characters"):
        Idempotency(store=MemoryStore(), senders={name: print})


@pytest.mark.parametrize("is_loaded", [True, False])
def test_what_is_no_task_is_refused(idem: Idempotency, monkeypatch: pytest.MonkeyPatch, is_loaded: bool) -> None:
    """Also in a process that never imported Celery, and without importing it."""
    if not is_loaded:
        monkeypatch.delitem(sys.modules, "celery", raising=False)
    with pytest.raises(ConfigurationError, match="Celery task or signature, not function"):
        run(idem, lambda: current_claim().publish(publish))
    assert ("celery" in sys.modules) == is_loaded


def test_a_relay_sends_to_celery_without_being_told() -> None:
    """The sender of tasks needs no name of the user's, and is made once."""
    senders = Senders()
    sender = senders.named("celery")
    assert type(sender) is CelerySender
    assert senders.named("celery") is sender


def test_wrong_use_is_refused(idem: Idempotency) -> None:
    """An unknown sender, a coroutine as sender, a limit of nothing."""

    async def sender(message: OutboxMessage) -> None: ...

    with pytest.raises(ConfigurationError, match="no sender is called 'sms'; known: mail"):
        run(idem, lambda: current_claim().publish_message({}, to="sms"))
    with pytest.raises(ConfigurationError, match="plain function"):
        Idempotency(store=MemoryStore(), senders={"mail": sender})  # type: ignore[dict-item]
    with pytest.raises(ConfigurationError, match="limit=0"):
        idem.relay(0)


def test_a_sender_may_check_options(idem: Idempotency) -> None:
    """At `publish_message`: what it does not understand then would never be sent."""

    class Checking(Post):
        def check(self, options: dict[str, Any]) -> None:
            raise ConfigurationError(f"what is {', '.join(options)}?")

    checking = Idempotency(store=MemoryStore(), senders={"mail": Checking()}, observers=[])
    with pytest.raises(ConfigurationError, match=r"what is queu\?"):
        run(checking, lambda: current_claim().publish_message({}, to="mail", queu="x"))


def test_a_forked_child_publishes_nothing(sqlite_url: str, post: Post) -> None:
    """F27: the messages are its parent's, who sends them once."""
    idem = Idempotency(store=SQLStore(sqlite_url), senders={"mail": post}, observers=[])

    def handler() -> int:
        claim = current_claim()
        claim.publish_message("a", to="mail")
        child = os.fork()
        if child == 0:
            refused = 1
            try:
                claim.publish_message("b", to="mail")
            except ConfigurationError:
                refused = len(claim.close_outgoing())
            os._exit(refused)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert run(idem, handler) == 0
    assert post.bodies == ["a"]
    idem.close()


def test_a_store_that_fails_after_the_finish_does_not_fail_the_call(post: Post, events: list[Event]) -> None:
    """The outcome is recorded: that the outbox cannot be reached then is announced."""
    store = MemoryStore()

    async def away(*_args: Any, **_kwargs: Any) -> Any:
        raise StoreUnavailableError("away")

    store.outbox.take = away  # type: ignore[method-assign]
    idem = Idempotency(store=store, senders={"mail": post}, observers=[events.append])
    assert run(idem, publish, "a") == "done"
    assert events[-1].name is EventName.OUTBOX_FAILED
    assert events[-1].details["error"] == "StoreUnavailableError"
