"""What becomes of a message once its call ended, whatever the broker."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from operator import itemgetter
from typing import Any

import pytest

from idem_tasks import Event, Idempotency, MemoryStore, idempotent_task
from idem_tasks.errors import (
    ConfigurationError,
    DuplicateError,
    FingerprintMismatchError,
    InDoubtError,
    InProgressError,
    InvalidKeyError,
    LeaseLostError,
    OutcomeError,
    ParkedError,
    ReplayedFailureError,
    StepsChangedError,
    StoreConfigurationError,
    StoreUnavailableError,
)
from idem_tasks.integrations.settling import (
    COUNT_HEADER,
    Acknowledge,
    DeadLetter,
    MessageHandler,
    PutBack,
    Settlement,
    key_in_headers,
    times_put_back,
)


class Made:
    """A handler, and what its observers heard."""

    def __init__(self, work: Callable[[str], Any], **options: Any) -> None:
        self.events: list[Event] = []
        self.idem = Idempotency(store=MemoryStore(), observers=[self.events.append])
        self.handler = MessageHandler(
            work, runtime="blocking", key="{body}", scope="orders",
            fingerprint=None, idempotency=self.idem, **options,
        )  # fmt: skip

    def settle(self, error: BaseException | None, count: int = 0, **options: Any) -> Settlement:
        return self.handler.settle(error, count, "orders", ("A-1",), {}, **options)

    def deliver(self, count: int = 0) -> Settlement:
        try:
            self.handler.function("A-1")
        except BaseException as error:  # noqa: BLE001 - as a consumer does
            return self.settle(error, count)
        return self.settle(None, count)


def handled(body: str) -> str:
    return body


def failing(body: str) -> str:
    raise ValueError(f"cannot handle {body}")


@pytest.fixture
def make() -> Iterator[Callable[..., Made]]:
    made: list[Made] = []

    def new(work: Callable[[str], Any] = handled, **options: Any) -> Made:
        made.append(Made(work, **options))
        return made[-1]

    yield new
    for each in made:
        each.idem.close()


MakeHandler = Callable[..., Made]

COMES_AGAIN = [
    InProgressError(scope="orders", key="A-1"),
    LeaseLostError(scope="orders", key="A-1"),
    StoreUnavailableError("away"),
    StoreConfigurationError("no table"),
    ValueError("the handler's own"),
    ConfigurationError("nothing is configured"),
    SystemExit(1),
    KeyboardInterrupt(),
]


def test_what_returned_is_acknowledged(make: MakeHandler) -> None:
    """Whether the handler ran or its outcome was replayed; nothing is announced."""
    made = make()
    assert [made.deliver(), made.deliver()] == [Acknowledge(), Acknowledge()]
    assert {event.name.value for event in made.events} == {"granted", "completed", "replayed"}


@pytest.mark.parametrize("error", [DuplicateError(scope="orders", key="A-1"), OutcomeError("not kept")], ids=repr)
def test_what_ran_before_is_acknowledged(make: MakeHandler, error: Exception) -> None:
    """There is nothing left to run, though there is no value either."""
    assert make().settle(error) == Acknowledge()


def test_what_only_a_person_can_mend_is_said(make: MakeHandler, caplog: pytest.LogCaptureFixture) -> None:
    """The message comes again, and what to change is in the log each time."""
    assert isinstance(make().settle(ConfigurationError("give session= a sessionmaker")), PutBack)
    assert "give session= a sessionmaker" in caplog.text


@pytest.mark.parametrize("error", [DuplicateError("of another call"), OutcomeError("of another call")], ids=repr)
def test_what_the_handler_let_through_is_no_sign_that_it_ran_before(make: MakeHandler, error: Exception) -> None:
    """It called another idempotent function, and its own work was released: its message comes again (F31)."""

    def work(body: str) -> None:
        raise error

    assert isinstance(make(work).deliver(), PutBack)
    assert isinstance(make(partial(work)).deliver(), PutBack)
    assert isinstance(make(Called(error)).deliver(), PutBack)


class Called:
    """A handler that is an object."""

    __qualname__ = "Called"

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __call__(self, body: str) -> None:
        raise self._error


@pytest.mark.parametrize("error", COMES_AGAIN, ids=lambda error: type(error).__name__)
def test_what_has_to_come_again_is_put_back(make: MakeHandler, error: BaseException) -> None:
    """With the count that its copy has, and announced with the key (F31, F59)."""
    made = make()
    settled = made.settle(error, 2)
    assert isinstance(settled, PutBack)
    assert (settled.count, settled.reason) == (3, type(error).__name__)
    [event] = made.events
    assert (event.name.value, event.scope, event.key) == ("put_back", "orders", "A-1")
    assert event.details == {"count": 3, "delay": round(settled.delay, 3), "reason": settled.reason}


@pytest.mark.parametrize(
    "error, reason",
    [
        (ParkedError(scope="orders", key="A-1"), "parked"),
        (StepsChangedError(scope="orders", key="A-1"), "parked"),
        (InDoubtError(scope="orders", key="A-1"), "in_doubt"),
        (FingerprintMismatchError(scope="orders", key="A-1"), "fingerprint_mismatch"),
        (InvalidKeyError("the key is None"), "invalid_key"),
        (ReplayedFailureError(error_type="Refused", error_message="secret"), "failed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_be_refused_each_time_is_a_dead_letter(make: MakeHandler, error: Exception, reason: str) -> None:
    """Its headers say why, and nothing of what the error says."""
    made = make()
    settled = made.settle(error)
    assert isinstance(settled, DeadLetter)
    known = {"idem_tasks_scope": "orders", "idem_tasks_key": "A-1"} if hasattr(error, "key") else {}
    assert settled.headers == {
        "idem_tasks_reason": reason,
        "idem_tasks_error_type": type(error).__name__,
        "idem_tasks_origin": "orders",
        **known,
    }
    [event] = made.events
    told = {"error": "the key is None"} if reason == "invalid_key" else {}  # which names no value
    assert (event.name.value, event.details) == ("dead_lettered", {"reason": reason, "origin": "orders", **told})


def test_a_final_failure_is_a_dead_letter_each_time(make: MakeHandler) -> None:
    """The first time as it was raised, then as it is replayed."""
    made = make(failing, record_failures=ValueError)
    settled = [made.deliver(), made.deliver()]
    assert [isinstance(each, DeadLetter) and each.reason for each in settled] == ["failed", "failed"]


def test_a_handler_that_fails_too_often_is_parked_and_then_a_dead_letter(make: MakeHandler) -> None:
    """Put back until `max_attempts`."""
    made = make(failing, max_attempts=2)
    settled = [made.deliver(count) for count in range(3)]
    assert [type(each) for each in settled] == [PutBack, PutBack, DeadLetter]


def test_a_handler_that_fails_can_be_a_dead_letter_at_once(make: MakeHandler) -> None:
    """With on_error="dead_letter"; what is only in progress comes again all the same."""
    made = make(failing, on_error="dead_letter")
    settled = made.deliver()
    assert isinstance(settled, DeadLetter)
    assert (settled.reason, settled.headers["idem_tasks_error_type"]) == ("handler_error", "ValueError")
    assert isinstance(made.settle(InProgressError(scope="orders", key="A-1")), PutBack)


def test_what_a_handler_raises_is_logged(make: MakeHandler, caplog: pytest.LogCaptureFixture) -> None:
    """With its traceback, for nobody else does; what we raise for it is announced, and not logged here."""
    made = make(failing)
    with caplog.at_level(logging.ERROR, "idem_tasks"):
        made.settle(InProgressError(scope="orders", key="A-1"))
        made.settle(StoreConfigurationError("no such table"))
        made.settle(KeyboardInterrupt())
        assert caplog.records == []
        made.deliver()
    [record] = caplog.records
    assert record.message == "the handler of a message of orders raised"
    assert record.exc_info


def of_other_arguments() -> None:
    """Takes no message."""


def no_key(body: str) -> str:
    return {"id": "A-1"}[body]


@pytest.mark.parametrize(
    "work, options, settled, told",
    [
        (of_other_arguments, {}, PutBack, "the handler of a message of orders could not be called"),
        (handled, {"key": no_key}, DeadLetter, "no key could be taken from a message of orders"),
        (handled, {"scope": no_key}, DeadLetter, "no key could be taken from a message of orders"),
        (handled, {"fingerprint": no_key}, DeadLetter, "no key could be taken from a message of orders"),
        (handled, {"key": itemgetter("id")}, DeadLetter, "no key could be taken from a message of orders"),
    ],
    ids=["arguments", "key", "scope", "fingerprint", "built in"],
)
def test_what_keeps_a_handler_from_being_called_is_logged(
    caplog: pytest.LogCaptureFixture,
    work: Callable[..., Any],
    options: dict[str, Any],
    settled: type[Settlement],
    told: str,
) -> None:
    """A handler of other arguments is mended, and its messages come again; one without a key is a dead letter."""
    given: dict[str, Any] = {"key": lambda body: body, "scope": "orders", "fingerprint": None, **options}
    handler = MessageHandler(work, runtime="blocking", idempotency=Idempotency(store=MemoryStore()), **given)
    with pytest.raises((TypeError, KeyError)) as raised:
        handler.function("A-2")
    with caplog.at_level(logging.ERROR, "idem_tasks"):
        settlement = handler.settle(raised.value, 0, "orders", ("A-2",), {})
    assert isinstance(settlement, settled)
    assert caplog.messages[0] == told
    assert caplog.records[0].exc_info
    if isinstance(settlement, DeadLetter):
        assert settlement.reason == "invalid_key"


def test_what_a_handler_of_batches_returned_is_logged(make: MakeHandler, caplog: pytest.LogCaptureFixture) -> None:
    """An exception in the place of an outcome was never raised; it is the handler's all the same."""
    with caplog.at_level(logging.ERROR, "idem_tasks"):
        assert isinstance(make().settle(ValueError("no such order")), PutBack)
    assert caplog.messages == ["the handler of a message of orders returned an exception for it"]


def test_a_set_up_that_is_wrong_is_logged_with_what_mends_it(
    make: MakeHandler, caplog: pytest.LogCaptureFixture
) -> None:
    """Its message comes again, and the event tells no more than the error's type."""
    with caplog.at_level(logging.ERROR, "idem_tasks"):
        assert isinstance(make().settle(ConfigurationError("give the engine to configure()")), PutBack)
    assert caplog.messages == ["a message of orders is not done: give the engine to configure()"]


def test_delays_double_up_to_the_longest(make: MakeHandler) -> None:
    """From half a second, with up to a fifth more, so that duplicates do not come back together."""
    made = make(longest_delay=10.0)
    for count, least in enumerate([0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]):
        assert least <= delay(made.settle(ValueError(), count)) <= least * 1.2
    assert 10.0 <= delay(made.settle(ValueError(), 10**6)) <= 12.0


def test_what_is_in_progress_waits_for_the_rest_of_the_lease(make: MakeHandler) -> None:
    """Not longer than the longest delay."""
    made = make(longest_delay=10.0)
    assert 3.0 <= delay(made.settle(InProgressError(scope="s", key="k", retry_after=3.0))) <= 3.6
    assert 10.0 <= delay(made.settle(InProgressError(scope="s", key="k", retry_after=60.0))) <= 12.0


@pytest.mark.parametrize("retry_after", [3600, "soon", None], ids=str)
def test_a_retry_after_of_the_handlers_own_error_is_not_ours(make: MakeHandler, retry_after: object) -> None:
    """It may be anything: the answer of a web server, say."""
    error = ValueError()
    error.retry_after = retry_after  # type: ignore[attr-defined]
    assert delay(make().settle(error)) <= 0.6


def test_a_delay_stays_below_a_quarter_of_what_the_broker_allows(make: MakeHandler) -> None:
    """Or the broker would deliver again what is held (F64)."""
    made = make(longest_delay=3600.0)
    error = InProgressError(scope="s", key="k", retry_after=3600.0)
    assert all(delay(made.settle(error, 20, hold_limit=8.0)) < 2.0 for _ in range(100))
    assert delay(made.settle(error, 20)) >= 3600.0


def delay(settled: Settlement) -> float:
    assert isinstance(settled, PutBack)
    return settled.delay


def test_without_a_road_a_dead_letter_is_put_back(make: MakeHandler, caplog: pytest.LogCaptureFixture) -> None:
    """As late as possible, with an error in the log that names what to give; it is not announced as a dead letter."""
    made = make(missing_road="dead_letter_exchange=", longest_delay=10.0)
    with caplog.at_level(logging.ERROR, "idem_tasks"):
        assert delay(made.settle(ParkedError(scope="orders", key="A-1"))) >= 10.0
    assert "should be a dead letter (parked), and has nowhere to go: give dead_letter_exchange=;" in caplog.text
    assert [event.name.value for event in made.events] == ["put_back"]


def test_a_message_without_a_key_is_announced_without(make: MakeHandler) -> None:
    """Neither its key nor its scope is known."""
    made = make()
    assert isinstance(made.handler.settle(InvalidKeyError("it is None"), 0, "orders", (None,), {}), DeadLetter)
    [event] = made.events
    assert (event.name.value, event.scope, event.key) == ("dead_lettered", "", "")


def test_a_message_is_settled_though_nothing_is_configured(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It comes again, and the log says that nobody could be told."""
    error = ConfigurationError("no such driver")

    def refuse() -> Idempotency:
        raise error

    monkeypatch.setattr("idem_tasks.config.default_idempotency", refuse)
    handler = MessageHandler(handled, runtime="blocking", key="{body}", scope="orders", fingerprint=None)
    with caplog.at_level(logging.ERROR, "idem_tasks"):
        assert isinstance(handler.settle(error, 0, "orders", ("A-1",), {}), PutBack)
    assert "put_back is not announced" in caplog.text


# At decoration


def test_a_handler_that_is_decorated_keeps_its_own_key(make: MakeHandler) -> None:
    """Its scope and fingerprint too."""

    @idempotent_task(key="own {body}", scope="own", idempotency=(idem := Idempotency(store=MemoryStore())))
    def work(body: str) -> str:
        return body

    with idem:
        handler = MessageHandler(work, runtime="blocking", key="{body}", scope="orders", fingerprint=None, session=None)
        assert (handler.function, handler.task.key_for("A-1")) == (work, "own A-1")
        with pytest.raises(ConfigurationError, match="decorated with @idempotent_task already: give lease, session"):
            MessageHandler(
                work, runtime="blocking", key="{body}", scope="s", fingerprint=None, session=object(), lease=1.0
            )


def test_a_handler_of_the_other_runtime_is_refused(make: MakeHandler) -> None:
    """With the words of the fix."""

    async def work(body: str) -> None: ...

    with pytest.raises(ConfigurationError, match="work is an async def, and this consumer runs plain def handlers"):
        make(work)
    with pytest.raises(ConfigurationError, match="handled is a plain def, and this consumer runs async def handlers"):
        MessageHandler(handled, runtime="asyncio", key="{body}", scope="s", fingerprint=None)


@pytest.mark.parametrize(
    "options, named",
    [({"on_error": "drop"}, "on_error='drop'"), ({"longest_delay": 0}, "longest_delay=0"), ({"leese": 1}, "leese")],
    ids=str,
)
def test_wrong_options_are_refused(make: MakeHandler, options: dict[str, Any], named: str) -> None:
    """By name."""
    with pytest.raises(ConfigurationError, match=named):
        make(**options)


# Headers


@pytest.mark.parametrize(
    "headers, key",
    [
        (None, None),
        ({}, None),
        ({"Idempotency-Key": "k"}, "k"),
        ({"idempotency_key": b"k"}, "k"),
        ({"IDEMPOTENCY-KEY": 17}, "17"),
        ({"Idempotency-Key": "", "idempotency_key": "k"}, "k"),
        ({"ce_source": b"/shop", "ce_id": b"1"}, "/shop 1"),
        ({"ce-source": "/shop", "ce-id": "1"}, "/shop 1"),
        ({"cloudEvents:source": "/shop", "cloudEvents:id": "1"}, "/shop 1"),
        ({"cloudEvents_source": "/shop", "cloudEvents_id": "1"}, "/shop 1"),
        ({"ce_id": "1"}, None),
        ({"ce_source": "/shop", "ce-id": "1"}, None),
        ({"ce_source": "/shop", "ce_id": "1", "Idempotency-Key": "k"}, "k"),
        ({"Idempotency-Key": b"\xff"}, "\\xff"),
    ],
    ids=str,
)
def test_the_key_in_the_headers(headers: dict[str, Any] | None, key: str | None) -> None:
    """That of the publisher, else source and id of a CloudEvent together."""
    assert key_in_headers(headers) == key


@pytest.mark.parametrize(
    "value, times",
    [(None, 0), (3, 3), ("3", 3), (b"3", 3), (-1, 0), ("x", 0), (2.5, 0), (10**30, 10**6), ("9" * 5000, 0)],
    ids=lambda value: str(value)[:9],
)
def test_the_count_in_the_headers(value: object, times: int) -> None:
    """Whatever somebody wrote there, it is a number that fits everywhere."""
    assert times_put_back({COUNT_HEADER: value}) == times
    assert times_put_back(None) == 0
