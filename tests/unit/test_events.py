"""Events reach every observer, and watching never disturbs a claim."""

from __future__ import annotations

import logging

import pytest

from idem_tasks.events import Announcer, Event, EventName, log_event


def test_every_observer_hears_in_order() -> None:
    """All observers get the same event, in the order they were given."""
    heard: list[tuple[str, Event]] = []
    announce = Announcer([lambda event: heard.append(("first", event)), lambda event: heard.append(("second", event))])
    announce(EventName.GRANTED, "shop.charge", "A-1", attempt=2)
    expected = Event(EventName.GRANTED, "shop.charge", "A-1", {"attempt": 2})
    assert heard == [("first", expected), ("second", expected)]


def test_an_observer_that_raises_is_logged_and_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    """One broken observer disturbs neither the claim nor the other observers."""
    heard: list[Event] = []

    def broken(event: Event) -> None:
        raise ZeroDivisionError

    Announcer([broken, heard.append])(EventName.COMPLETED, "s", "k")
    assert [event.name for event in heard] == [EventName.COMPLETED]
    assert "raised on completed" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_a_shutdown_in_an_observer_is_not_swallowed() -> None:
    """SystemExit and its like are never hidden."""

    def stopping(event: Event) -> None:
        raise SystemExit

    with pytest.raises(SystemExit):
        Announcer([stopping])(EventName.GRANTED)


def test_without_observers_nothing_happens(caplog: pytest.LogCaptureFixture) -> None:
    """An announcer of nobody is silent."""
    with caplog.at_level(logging.DEBUG):
        Announcer(())(EventName.PARKED, "s", "k")
    assert caplog.records == []


def test_the_default_observer_is_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Without a choice, events are logged."""
    Announcer()(EventName.PARKED, "shop.charge", "A-1", crashes=4)
    (record,) = caplog.records
    assert record.name == "idem_tasks"
    assert record.getMessage() == "parked scope=shop.charge key='A-1' crashes=4"
    assert vars(record)["idem_tasks_event"] == "parked"
    assert vars(record)["idem_tasks_scope"] == "shop.charge"
    assert vars(record)["idem_tasks_key"] == "A-1"


LEVELS = {
    logging.DEBUG: ["granted", "replayed", "in_progress", "completed", "failed", "released", "outbox_sent"],
    logging.INFO: ["shadow_duplicate", "put_back"],
    logging.WARNING: [
        "mismatched",
        "taken_over",
        "in_doubt",
        "answered",
        "resolved",
        "forgotten",
        "renewal_failed",
        "outcome_written_through",
        "marker_unavailable",
        "outbox_failed",
    ],
    logging.ERROR: [
        "parked",
        "dead_lettered",
        "superseded",
        "lease_lost",
        "outcome_not_kept",
        "outcome_pending",
        "outcome_dropped",
        "store_unavailable",
        "unprotected_run",
        "release_failed",
    ],
}


@pytest.mark.parametrize("level, names", LEVELS.items(), ids=map(logging.getLevelName, LEVELS))
def test_levels(caplog: pytest.LogCaptureFixture, level: int, names: list[str]) -> None:
    """What needs a person is logged at WARNING or ERROR, and what is daily life below."""
    with caplog.at_level(logging.DEBUG, logger="idem_tasks"):
        for name in names:
            log_event(Event(EventName(name), "s", "k"))
    assert [record.levelno for record in caplog.records] == [level] * len(names)


def test_every_event_has_a_level_here() -> None:
    """An event that is added has to be given its level in this list."""
    assert sorted(name for names in LEVELS.values() for name in names) == sorted(EventName)


def test_a_key_cannot_forge_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    """Line breaks in a key or in a detail are shown, not obeyed."""
    log_event(Event(EventName.PARKED, "s\nERROR", "k\nERROR", {"error": OSError("a\nERROR"), "reason": "too late"}))
    expected = r"parked scope='s\nERROR' key='k\nERROR' error='a\nERROR' reason='too late'"
    assert caplog.records[0].getMessage() == expected


def test_a_level_that_is_off_costs_no_text(caplog: pytest.LogCaptureFixture) -> None:
    """Details are not put into words when nobody reads them."""

    class Loud:
        def __str__(self) -> str:
            raise AssertionError("put into words")

    with caplog.at_level(logging.WARNING, logger="idem_tasks"):
        log_event(Event(EventName.GRANTED, "s", "k", {"detail": Loud()}))
    assert caplog.records == []


@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL])
def test_an_event_that_may_be_logged_is_made(caplog: pytest.LogCaptureFixture, level: int) -> None:
    """Where only the log listens, what it is to have is not held back, whatever its details make of it."""
    announce = Announcer()
    with caplog.at_level(level, logger="idem_tasks"):
        for name in EventName:
            before = len(caplog.records)
            log_event(Event(name, "s", "k", {"count": 10}))
            assert announce.is_heard(name) == (len(caplog.records) > before)
    assert not Announcer(()).is_heard(EventName.PARKED)
    assert all(Announcer((log_event, print)).is_heard(name) for name in EventName)


@pytest.mark.parametrize("count, level", [(1, logging.INFO), (9, logging.INFO), (10, logging.WARNING)])
def test_a_message_that_goes_round_is_a_warning(caplog: pytest.LogCaptureFixture, count: int, level: int) -> None:
    """Copies are counted and alerted on: one that was put back ten times is for somebody to look at (F64)."""
    with caplog.at_level(logging.DEBUG, logger="idem_tasks"):
        log_event(Event(EventName.PUT_BACK, "scope", "key", {"count": count}))
    assert [record.levelno for record in caplog.records] == [level]
