"""What happens to claims, as events; observers count them, log them, trace them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import field
from enum import StrEnum
from typing import Any

from idem_tasks.runtime import interruption_in
from idem_tasks.values import value


class EventName(StrEnum):
    """Everything an observer can hear of."""

    GRANTED = "granted"
    REPLAYED = "replayed"
    IN_PROGRESS = "in_progress"
    MISMATCHED = "mismatched"
    TAKEN_OVER = "taken_over"
    COMPLETED = "completed"
    FAILED = "failed"
    RELEASED = "released"
    IN_DOUBT = "in_doubt"
    ANSWERED = "answered"
    PARKED = "parked"
    SUPERSEDED = "superseded"
    LEASE_LOST = "lease_lost"
    RENEWAL_FAILED = "renewal_failed"
    OUTCOME_NOT_KEPT = "outcome_not_kept"
    OUTCOME_PENDING = "outcome_pending"
    OUTCOME_WRITTEN_THROUGH = "outcome_written_through"
    OUTCOME_DROPPED = "outcome_dropped"
    MARKER_UNAVAILABLE = "marker_unavailable"
    STORE_UNAVAILABLE = "store_unavailable"
    UNPROTECTED_RUN = "unprotected_run"
    SHADOW_DUPLICATE = "shadow_duplicate"
    RELEASE_FAILED = "release_failed"
    PUT_BACK = "put_back"
    DEAD_LETTERED = "dead_lettered"
    RESOLVED = "resolved"
    FORGOTTEN = "forgotten"
    OUTBOX_SENT = "outbox_sent"
    OUTBOX_FAILED = "outbox_failed"


@value(frozen=True, slots=True)
class Event:
    """One thing that happened to one record; never holds arguments, outcomes or secrets."""

    name: EventName
    scope: str = ""
    key: str = ""
    details: dict[str, Any] = field(default_factory=dict)


Observer = Callable[[Event], None]
"""Called in the thread or loop in which the event happened; must return quickly and must not raise."""

_LEVELS: dict[EventName, int] = {
    EventName.MISMATCHED: logging.WARNING,
    EventName.TAKEN_OVER: logging.WARNING,
    EventName.IN_DOUBT: logging.WARNING,
    EventName.ANSWERED: logging.WARNING,
    EventName.PARKED: logging.ERROR,
    EventName.SUPERSEDED: logging.ERROR,
    EventName.LEASE_LOST: logging.ERROR,
    EventName.RENEWAL_FAILED: logging.WARNING,
    EventName.OUTCOME_NOT_KEPT: logging.ERROR,
    EventName.OUTCOME_PENDING: logging.ERROR,
    EventName.OUTCOME_WRITTEN_THROUGH: logging.WARNING,
    EventName.OUTCOME_DROPPED: logging.ERROR,
    EventName.MARKER_UNAVAILABLE: logging.WARNING,
    EventName.STORE_UNAVAILABLE: logging.ERROR,
    EventName.UNPROTECTED_RUN: logging.ERROR,
    EventName.SHADOW_DUPLICATE: logging.INFO,
    EventName.RELEASE_FAILED: logging.ERROR,
    EventName.PUT_BACK: logging.INFO,
    EventName.DEAD_LETTERED: logging.ERROR,
    EventName.RESOLVED: logging.WARNING,
    EventName.FORGOTTEN: logging.WARNING,
    EventName.OUTBOX_FAILED: logging.WARNING,
}
_OFTEN = 10
"""Times that a message was put back from which on somebody should look."""

_HIGHEST_LEVELS = _LEVELS | {EventName.PUT_BACK: logging.WARNING}

_logger = logging.getLogger("idem_tasks")


def log_event(event: Event) -> None:
    """Log an event to the logger `idem_tasks`: what needs a person at WARNING or ERROR, the rest at DEBUG."""
    level = _LEVELS.get(event.name, logging.DEBUG)
    if event.name is EventName.PUT_BACK and event.details.get("count", 0) >= _OFTEN:
        level = logging.WARNING
    if not _logger.isEnabledFor(level):
        return
    words = "".join(f" {name}={_word(value)}" for name, value in event.details.items())
    _logger.log(
        level,
        "%s scope=%s key=%r%s",
        event.name.value,
        _word(event.scope),
        event.key,
        words,
        extra={"idem_tasks_event": event.name.value, "idem_tasks_scope": event.scope, "idem_tasks_key": event.key},
    )


def _word(value: object) -> str:
    """Put a value into one word; what has spaces or line breaks is quoted, so that it cannot forge a log line."""
    text = str(value)
    return text if text.isprintable() and " " not in text else repr(text)


class Announcer:
    """Tells every observer of an event; an observer that raises is logged and never disturbs a claim."""

    def __init__(self, observers: Sequence[Observer] = (log_event,)) -> None:
        self._observers = tuple(observers)
        self._only_the_log = all(observer is log_event for observer in observers)

    def is_heard(self, name: EventName) -> bool:
        """Tell whether such an event is worth making: mostly there is only the log, which is not to have it."""
        return not self._only_the_log or (
            bool(self._observers) and _logger.isEnabledFor(_HIGHEST_LEVELS.get(name, logging.DEBUG))
        )

    def __call__(self, name: EventName, scope: str = "", key: str = "", **details: Any) -> None:
        self.tell(Event(name, scope, key, details))

    def tell(self, event: Event) -> None:
        """Tell of an event that is made already."""
        before = sys.exception()
        for observer in self._observers:
            try:
                observer(event)
            except Exception as error:
                # After an effect nothing may fail because somebody was watching; a soft time limit is no such failure.
                if interruption_in(error, before) is not None:
                    raise
                _logger.exception("observer %r raised on %s", observer, event.name.value)
