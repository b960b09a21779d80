"""What a marker looks like, and what is told from one."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any

import pytest
from hypothesis import given, strategies as st

from idem_tasks.claims import ClaimRequest, EncodedOutcome, Finished, Lease, State, new_owner
from idem_tasks.errors import StoreError
from idem_tasks.policy import Policy
from idem_tasks.runtime import run_sync
from idem_tasks.stores.base import MarkerFinished, MarkerPending, MarkerRunning, MarkerTaken
from idem_tasks.stores.lua import script
from idem_tasks.stores.marker import Argument, RedisMarkers, milliseconds, place

PLACES = st.tuples(st.text(), st.text())
OUTCOMES = st.builds(
    EncodedOutcome,
    state=st.sampled_from([State.COMPLETED, State.FAILED]),
    body=st.none() | st.binary(),
    codec=st.none() | st.text(max_size=20),
    not_kept=st.none() | st.sampled_from(["too_large", "skipped", "not_encodable"]),
    error_type=st.none() | st.text(),
    error_message=st.none() | st.text(),
)


class OneKey:
    """A server with one key, which remembers what it was told."""

    def __init__(self, standing: bytes | None = None, left: int = 1000) -> None:
        self.standing = standing
        self.left = left
        self.told: tuple[Any, ...] = ()

    async def set_if_absent(self, key: bytes, value: bytes, milliseconds: int) -> bytes | None:
        self.told = (key, value, milliseconds)
        return self.standing

    async def run(self, text: str, key: bytes, *arguments: Argument) -> Any:
        self.told = arguments
        return [None if self.standing is None else (self.standing, self.left)]

    async def run_each(self, text: str, calls: Sequence[tuple[bytes, Sequence[Argument]]]) -> list[Any]:
        raise NotImplementedError

    async def run_over(self, text: str, calls: Sequence[tuple[bytes, Sequence[Argument]]]) -> list[Any]:
        raise NotImplementedError

    async def delete(self, keys: Sequence[bytes]) -> None:
        raise NotImplementedError


def request(**policy: Any) -> ClaimRequest:
    return ClaimRequest("scope", "key", "f" * 64, new_owner(), Policy(**policy))


def taken(standing: bytes | None, left: int = 1000, asked: ClaimRequest | None = None) -> Any:
    return run_sync(RedisMarkers(OneKey(standing, left), "idem:").take(asked or request()))


@given(PLACES, PLACES)
def test_two_places_never_share_a_key(one: tuple[str, str], other: tuple[str, str]) -> None:
    """Only the same scope and key have the same Redis key, wherever their colons and digits are (F51)."""
    assert (place(b"idem:m:", *one) == place(b"idem:m:", *other)) == (one == other)


def test_places_that_could_meet() -> None:
    """Scope and key cannot borrow from one another."""
    scopes = ["a", "a:b", "", "1:a", ":", "\u00e9", "a:1"]
    places = {place(b"", scope, key) for scope in scopes for key in ["a", "b:a", "", "1:a", ":a", "b", ":"]}
    assert len(places) == 49


@pytest.mark.parametrize("seconds, whole", [(0.0, 1), (1e-9, 1), (0.0011, 2), (1.0, 1000), (60, 60_000)])
def test_milliseconds_are_rounded_up_and_never_zero(seconds: float, whole: int) -> None:
    """A lease is never shorter than it was promised to be, and never what Redis refuses."""
    assert milliseconds(seconds) == whole


@given(OUTCOMES, st.none() | st.text(), st.none() | st.integers(0, 2**53), st.floats(0, 1e9))
def test_a_finished_marker_comes_back_as_it_was(
    outcome: EncodedOutcome, fingerprint: str | None, token: int | None, expires_in: float
) -> None:
    """Whatever is published is read back: bytes, presence and absence."""
    server = OneKey()
    published = Finished(outcome, fingerprint, expires_in, token, "trace")
    run_sync(
        RedisMarkers(server, "idem:").publish(ClaimRequest("scope", "key", None, "owner", Policy()), published, 60.0)
    )
    assert server.told[:1] == (b"running:owner:1",)
    assert server.told[-1] == 60_000
    answer = taken(server.told[-2])
    assert isinstance(answer, MarkerFinished)
    assert answer.finished.outcome == outcome
    assert (answer.finished.fingerprint, answer.finished.fencing_token) == (fingerprint, token)
    assert answer.finished.traceparent == "trace"
    assert answer.finished.expires_in == pytest.approx(expires_in, abs=5)


@given(OUTCOMES)
def test_a_pending_marker_comes_back_with_its_fence(outcome: EncodedOutcome) -> None:
    """The owner and token that alone may write it through are in it."""
    server = OneKey()
    lease = Lease(request(retention=3600.0), 1_700_000_000_000_000)
    assert run_sync(RedisMarkers(server, "idem:").keep(lease, outcome))
    *_, value, lifetime = server.told
    assert lifetime == 3_600_000
    answer = taken(value)
    assert isinstance(answer, MarkerPending)
    assert (answer.owner, answer.fencing_token, answer.raw) == (lease.owner, lease.fencing_token, value)
    assert (answer.outcome, answer.fingerprint) == (outcome, lease.request.fingerprint)


def test_a_message_with_a_lone_surrogate_is_kept() -> None:
    """An error text that UTF-8 cannot hold is escaped: nothing fails after an effect."""
    server = OneKey()
    failure = EncodedOutcome(State.FAILED, error_type="E", error_message="\ud800 broken")
    run_sync(RedisMarkers(server, "idem:").publish(request(), Finished(failure, None, 1.0), 1.0))
    answer = taken(server.told[-2])
    assert answer.finished.outcome.error_message == "\\ud800 broken"


def test_whose_running_marker_it_is() -> None:
    """Our own is taken, another's runs for as long as it has left."""
    asked = request()
    assert taken(None) == MarkerTaken()
    assert taken(f"running:{asked.owner}:other fingerprint".encode(), asked=asked) == MarkerTaken()
    assert taken(b"running:other:", left=1500) == MarkerRunning(1.5)
    assert taken(b"running:other:", left=0) == MarkerRunning(0.0)


def finished_marker() -> bytes:
    server = OneKey()
    outcome = Finished(EncodedOutcome(body=b"1", codec="json"), None, 1.0)
    run_sync(RedisMarkers(server, "idem:").publish(request(), outcome, 1.0))
    value: bytes = server.told[-2]
    return value


@pytest.mark.parametrize(
    "now_standing, expected",
    [
        (None, MarkerTaken),
        (finished_marker(), MarkerFinished),
        (b"running:other:", MarkerRunning),
        (b"running:a third one:", MarkerRunning),
    ],
    ids=["gone", "finished", "the same", "another"],
)
def test_what_ends_between_two_looks_is_told_as_it_is_now(now_standing: bytes | None, expected: type) -> None:
    """The long life of an outcome is never taken for that of the lease which it replaced."""

    class TwoLooks(OneKey):
        async def run(self, text: str, key: bytes, *arguments: Argument) -> Any:
            self.standing = now_standing
            return await super().run(text, key, *arguments)

    answer = run_sync(RedisMarkers(TwoLooks(b"running:other:", 86_400_000), "idem:").take(request()))
    assert type(answer) is expected
    if isinstance(answer, MarkerRunning):
        assert answer.retry_after == 86_400


def test_a_pending_marker_without_a_fence_is_an_error() -> None:
    """Without a fencing token nobody could write it to the record."""
    with pytest.raises(StoreError, match="no marker that this version can read"):
        taken(finished_marker().replace(b"finished:", b"pending:owner:", 1))


@pytest.mark.parametrize(
    "value", [b"", b"x", b"finished:", b"finished:\xc0", b"pending:", b"pending:o:", b"pending:o:\x90", b"\xff\xfe:"]
)
def test_what_cannot_be_read_is_an_error(value: bytes) -> None:
    """No guess is made about a value that is no marker: the error lets the record decide."""
    with pytest.raises(StoreError, match="no marker that this version can read"):
        taken(value)


def test_a_newer_version_may_add_to_a_marker() -> None:
    """Fields that a later version puts last are passed over, so both versions can run during an upgrade."""
    server = OneKey()
    outcome = EncodedOutcome(body=b"1", codec="json")
    run_sync(RedisMarkers(server, "idem:").publish(request(), Finished(outcome, None, 1.0), 1.0))
    value: bytes = server.told[-2]
    head = len(b"finished:")
    newer = value[:head] + bytes([value[head] + 1]) + value[head + 1 :] + b"\xc3"
    answer = taken(newer)
    assert answer.finished.outcome == outcome


def test_every_script_says_what_it_promises() -> None:
    """Each begins with a comment, and what is sent has none of it."""
    names = [path.name for path in resources.files("idem_tasks.stores.lua").iterdir() if path.name.endswith(".lua")]
    assert len(names) >= 7
    for name in names:
        text = (resources.files("idem_tasks.stores.lua") / name).read_text("utf-8")
        assert text.startswith("-- ")
        assert "\n--" not in "\n" + script(name.removesuffix(".lua"))
