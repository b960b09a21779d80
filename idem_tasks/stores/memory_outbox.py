"""Messages that wait to be sent, in this process's memory, beside the records of a `MemoryStore`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from idem_tasks.claims import OutboxMessage
from idem_tasks.stores.base import FailedSend


@dataclass(slots=True)
class _Waiting:
    message: OutboxMessage
    due_at: float
    owner: str | None = None


class MemoryOutbox:
    """Keeps messages in memory, in order for each scope and key. `lock` is that of the records."""

    def __init__(self, clock: Callable[[], float], lock: threading.Lock) -> None:
        self._clock = clock
        self._lock = lock
        self._keys: dict[tuple[str, str], list[_Waiting]] = {}

    def add(self, messages: Sequence[OutboxMessage]) -> None:
        """Add the messages of an outcome that is being recorded; under the lock."""
        for message in messages:
            waiting = self._keys.setdefault((message.scope, message.key), [])
            if all(each.message.id != message.id for each in waiting):
                waiting.append(_Waiting(message, self._clock()))

    async def take(
        self, owner: str, *, lease: float, limit: int, of: tuple[str, str] | None = None
    ) -> list[OutboxMessage]:
        """Lease the first messages of keys that nobody has, in the order to send them in."""
        with self._lock:
            now = self._clock()
            places = list(self._keys) if of is None else [of] if of in self._keys else []
            due = sorted((self._keys[place] for place in places), key=lambda waiting: waiting[0].due_at)
            taken: list[OutboxMessage] = []
            for waiting in due:
                if waiting[0].due_at > now:
                    break
                for each in waiting[: limit - len(taken)]:
                    each.owner, each.due_at = owner, now + lease
                    taken.append(each.message)
            return taken

    async def settle(
        self, owner: str, *, sent: Sequence[OutboxMessage], failed: Sequence[FailedSend], rest: Sequence[OutboxMessage]
    ) -> None:
        """Delete what was sent, put off what failed, and give the rest back."""
        with self._lock:
            now = self._clock()
            for message in sent:
                self._delete(message)
            for each in failed:
                if found := self._leased(each.message, owner):
                    found.message = replace(found.message, attempts=each.message.attempts + 1)
                    found.owner, found.due_at = None, now + each.delay
            for message in rest:
                if found := self._leased(message, owner):
                    found.owner, found.due_at = None, now

    async def count(self) -> int:
        """Return how many messages there are."""
        with self._lock:
            return sum(len(waiting) for waiting in self._keys.values())

    def _leased(self, message: OutboxMessage, owner: str) -> _Waiting | None:
        waiting = self._keys.get((message.scope, message.key), [])
        return next((each for each in waiting if each.message.id == message.id and each.owner == owner), None)

    def _delete(self, message: OutboxMessage) -> None:
        place = (message.scope, message.key)
        left = [each for each in self._keys.get(place, []) if each.message.id != message.id]
        if left:
            self._keys[place] = left
        else:
            self._keys.pop(place, None)
