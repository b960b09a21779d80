"""What this process knows of outcomes that are recorded: the last ones, for a short while, small ones only."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

from idem_tasks.claims import ClaimRequest, Finished
from idem_tasks.errors import ConfigurationError
from idem_tasks.policy import Duration, check_count, seconds
from idem_tasks.runtime import deadline_clock

LARGEST = 16 * 1024
"""Bytes of an encoded outcome that is kept.

So the 1,024 of a usual cache are 16 MiB at most, and no large outcome displaces many small ones. Little is lost by it:
to decode a larger one takes longer than to ask Redis for it.
"""


class Question(NamedTuple):
    """When a store was asked for what it answers, and what had been forgotten by then."""

    asked_at: float
    drops: int


class _Kept(NamedTuple):
    """A recorded outcome. It is as old as the question that it is the answer to."""

    finished: Finished
    asked_at: float
    until: float


class LocalCache:
    """Keeps the `size` outcomes that were needed last, each for `ttl` seconds at most.

    Never for longer than the outcome's retention, nor than the `cache_ttl` of the handler's policy. Any number of
    threads and event loops may use one at once. A forked child begins with an empty one: it does not hear what its
    parent forgets. Raises `ConfigurationError` for a size below 0, or a time that is none.
    """

    def __init__(self, size: int, ttl: Duration, clock: Callable[[], float] = deadline_clock) -> None:
        check_count("local_cache", size, optional=False)
        self.size = size
        self._ttl = seconds("local_cache_ttl", ttl)
        if size and not self._ttl:
            raise ConfigurationError("local_cache_ttl=0 keeps no outcome; leave local_cache= out instead")
        self._clock = clock
        self._drops = 0
        _made.add(self)
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str], _Kept] = OrderedDict()
        self._doubted: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def answer(self, request: ClaimRequest) -> Finished | None:
        """Return the outcome for this request; None: ask the store, also where the arguments are others.

        That is an error which ends the message, and what was forgotten elsewhere must not be the reason for one.
        """
        place, now = (request.scope, request.key), self._clock()
        with self._lock:
            kept = self._kept.get(place)
            if kept is None:
                return None
            if now >= kept.until:
                del self._kept[place]
                return None
            self._kept.move_to_end(place)
        finished = kept.finished
        if not request.matches(finished.fingerprint):
            return None
        left = finished.expires_in - (now - kept.asked_at)
        # As `replace` would make it, in a fifth of the time.
        return Finished(finished.outcome, finished.fingerprint, left, finished.fencing_token, finished.traceparent)

    def question(self) -> Question:
        """Note that a store is about to be asked: `keep` takes its answer with this."""
        return Question(self._clock(), self._drops)

    def keep(self, request: ClaimRequest, finished: Finished, question: Question) -> None:
        """Keep an outcome that the store has recorded, unless anything was dropped since it was asked."""
        outcome = finished.outcome
        if outcome.body is not None:
            if len(outcome.body) > LARGEST:
                return
            # A copy: msgspec leaves room behind what it has written, half as much again.
            finished = replace(finished, outcome=replace(outcome, body=bytes(memoryview(outcome.body))))
        lasts = min(self._ttl, request.policy.cache_ttl, finished.expires_in)
        if lasts <= 0:
            return
        with self._lock:
            if question.drops != self._drops:
                return  # it may be what was forgotten meanwhile
            self._kept[request.scope, request.key] = _Kept(finished, question.asked_at, question.asked_at + lasts)
            self._kept.move_to_end((request.scope, request.key))
            if len(self._kept) > self.size:
                self._kept.popitem(last=False)

    def doubt(self, owners: Iterable[str]) -> None:
        """Keep nothing of these owners' own: a finish that failed may have been done, and nobody knows when.

        A later try hears that it is recorded, and its retention may be over by then.
        """
        with self._lock:
            self._doubted.update(dict.fromkeys(owners))
            while len(self._doubted) > self.size:
                self._doubted.popitem(last=False)

    def doubts(self, owner: str) -> bool:
        """Tell whether a finish of this owner failed before."""
        return owner in self._doubted

    def drop(self, places: Iterable[tuple[str, str]]) -> None:
        """Forget these scopes and keys, also those whose answers are on their way."""
        with self._lock:
            self._drops += 1
            for place in places:
                self._kept.pop(place, None)


_made: weakref.WeakSet[LocalCache] = weakref.WeakSet()


def _begin_again() -> None:
    """In a forked child: a lock's holder may be a thread that only the parent has."""
    for cache in list(_made):
        cache._begin()  # noqa: SLF001 - of this module


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_again)
