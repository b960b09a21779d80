"""What a person does to a record is told: in the audit, in an event, and by whom."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from idem_tasks import Event, EventName, Idempotency, MemoryStore, Record, State
from idem_tasks.claims import person_name
from idem_tasks.errors import ConfigurationError, ConflictError, ReplayedFailureError
from idem_tasks.policy import Policy

HOLD = Policy(on_crash="hold")


class DeclinedError(Exception):
    """The bank said no."""


def raising() -> None:
    raise TimeoutError


@pytest.fixture
def heard() -> list[Event]:
    return []


@pytest.fixture
def idem(heard: list[Event]) -> Idempotency:
    return Idempotency(store=MemoryStore(), observers=[heard.append])


def in_doubt(idem: Idempotency, key: str = "A-1") -> Record:
    with pytest.raises(TimeoutError):
        idem.run(raising, scope="charge", key=key, policy=HOLD)
    record = idem.get("charge", key)
    assert record is not None
    return record


def test_what_a_person_did_is_audited_and_announced(idem: Idempotency, heard: list[Event]) -> None:
    """The event has all that the audit has: it is all there is where no audit is kept."""
    seen = in_doubt(idem)
    record = idem.resolve("charge", "A-1", outcome="receipt 17", reason="seen at the bank", actor="ann")
    assert record is not None
    [entry] = idem.audit()
    assert (entry.actor, entry.reason, entry.action) == ("ann", "seen at the bank", "resolve")
    assert heard[-1] == Event(
        EventName.RESOLVED,
        "charge",
        "A-1",
        {
            "action": "resolve",
            "actor": "ann",
            "reason": "seen at the bank",
            "state_before": "in_doubt",
            "state_after": "completed",
            "token_before": seen.fencing_token,
            "token_after": record.fencing_token,
        },
    )
    assert idem.forget("charge", "A-1")
    assert heard[-1].name is EventName.FORGOTTEN
    assert [entry.action for entry in idem.audit("charge", "A-1")] == ["forget", "resolve"]


def test_who_does_not_say_who_they_are_is_user_at_host(idem: Idempotency) -> None:
    """The default names the account and the machine."""
    in_doubt(idem)
    idem.resolve("charge", "A-1", rerun=True)
    assert idem.audit()[0].actor == person_name()
    assert "@" in person_name()


def test_a_user_without_a_name_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in many containers."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 98765)
    assert person_name().startswith("98765@")


@pytest.mark.parametrize("error", [DeclinedError("card expired"), f"{__name__}.DeclinedError: card expired"])
def test_a_person_may_say_that_it_failed(idem: Idempotency, error: Any) -> None:
    """Every later delivery gets that failure, as one that a handler ended with."""
    in_doubt(idem)
    record = idem.resolve("charge", "A-1", error=error)
    assert record is not None
    assert (record.state, record.error_message) == (State.FAILED, "card expired")
    assert idem.audit()[0].action == "fail"
    with pytest.raises(ReplayedFailureError, match="card expired"):
        idem.run(raising, scope="charge", key="A-1")
    with pytest.raises(DeclinedError, match="card expired"):
        idem.run(raising, scope="charge", key="A-1", policy=Policy(record_failures=(DeclinedError,)))


@pytest.mark.parametrize(
    "said", [{}, {"outcome": 1, "rerun": True}, {"error": "E: x", "rerun": True}, {"outcome": 1, "error": "E"}]
)
def test_a_person_says_one_thing(idem: Idempotency, said: dict[str, Any]) -> None:
    """An outcome, a failure or a rerun."""
    in_doubt(idem)
    with pytest.raises(ConfigurationError, match="one of"):
        idem.resolve("charge", "A-1", **said)
    assert idem.audit() == []


def test_a_late_answer_ends_no_later_doubt(idem: Idempotency, heard: list[Event]) -> None:
    """With the token that was seen, what has moved on is left alone, and nothing is announced."""
    seen = in_doubt(idem).fencing_token
    idem.resolve("charge", "A-1", rerun=True)
    in_doubt(idem)
    before = len(heard)
    for act in (lambda: idem.resolve("charge", "A-1", outcome=1, expect_token=seen),
                lambda: idem.forget("charge", "A-1", expect_token=seen)):  # fmt: skip
        with pytest.raises(ConflictError, match="has changed since you looked"):
            act()
    assert len(heard) == before


def test_what_is_not_there_is_not_audited(idem: Idempotency, heard: list[Event]) -> None:
    """Nothing was done."""
    assert idem.resolve("charge", "A-1", rerun=True) is None
    assert not idem.forget("charge", "A-1")
    assert (idem.audit(), heard) == ([], [])


def test_a_key_is_asked_for_with_its_scope(idem: Idempotency) -> None:
    """Keys of two scopes are not one."""
    with pytest.raises(ConfigurationError, match="with its scope"):
        idem.audit(key="A-1")


def test_from_asyncio(idem: Idempotency) -> None:
    """The same verbs, with the same words."""
    in_doubt(idem)

    async def act() -> None:
        record = await idem.aresolve("charge", "A-1", error="bank.Declined: no", reason="phone", actor="ann")
        assert record is not None
        assert record.state is State.FAILED
        assert await idem.aforget("charge", "A-1", reason="again", actor="bob", expect_token=record.fencing_token)
        assert [(e.action, e.actor, e.reason) for e in await idem.aaudit("charge", "A-1")] == [
            ("forget", "bob", "again"),
            ("fail", "ann", "phone"),
        ]
        assert len(await idem.aaudit(limit=1)) == 1

    asyncio.run(act())


def test_memory_keeps_the_last_thousand(idem: Idempotency) -> None:
    """A process that runs for long does not fill up."""
    for number in range(1010):
        idem.run(str, scope="charge", key=str(number))
        idem.forget("charge", str(number))
    entries = idem.audit(limit=5000)
    assert (len(entries), entries[0].key, entries[-1].key) == (1000, "1009", "10")


def test_records_can_be_read_in_parts(idem: Idempotency) -> None:
    """So many after a place, or only those that a person should look at."""
    for key in ("A-1", "A-2", "A-3"):
        in_doubt(idem, key)
    idem.run(str, scope="charge", key="A-0")
    assert [record.key for record in idem.records(limit=2)] == ["A-0", "A-1"]
    assert [record.key for record in idem.records(after=("charge", "A-1"))] == ["A-2", "A-3"]
    assert [record.key for record in idem.records(attention=True, limit=1)] == ["A-1"]
    assert list(idem.records(limit=0)) == []
