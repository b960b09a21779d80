"""What is kept of a handler's ending is what its duplicates get, and never code."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from idem_tasks import Idempotency, MemoryStore, Policy
from idem_tasks.call import Call
from idem_tasks.claims import ClaimRequest, EncodedOutcome, Finished, State
from idem_tasks.errors import DuplicateError, OutcomeError, ReplayedFailureError
from idem_tasks.events import Event, EventName
from idem_tasks.outcomes import UNANNOTATED
from idem_tasks.replay import (
    MAX_ERROR_MESSAGE,
    keep,
    keep_failure,
    message_of,
    outcome_of_another,
    recorded_failure,
    replay,
    type_name,
    value_of,
)

events: list[Event] = []


def call(fingerprint: str | None = None, **policy: Any) -> Call:
    events.clear()
    idem = Idempotency(store=MemoryStore(), observers=[events.append])
    request = ClaimRequest("s", "A-1", fingerprint, "owner", Policy(**policy))
    return Call(request, idem.services("blocking"), lambda: UNANNOTATED)


def finished(outcome: EncodedOutcome, fingerprint: str | None = None) -> Finished:
    return Finished(outcome, fingerprint, 60.0)


def failure(kind: type[BaseException], message: str) -> EncodedOutcome:
    return EncodedOutcome(State.FAILED, error_type=type_name(kind), error_message=message)


class DeclinedError(Exception):
    """The bank said no."""


class ShoutingError(Exception):
    """Changes its text: rebuilt from it, it would say something else."""

    def __init__(self, text: str) -> None:
        super().__init__(text.upper() + "!")


class FailingError(Exception):
    """Cannot be made again."""

    def __init__(self, *args: object) -> None:
        raise ZeroDivisionError


class QuotingError(KeyError):
    """Its text is the repr of what it was made with."""


@pytest.mark.parametrize("size", [10, 11])
def test_the_limit_is_on_what_is_stored(size: int) -> None:
    """As many bytes as the limit are kept, one more is not."""
    kept = keep(call(max_outcome_bytes=12), "x" * size)
    assert (kept.body is None, kept.not_kept) == ((False, None) if size == 10 else (True, "too_large"))


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interruption_while_encoding_is_no_fault_of_the_value(kind: type[BaseException]) -> None:
    """It goes on, and nothing is recorded as if it could not be encoded."""

    class Struck:
        name = "struck"

        def encode(self, *_: Any) -> bytes:
            try:
                raise kind
            except kind as error:
                raise OSError("wrapped by the codec") from error

    made = call()
    object.__setattr__(made.services, "codec", Struck())
    with pytest.raises(OSError, match="wrapped"):
        keep(made, 1)
    assert events == []


@pytest.mark.parametrize("on_duplicate", ["replay", "raise"])
def test_an_interruption_while_decoding_comes_out_as_itself(on_duplicate: str) -> None:
    """A codec that takes it for damaged bytes does not make it final, nor an outcome that cannot be shown."""
    struck = SystemExit()

    class Struck:
        name = "struck"

        def decode(self, *_: Any) -> Any:
            try:
                raise struck
            except SystemExit:
                raise OutcomeError("damaged") from None

    made = call(on_duplicate=on_duplicate)
    object.__setattr__(made.services, "codec", Struck())
    with pytest.raises(SystemExit) as raised:
        replay(made, finished(EncodedOutcome(body=b"1", codec="struck")))
    assert raised.value is struck


def test_an_interruption_that_is_handled_already_is_not_raised_again() -> None:
    """A duplicate within `except SystemExit:` whose outcome is damaged is told just that."""
    try:
        raise SystemExit
    except SystemExit:
        with pytest.raises(OutcomeError, match="cannot be decoded"):
            replay(call(), finished(EncodedOutcome(body=b"{", codec="json")))
        with pytest.raises(DuplicateError):
            replay(call(on_duplicate="raise"), finished(EncodedOutcome(body=b"{", codec="json")))


def test_a_reason_never_shows_a_value() -> None:
    """What a codec's error says of the value is not logged; its type is."""

    class Talking:
        name = "talking"

        def encode(self, value: Any, *_: Any) -> bytes:
            raise ValueError(f"cannot encode {value}")

    made = call()
    object.__setattr__(made.services, "codec", Talking())
    assert keep(made, "secret").not_kept == "not_encodable"
    assert "secret" not in str(events)
    assert events[0].details["reason"] == "ValueError"


@pytest.mark.parametrize("message", ["no", "", "a\nb", "\u00e9\u4e2d\U0001f600", "{} %s"])
def test_a_failure_comes_back_as_its_own_type(message: str) -> None:
    """With its text, if the policy names exactly this type."""
    kept = keep_failure(DeclinedError(message))
    rebuilt = recorded_failure(Policy(record_failures=(DeclinedError,)), kept)
    assert type(rebuilt) is DeclinedError
    assert str(rebuilt) == message


@pytest.mark.parametrize(
    "kinds, raised",
    [
        ((Exception,), DeclinedError),
        ((ShoutingError,), ShoutingError),
        ((FailingError,), FailingError),
        ((), DeclinedError),
        ((OSError,), FileNotFoundError),
    ],
    ids=str,
)
def test_a_failure_that_cannot_be_rebuilt_is_replayed_by_name(
    kinds: tuple[type[Exception], ...], raised: type[Exception]
) -> None:
    """A subclass, a constructor that fails or changes the text, a type no longer named: its name and its text."""
    replayed = recorded_failure(Policy(record_failures=kinds), failure(raised, "the text"))
    assert isinstance(replayed, ReplayedFailureError)
    assert (replayed.error_type, replayed.error_message) == (type_name(raised), "the text")


def test_an_error_that_quotes_its_argument_is_not_quoted_twice() -> None:
    """KeyError("A-1") says 'A-1', with quotes; replayed it says the same or is replayed by name."""
    kept = keep_failure(QuotingError("A-1"))
    replayed = recorded_failure(Policy(record_failures=(QuotingError,)), kept)
    assert kept.error_message == "'A-1'"
    assert "'A-1'" in str(replayed)


def test_a_record_never_imports_anything() -> None:
    """A name that somebody wrote into the table is text, whatever module it says."""
    before = set(sys.modules)
    planted = EncodedOutcome(State.FAILED, error_type="antigravity.Error", error_message="x")
    replayed = recorded_failure(Policy(record_failures=(Exception, DeclinedError)), planted)
    assert isinstance(replayed, ReplayedFailureError)
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    "text, kept",
    [("x" * 5000, "x" * MAX_ERROR_MESSAGE), ("a\0b", "ab"), ("\ud800", "?"), ("", "")],
    ids=["long", "nul", "surrogate", "empty"],
)
def test_an_exceptions_text_is_made_storable(text: str, kept: str) -> None:
    """Cut to length, without NUL and lone surrogates, which databases refuse after the effect."""
    assert message_of(Exception(text)) == kept


def test_every_reason_for_a_missing_outcome_is_told() -> None:
    """A duplicate of an outcome that was not kept is an error that says why, except under `skip`."""
    for reason, words in (("too_large", "max_outcome_bytes"), ("not_encodable", "could not be encoded")):
        with pytest.raises(OutcomeError, match=words):
            value_of(call(), EncodedOutcome(not_kept=reason))  # type: ignore[arg-type]
    with pytest.raises(OutcomeError, match="not known"):
        value_of(call(), EncodedOutcome())
    assert value_of(call(), EncodedOutcome(not_kept="skipped")) is None


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"$typed":1}', b'{"$nothing": 1}'])
def test_an_outcome_that_cannot_be_read_is_an_error(body: bytes) -> None:
    """Damaged bytes are never taken for a value, and the handler is not run again."""
    with pytest.raises(OutcomeError):
        value_of(call(), EncodedOutcome(body=body, codec="json"))


def test_a_duplicate_error_of_an_unreadable_outcome_has_none() -> None:
    """`raise` tells of the duplicate, whatever its outcome is worth."""
    with pytest.raises(DuplicateError) as caught:
        replay(call(on_duplicate="raise"), finished(EncodedOutcome(body=b"{", codec="json")))
    assert caught.value.outcome is None


def test_skip_replays_failures_as_nothing_too() -> None:
    """Under `skip` every duplicate is None, also that of a recorded failure."""
    assert replay(call(on_duplicate="skip"), finished(failure(DeclinedError, "no"))) is None


def test_unknown_fingerprints_match() -> None:
    """Arguments are compared as far as both sides know them."""
    done = EncodedOutcome(body=b"1", codec="json")
    for own, other in ((None, "f"), ("f", None), ("f", "f"), (None, None)):
        assert replay(call(own), finished(done, other)) == 1
        assert outcome_of_another(call(own), finished(done, other)) == 1
    assert [event.name for event in events] == []
    replay(call(), finished(done))
    assert [event.name for event in events] == [EventName.REPLAYED]
