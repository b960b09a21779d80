"""The protocol as somebody writes it by hand: with the drivers, one connection each, and nothing around them.

It promises the handler no less than the library does: a claim with a lease and a fencing token, a fenced finish, an
outcome that answers duplicates, a fingerprint that refuses other arguments. It has no renewal, no events, and no word
for what goes wrong: it is the floor that the library is measured against.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

LEASE = 60.0
"""Seconds, as the default policy has it."""

RETENTION = 7 * 86400.0
"""Seconds, as the default policy has it."""

MARKER_LIFE = 86400.0
"""Seconds for which Redis answers with an outcome, as the default policy has it."""

encode = msgspec.json.encode
decode = msgspec.json.decode


class Markers(Protocol):
    """What stands in front of the records."""

    def take(self, key: str, value: bytes) -> bytes | None:
        """Set a running marker unless there is one; return what stands there."""
        ...

    def publish(self, key: str, value: bytes, outcome: bytes) -> None:
        """Replace our own marker by the outcome."""
        ...


class Records(Protocol):
    """Where it is decided who runs."""

    def claim(self, key: str, owner: str, fingerprint: str) -> tuple[int, str, bytes | None]:
        """Insert a running record unless there is one; return fencing token, owner and outcome of what is there."""
        ...

    def finish(self, key: str, owner: str, token: int, outcome: bytes) -> bool:
        """Record the outcome under the fence."""
        ...


class ByHand:
    """Runs a handler of an order's number and an amount once for each order."""

    def __init__(
        self, handler: Callable[[str, int], Any], *, records: Records | None = None, markers: Markers | None = None
    ) -> None:
        self._handler = handler
        self._records = records
        self._markers = markers

    def __call__(self, order_id: str, amount: int) -> Any:
        """Claim, run, finish; or return the outcome that is there."""
        records, markers = self._records, self._markers
        fingerprint, owner = fingerprint_of(order_id, amount), secrets.token_hex(16)
        mark = running_marker(owner)
        if markers is not None:
            standing = markers.take(order_id, mark)
            if standing is not None:
                return answer(standing, fingerprint)
        token = 0
        if records is not None:
            token, holder, outcome = records.claim(order_id, owner, fingerprint)
            if outcome is not None:
                if markers is not None:
                    markers.publish(order_id, mark, outcome)
                return answer(outcome, fingerprint)
            if holder != owner:
                raise in_progress(order_id)
        value = self._handler(order_id, amount)
        finished = finished_marker(fingerprint, value)
        if records is not None and not records.finish(order_id, owner, token, finished):
            raise lost(order_id)
        if markers is not None:
            markers.publish(order_id, mark, finished)
        return value


def fingerprint_of(order_id: str, amount: int) -> str:
    """Return what has to be the same whenever the key is."""
    return hashlib.sha256(encode([order_id, amount])).hexdigest()


def running_marker(owner: str) -> bytes:
    """Return the marker of somebody at work."""
    return b"running:" + owner.encode()


def finished_marker(fingerprint: str, value: Any) -> bytes:
    """Return the outcome with its fingerprint, as it is recorded and as Redis answers with it."""
    return b"finished:" + fingerprint.encode() + b":" + encode(value)


def answer(standing: bytes, fingerprint: str) -> Any:
    """Return the outcome of a marker; raise if it is none."""
    kind, _, rest = standing.partition(b":")
    if kind != b"finished":
        raise in_progress("it")
    kept, _, body = rest.partition(b":")
    if kept.decode() != fingerprint:
        raise RuntimeError("other arguments")
    return decode(body)


def in_progress(order_id: str) -> RuntimeError:
    """Make the error for a key that somebody else has claimed."""
    return RuntimeError(f"{order_id} is in progress")


def lost(order_id: str) -> RuntimeError:
    """Make the error for a claim that was taken over."""
    return RuntimeError(f"the claim of {order_id} was lost")
