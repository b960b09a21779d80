"""Markers as values of Redis keys: what they look like, and how each verb changes one in one atomic step.

A marker is `running:<owner>:<number of the take>`, `running:<owner>:put back` after a renewal that found none,
`pending:<owner>:<outcome>` or `finished:<outcome>`. The part in front of an outcome is text, so that a script can tell
whose marker stands there; the outcome is MessagePack.
Nothing here imports a client: `Server` is all that is needed of one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import msgspec

from idem_tasks.claims import ClaimRequest, EncodedOutcome, Finished, Lease, NotKept, OutboxMessage, State
from idem_tasks.errors import StoreError
from idem_tasks.stores.base import MarkerAnswer, MarkerFinished, MarkerPending, MarkerRunning, MarkerTaken
from idem_tasks.stores.lua import script

Argument = bytes | int
"""What is sent to Redis."""


class Server(Protocol):
    """What the markers and records in Redis need of a connection: single-key commands, one round trip each.

    Raises `StoreUnavailableError`, `StoreError` and `ConfigurationError`, never the client's own errors.
    """

    async def set_if_absent(self, key: bytes, value: bytes, milliseconds: int) -> bytes | None:
        """Set the key for so many milliseconds unless it is there; return what stood there."""
        ...

    async def run(self, text: str, key: bytes, *arguments: Argument) -> Any:
        """Run a script on one key."""
        ...

    async def run_each(self, text: str, calls: Sequence[tuple[bytes, Sequence[Argument]]]) -> list[Any]:
        """Run a script on many keys, each with its arguments, in one round trip (in a cluster, one per node)."""
        ...

    async def run_over(self, text: str, calls: Sequence[tuple[bytes, Sequence[Argument]]]) -> list[Any]:
        """Run a script that takes any number of keys and answers for each, once (in a cluster, once for each key).

        Every key has the same number of arguments. One round trip (in a cluster, one per node) for 1,000 keys.
        """
        ...

    async def delete(self, keys: Sequence[bytes]) -> None:
        """Delete these keys in one round trip (in a cluster, one per node)."""
        ...


class _Message(msgspec.Struct, array_like=True, frozen=True):
    """A message of a pending outcome; scope, key and fencing token are the marker's own."""

    id: str
    number: int
    to: str
    content: bytes


class _Outcome(msgspec.Struct, array_like=True, frozen=True):
    """An outcome in a marker. New fields go last and get a default: markers of two versions meet in an upgrade."""

    state: Literal["completed", "failed"]
    body: bytes | None
    codec: str | None
    not_kept: NotKept | None
    error_type: str | None
    error_message: str | None
    fingerprint: str | None
    fencing_token: int | None
    traceparent: str | None
    expires_at: float
    messages: tuple[_Message, ...] = ()

    @classmethod
    def of(
        cls,
        outcome: EncodedOutcome,
        *,
        fingerprint: str | None,
        fencing_token: int | None,
        traceparent: str | None,
        expires_in: float,
    ) -> _Outcome:
        return cls(
            state="failed" if outcome.state is State.FAILED else "completed",
            body=outcome.body,
            codec=outcome.codec,
            not_kept=outcome.not_kept,
            error_type=printable(outcome.error_type),
            error_message=printable(outcome.error_message),
            fingerprint=fingerprint,
            fencing_token=fencing_token,
            traceparent=traceparent,
            expires_at=time.time() + expires_in,
            messages=tuple([_Message(each.id, each.number, each.to, each.content) for each in outcome.messages]),
        )

    def encoded(self, scope: str, key: str) -> EncodedOutcome:
        token = self.fencing_token or 0
        return EncodedOutcome(
            State.FAILED if self.state == "failed" else State.COMPLETED,
            self.body,
            self.codec,
            self.not_kept,
            self.error_type,
            self.error_message,
            tuple([OutboxMessage(m.id, scope, key, token, m.number, m.to, m.content) for m in self.messages]),
        )


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Outcome).decode

_TAKE_EACH = script("take_each")
_TAKE_BACK = script("delete_own")
_RENEW = script("renew_marker")
_PUBLISH = script("publish")
_KEEP = script("keep")
_DROP_EXACT = script("delete_exact")


def place(prefix: bytes, scope: str, key: str) -> bytes:
    """Return the Redis key for a scope and key: two different pairs never share one, whatever is in them."""
    name = scope.encode()
    return b"%s%d:%s:%s" % (prefix, len(name), name, key.encode())


def milliseconds(seconds: float) -> int:
    """Return whole milliseconds, rounded up and at least 1: Redis refuses a time to live of 0."""
    return max(math.ceil(seconds * 1000), 1)


def printable(text: str | None) -> str | None:
    """Return the text with lone surrogates, which UTF-8 does not have, written as escapes."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()


def _running(owner: str) -> bytes:
    """Return how a running marker of this owner begins; owners are hex digits, so no owner begins like another."""
    return b"running:%s:" % owner.encode()


def _pending(owner: str) -> bytes:
    return b"pending:%s:" % owner.encode()


def _taken_value(request: ClaimRequest) -> bytes:
    """Return the marker that this very take sets; without a number it stands for one that nobody heard of."""
    return _running(request.owner) + (b"" if request.take is None else b"%d" % request.take)


def _put_back_value(owner: str) -> bytes:
    return _running(owner) + b"put back"


class RedisMarkers:
    """The verbs of a `Marker` on a `Server`. One round trip each; who meets another's running one sends a second.

    Every key it writes has a time to live, and every change sets a new one.
    """

    def __init__(self, server: Server, prefix: str) -> None:
        self._server = server
        self._marker_prefix = f"{prefix}m:".encode()

    async def take(self, request: ClaimRequest) -> MarkerAnswer:
        """Set our running marker if there is none, else tell what stands there.

        Raises `StoreError` for what is no marker of ours, or one that never expires: then the record decides, and
        nothing is guessed.
        """
        key = self._place(request.scope, request.key)
        value, lease = _taken_value(request), milliseconds(request.policy.lease)
        if request.take == 1:
            # Mostly no other's runs: then SET is enough, which takes less of Redis than a script.
            standing = await self._server.set_if_absent(key, value, lease)
            if standing is None or not standing.startswith(b"running:") or standing.startswith(_running(request.owner)):
                return _read_marker(standing, None, key, request)
        # Who waits for another's asks in one step what stands there now, and for how long.
        (found,) = await self._server.run(_TAKE_EACH, key, value, lease)
        standing, left = found or (None, None)
        return _read_marker(standing, left, key, request)

    async def take_batch(self, requests: Sequence[ClaimRequest]) -> list[MarkerAnswer | None]:
        """As `take` for each; None for what `take` cannot read, or what never expires."""
        keys = [self._place(request.scope, request.key) for request in requests]
        standing = await self._server.run_over(
            _TAKE_EACH,
            [
                (key, (_taken_value(request), milliseconds(request.policy.lease)))
                for key, request in zip(keys, requests, strict=True)
            ],
        )
        return [_taken(each, key, request) for each, key, request in zip(standing, keys, requests, strict=True)]

    async def give_back(self, scope: str, key: str, owner: str) -> None:
        """Delete our own running marker, and nobody else's."""
        await self._server.run(_TAKE_BACK, self._place(scope, key), _running(owner))

    async def give_back_batch(self, requests: Sequence[ClaimRequest]) -> None:
        """As `give_back` for each."""
        await self._server.run_over(
            _TAKE_BACK, [(self._place(each.scope, each.key), (_running(each.owner),)) for each in requests]
        )

    async def renew_markers(self, leases: Sequence[Lease]) -> None:
        """Extend our own running markers and put back those that are gone; leave everybody else's."""
        await self._server.run_each(
            _RENEW,
            [
                (
                    self._place(lease.scope, lease.key),
                    (_running(lease.owner), _put_back_value(lease.owner), milliseconds(lease.policy.lease)),
                )
                for lease in leases
            ],
        )

    async def publish(self, request: ClaimRequest, finished: Finished, ttl: float) -> None:
        """Replace the marker that this take set by the outcome for `ttl` seconds; delete any other of ours (F53)."""
        await self._server.run(
            _PUBLISH, self._place(request.scope, request.key), *_published_by(request, finished, ttl)
        )

    async def publish_batch(self, finished: Sequence[tuple[ClaimRequest, Finished, float]]) -> None:
        """As `publish` for each."""
        await self._server.run_over(
            _PUBLISH,
            [
                (self._place(request.scope, request.key), _published_by(request, each, ttl))
                for request, each, ttl in finished
            ],
        )

    async def keep(self, lease: Lease, outcome: EncodedOutcome) -> bool:
        """Keep a pending outcome for the retention, over our own marker or none; False if another's stands there."""
        retention = lease.policy.retention
        value = _Outcome.of(
            outcome,
            fingerprint=lease.request.fingerprint,
            fencing_token=lease.fencing_token,
            traceparent=lease.request.traceparent,
            expires_in=retention,
        )
        kept = await self._server.run(
            _KEEP,
            self._place(lease.scope, lease.key),
            _running(lease.owner),
            _pending(lease.owner),
            _pending(lease.owner) + _encode(value),
            milliseconds(retention),
        )
        return bool(kept)

    async def drop_pending(self, scope: str, key: str, pending: MarkerPending) -> None:
        """Delete exactly this pending marker."""
        await self._server.run(_DROP_EXACT, self._place(scope, key), pending.raw)

    async def drop(self, keys: Sequence[tuple[str, str]]) -> None:
        """Delete whatever markers stand at these scopes and keys."""
        await self._server.delete([self._place(scope, key) for scope, key in keys])

    def _place(self, scope: str, key: str) -> bytes:
        return place(self._marker_prefix, scope, key)


def _published_by(request: ClaimRequest, finished: Finished, ttl: float) -> tuple[Argument, ...]:
    """Return what publishing takes for one key."""
    value = _Outcome.of(
        finished.outcome,
        fingerprint=finished.fingerprint,
        fencing_token=finished.fencing_token,
        traceparent=finished.traceparent,
        expires_in=finished.expires_in,
    )
    return (
        _taken_value(request),
        b"finished:" + _encode(value),
        milliseconds(ttl),
    )


_NO_EXPIRY = -1
"""What PTTL answers for a key without a time to live."""


def _taken(found: tuple[bytes, int] | None, key: bytes, request: ClaimRequest) -> MarkerAnswer | None:
    """As `_read_marker` for one of many; None for what that cannot read, or what never expires."""
    standing, left = found or (None, None)
    try:
        return _read_marker(standing, left, key, request)
    except StoreError:
        return None


def _read_marker(standing: bytes | None, left: int | None, key: bytes, request: ClaimRequest) -> MarkerAnswer:
    """What stood there as it was taken; None: there was none, and ours was set.

    `left` are its milliseconds, if it is running and another's.
    """
    if standing is None:
        return MarkerTaken()
    kind, _, rest = standing.partition(b":")
    if kind == b"finished":
        return _read_finished(rest, key, request)
    if kind == b"running":
        # Ours already: an earlier try was stored and its reply lost (F22).
        return MarkerTaken() if standing.startswith(_running(request.owner)) else _read_running(left, key)
    if kind == b"pending":
        return _read_pending(rest, standing, key, request)
    raise _unreadable(key)


def _read_running(left: int | None, key: bytes) -> MarkerRunning:
    assert left is not None
    if left == _NO_EXPIRY:
        # None of our commands leaves such a key. Waiting for it to end would be waiting for ever (F33).
        raise StoreError(f"the marker {_shown(key)} in Redis never expires; delete it")
    return MarkerRunning(left / 1000)


def _read_finished(text: bytes, key: bytes, request: ClaimRequest) -> MarkerFinished:
    found = _read(text, key)
    # By the workers' clocks, for want of a second round trip. Only Redis' own time to live decides how long it stands.
    left = max(found.expires_at - time.time(), 0.0)
    encoded = found.encoded(request.scope, request.key)
    return MarkerFinished(Finished(encoded, found.fingerprint, left, found.fencing_token, found.traceparent))


def _read_pending(text: bytes, raw: bytes, key: bytes, request: ClaimRequest) -> MarkerPending:
    owner, _, rest = text.partition(b":")
    found = _read(rest, key)
    if found.fencing_token is None:
        raise _unreadable(key)
    encoded = found.encoded(request.scope, request.key)
    return MarkerPending(owner.decode("utf-8", "replace"), found.fencing_token, found.fingerprint, encoded, raw)


def _read(text: bytes, key: bytes) -> _Outcome:
    try:
        return _decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _unreadable(key) from error


def _unreadable(key: bytes) -> StoreError:
    return StoreError(
        f"the value of {_shown(key)} in Redis is no marker that this version can read; "
        "delete it, or give the store a prefix that nothing else uses"
    )


def _shown(key: bytes) -> str:
    return repr(key.decode("utf-8", "replace"))
