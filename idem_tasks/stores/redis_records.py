"""Records as Redis hashes, for those who keep marker and outcome both in Redis.

One hash per record, one script per verb, one round trip. Redis' clock decides. Every key has a time to live, also
one in doubt or parked: Redis is no place for what has to wait for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Protocol

from idem_tasks.claims import (
    Action,
    AuditEntry,
    ClaimAnswer,
    ClaimRequest,
    EncodedOutcome,
    Finished,
    Granted,
    InDoubt,
    InProgress,
    Lease,
    Lost,
    Parked,
    Record,
    Recorded,
    Release,
    Released,
    State,
    action_of,
    new_owner,
)
from idem_tasks.errors import ConfigurationError, ConflictError, InProgressError, StoreError
from idem_tasks.stores.base import refuse_if_moved
from idem_tasks.stores.lua import script
from idem_tasks.stores.marker import Argument, Server, place, printable

_WAITING = 365 * 86400.0
"""Seconds for which a record is kept that runs, is in doubt or parked, and so may wait for a person: as long as a
person can be expected to take, but not for ever, because a key that never expires leaks."""

_TYPE_LIMIT = 500
_MESSAGE_LIMIT = 2000
"""Characters of an error that are kept: enough for people, and no place for a whole document."""

_CLAIM = script("record", "grant", "claim")
_DECIDE = script("record", "grant", "decide")
_FINISH = script("record", "finish")
_RESTORE = script("record", "restore")
_RELEASE = script("record", "release")
_FORGET = script("record", "forget")
_RESOLVE = script("record", "resolve")
_RENEW = script("renew_record")
_READ = script("read")
_STATE = script("state")


class RecordServer(Server, Protocol):
    """What records need of a connection beyond what markers do."""

    async def keys(self, beginning: bytes) -> set[bytes]:
        """Return every key that begins like this; takes many round trips."""
        ...


class RedisRecords:
    """The verbs of a `Store` on a `RecordServer`.

    One round trip each, but for `finish` of a record that has vanished (three), and the listings, which read every
    key with this prefix. What expires is deleted by Redis itself: its generation begins at 1 again, and there is
    nothing to purge.
    """

    def __init__(self, server: RecordServer, prefix: str) -> None:
        self._records = server
        self._record_prefix = f"{prefix}r:".encode()

    async def claim(self, request: ClaimRequest) -> ClaimAnswer:
        """Claim the record, or tell why not, in one atomic step."""
        answer = _claimed(await self._run(_CLAIM, request.scope, request.key, *_claiming(request)), request)
        if answer is None:
            raise _unreadable(request.scope, request.key)
        return answer

    async def claim_batch(self, requests: Sequence[ClaimRequest]) -> list[ClaimAnswer | None]:
        """As `claim` for each, in one round trip (in a cluster, one for each node); None for what it cannot read."""
        replies = await self._records.run_each(
            _CLAIM,
            [(place(self._record_prefix, request.scope, request.key), _claiming(request)) for request in requests],
        )
        return [_claimed(_Row.of(reply), request) for reply, request in zip(replies, requests, strict=True)]

    async def decide(
        self, dead: Lease, request: ClaimRequest, outcome: EncodedOutcome | None
    ) -> Granted | Finished | Lost:
        """End the doubt about this dead claim: by this outcome, or (None) by granting the record to `request`."""
        policy = request.policy
        row = await self._run(
            _DECIDE,
            request.scope,
            request.key,
            request.owner.encode(),
            _microseconds(policy.lease),
            _microseconds(policy.max_hold),
            _microseconds(policy.retention),
            _microseconds(_WAITING),
            *_fence(dead),
            (State.RUNNING if outcome is None else outcome.state).value.encode(),
            *(_granted_fields(request) if outcome is None else _outcome_fields(outcome)),
        )
        match row.word:
            case "taken_over":
                return Granted(row.lease(request, taken_over=True))
            case "finished":
                return row.finished()
        return Lost()

    async def renew(self, leases: Sequence[Lease], still_held: Callable[[str], bool]) -> frozenset[str]:
        """Extend these leases by their policy's `lease` from now; return the owners of those extended.

        `still_held` is not asked: a finish is one step here, so a claim is before or after it, never in it.
        """
        extended = await self._records.run_each(
            _RENEW,
            [
                (
                    place(self._record_prefix, lease.scope, lease.key),
                    (*_fence(lease), _microseconds(lease.policy.lease)),
                )
                for lease in leases
            ],
        )
        return frozenset(lease.owner for lease, done in zip(leases, extended, strict=True) if done)

    async def finish(
        self, lease: Lease, outcome: EncodedOutcome, *, may_insert: bool = False
    ) -> Recorded | Finished | Lost:
        """Record the outcome under this lease's fence; with `may_insert` also where the record has vanished."""
        row = await self._finish(lease, outcome)
        if row.word == "missing" and may_insert:
            await self._restore(lease)
            row = await self._finish(lease, outcome)
        match row.word:
            case "recorded":
                return Recorded()
            case "finished":
                return row.finished()
        return Lost()

    async def finish_batch(self, finished: Sequence[tuple[Lease, EncodedOutcome]]) -> list[Recorded | None]:
        """As `finish` for each, in one round trip (in a cluster, one for each node)."""
        replies = await self._records.run_each(
            _FINISH,
            [
                (place(self._record_prefix, lease.scope, lease.key), _finishing(lease, outcome))
                for lease, outcome in finished
            ],
        )
        return [Recorded() if _Row.of(reply).word == "recorded" else None for reply in replies]

    async def _finish(self, lease: Lease, outcome: EncodedOutcome) -> _Row:
        return await self._run(_FINISH, lease.scope, lease.key, *_finishing(lease, outcome))

    async def _restore(self, lease: Lease) -> None:
        request = lease.request
        await self._records.run(
            _RESTORE,
            place(self._record_prefix, lease.scope, lease.key),
            _microseconds(lease.policy.max_hold + lease.policy.retention),
            _microseconds(_WAITING),
            *_present(
                fencing_token=str(lease.fencing_token),
                owner=lease.owner,
                attempts=str(lease.attempts),
                failures=str(lease.failures),
                crashes=str(lease.crashes),
                generation=str(lease.generation),
                fingerprint=request.fingerprint,
                holder=request.holder,
                traceparent=request.traceparent,
            ),
        )

    async def keep_pending(self, lease: Lease, outcome: EncodedOutcome) -> bool:
        """Return False: a Redis that cannot be reached has no second place."""
        return False

    async def release(self, lease: Lease, release: Release) -> Released | Finished | Lost:
        """Give the claim up without an outcome, under the same fence as `finish`."""
        limit = lease.policy.max_attempts
        row = await self._run(
            _RELEASE,
            lease.scope,
            lease.key,
            *_fence(lease),
            int(release.failed),
            int(release.in_doubt),
            -1 if limit is None else limit,
            lease.failures,
            _microseconds(_WAITING),
            *_present(**_error(release)),
        )
        match row.word:
            case "released":
                return Released(row.state())
            case "finished":
                return row.finished()
        return Lost()

    async def get(self, scope: str, key: str) -> Record | None:
        """Return the record, or None."""
        row = _Row.read(await self._records.run(_READ, place(self._record_prefix, scope, key)))
        return row.record(scope, key) if row.fields else None

    async def forget(
        self, scope: str, key: str, *, expect_token: int | None = None, actor: str = "", reason: str | None = None
    ) -> AuditEntry | None:
        """Delete the record; returns what was done, or None where there is none. Raises as `Store.forget` says."""
        row = await self._run(_FORGET, scope, key, _expected(expect_token))
        match row.word:
            case "held":
                raise InProgressError(scope=scope, key=key, retry_after=row.lease_left())
            case "moved":
                refuse_if_moved(scope, key, row.state(), row.number("fencing_token"), expect_token)
            case "missing":
                return None
        return row.done("forget", scope, key, actor, reason)

    async def resolve(
        self,
        scope: str,
        key: str,
        outcome: EncodedOutcome | None,
        *,
        expect_token: int | None = None,
        actor: str = "",
        reason: str | None = None,
    ) -> AuditEntry | None:
        """End `in_doubt`, `parked` or an overdue `running`: by this outcome, or (None) by releasing it.

        It is then kept for at least the retention of the last claim. Raises as `Store.resolve` says.
        """
        row = await self._run(
            _RESOLVE,
            scope,
            key,
            new_owner().encode(),
            _expected(expect_token),
            (State.RELEASED if outcome is None else outcome.state).value.encode(),
            *(() if outcome is None else _outcome_fields(outcome)),
        )
        match row.word:
            case "missing":
                return None
            case "held":
                raise InProgressError(scope=scope, key=key, retry_after=row.lease_left())
            case "moved":
                refuse_if_moved(scope, key, row.state(), row.number("fencing_token"), expect_token)
            case "ended":
                raise ConflictError(f"{scope} {key!r} is {row.state().value} already", scope=scope, key=key)
        return row.done(action_of(outcome), scope, key, actor, reason)

    async def audit(self, *, scope: str | None, key: str | None, limit: int) -> list[AuditEntry]:
        """Raise `ConfigurationError`: Redis is no place for what must not be lost."""
        raise ConfigurationError(
            "Redis keeps no audit: what people did is told by the events resolved and forgotten, which are logged; "
            "records in SQL have one"
        )

    async def records(
        self,
        *,
        state: State | None,
        scope: str | None,
        after: tuple[str, str] | None,
        limit: int,
        attention: bool = False,
    ) -> list[Record]:
        """Return up to `limit` records in the order of scope and key, beginning after the given one.

        Reads the name of every key that the store has, so it is for people, not for a handler.
        """
        places = sorted(
            (found, raw)
            for raw in await self._records.keys(self._record_prefix)
            if (found := self._scope_and_key(raw)) is not None
            and (scope is None or found[0] == scope)
            and (after is None or found > after)
        )
        chosen: list[Record] = []
        for start in range(0, len(places), _AT_A_TIME):
            if len(chosen) >= limit:
                break
            some = places[start : start + _AT_A_TIME]
            replies = await self._records.run_each(_READ, [(raw, ()) for _, raw in some])
            for (found, _), reply in zip(some, replies, strict=True):
                row = _Row.read(reply)
                if not row.fields or (state is not None and row.state() is not state):
                    continue
                record = row.record(*found)
                if not attention or record.attention is not None:
                    chosen.append(record)
        return chosen[:limit]

    async def stats(self) -> dict[State, int]:
        """Return how many records there are in each state; reads every key that the store has."""
        counts = dict.fromkeys(State, 0)
        keys = list(await self._records.keys(self._record_prefix))
        for start in range(0, len(keys), _AT_A_TIME):
            calls: list[tuple[bytes, Sequence[Argument]]] = [(key, ()) for key in keys[start : start + _AT_A_TIME]]
            for state in await self._records.run_each(_STATE, calls):
                if state:
                    counts[State(state.decode())] += 1
        return counts

    async def purge(self, *, limit: int, grace: float) -> list[tuple[str, str]]:
        """Return nothing: Redis deletes every record by itself when its retention is over."""
        return []

    async def _run(self, text: str, scope: str, key: str, *arguments: Argument) -> _Row:
        return _Row.of(await self._records.run(text, place(self._record_prefix, scope, key), *arguments))

    def _scope_and_key(self, raw: bytes) -> tuple[str, str] | None:
        """Read a Redis key back; None for one that is not ours."""
        length, _, rest = raw.removeprefix(self._record_prefix).partition(b":")
        if not length.isdigit() or rest[int(length) : int(length) + 1] != b":":
            return None
        try:
            return rest[: int(length)].decode(), rest[int(length) + 1 :].decode()
        except UnicodeDecodeError:
            return None


_AT_A_TIME = 500
"""Records in one pipeline: enough to make round trips rare, few enough not to hold Redis up."""


class _Row:
    """A script's answer: a word, Redis' time, and the fields of the record as it is now."""

    __slots__ = ("fields", "now", "word")

    def __init__(self, word: bytes, now: int, pairs: Sequence[bytes]) -> None:
        self.word = word.decode()
        self.now = now
        self.fields: Mapping[str, bytes] = {
            name.decode(): value for name, value in zip(pairs[::2], pairs[1::2], strict=True)
        }

    @classmethod
    def of(cls, reply: Sequence[bytes]) -> _Row:
        return cls(reply[0], int(reply[1]), reply[2:])

    @classmethod
    def read(cls, reply: Any) -> _Row:
        word, (seconds, microseconds), pairs = reply
        return cls(word, int(seconds) * 1_000_000 + int(microseconds), pairs)

    def number(self, field: str) -> int:
        return int(self.fields.get(field, 0))

    def text(self, field: str) -> str | None:
        value = self.fields.get(field)
        return None if value is None else value.decode("utf-8", "replace")

    def state(self) -> State:
        return State(self.text("state") or "")

    def time(self, field: str) -> datetime:
        return datetime.fromtimestamp(self.number(field) / 1_000_000, UTC)

    def lease_left(self) -> float:
        return max(self.number("lease_expires_at") - self.now, 0) / 1_000_000

    def finished(self) -> Finished:
        not_kept: Any = self.text("not_kept")
        outcome = EncodedOutcome(
            State.FAILED if self.state() is State.FAILED else State.COMPLETED,
            self.fields.get("outcome"),
            self.text("codec"),
            not_kept,
            self.text("error_type"),
            self.text("error_message"),
        )
        left = max(self.number("expires_at") - self.now, 0) / 1_000_000
        return Finished(outcome, self.text("fingerprint"), left, self.number("fencing_token"), self.text("traceparent"))

    def lease(self, request: ClaimRequest, *, taken_over: bool = False) -> Lease:
        return Lease(
            request,
            self.number("fencing_token"),
            attempts=self.number("attempts"),
            failures=self.number("failures"),
            crashes=self.number("crashes"),
            generation=self.number("generation"),
            taken_over=taken_over,
        )

    def done(self, action: Action, scope: str, key: str, actor: str, reason: str | None) -> AuditEntry:
        """Describe what a person did; how it was before is in `was_*`, unless an earlier try did it."""
        was = self.text("was_state")
        is_gone = action == "forget"
        return AuditEntry(
            at=datetime.fromtimestamp(self.now / 1_000_000, UTC),
            actor=actor,
            action=action,
            scope=scope,
            key=key,
            state_before=None if was is None else State(was),
            state_after=None if is_gone else self.state(),
            token_before=None if was is None else self.number("was_token"),
            token_after=None if is_gone else self.number("fencing_token"),
            reason=reason,
        )

    def record(self, scope: str, key: str) -> Record:
        state = self.state()
        overdue = state is State.RUNNING and self.number("lease_expires_at") <= self.now
        return Record(
            scope=scope,
            key=key,
            state=state,
            fencing_token=self.number("fencing_token"),
            owner=self.text("owner") or "",
            fingerprint=self.text("fingerprint"),
            attempts=self.number("attempts"),
            failures=self.number("failures"),
            crashes=self.number("crashes"),
            generation=self.number("generation"),
            lease_expires_at=self.time("lease_expires_at"),
            outcome=self.fields.get("outcome"),
            codec=self.text("codec"),
            not_kept=self.text("not_kept"),
            error_type=self.text("error_type"),
            error_message=self.text("error_message"),
            holder=self.text("holder") or "",
            created_at=self.time("created_at"),
            updated_at=self.time("updated_at"),
            completed_at=self.time("completed_at") if "completed_at" in self.fields else None,
            expires_at=self.time("expires_at"),
            attention="overdue" if overdue else self.text("attention"),
            traceparent=self.text("traceparent"),
        )


def _claiming(request: ClaimRequest) -> tuple[Argument, ...]:
    policy = request.policy
    return (
        request.owner.encode(),
        _microseconds(policy.lease),
        _microseconds(policy.max_hold),
        _microseconds(policy.retention),
        _microseconds(_WAITING),
        b"hold" if policy.doubts else b"rerun",
        -1 if policy.max_crashes is None else policy.max_crashes,
        *_granted_fields(request),
    )


def _claimed(row: _Row, request: ClaimRequest) -> ClaimAnswer | None:
    """Return what a claim is answered with; None for a record that cannot be read."""
    match row.word:
        case "granted" | "taken_over":
            return Granted(row.lease(request, taken_over=row.word == "taken_over"))
        case "finished":
            return row.finished()
        case "running":
            return InProgress(row.lease_left())
        case "in_doubt":
            return InDoubt()
        case "newly_in_doubt":
            return InDoubt(new=True, dead=row.lease(replace(request, owner=row.text("owner") or "")))
        case "parked" | "newly_parked":
            return Parked(row.number("crashes"), row.number("failures"), new=row.word == "newly_parked")
    return None


def _finishing(lease: Lease, outcome: EncodedOutcome) -> tuple[Argument, ...]:
    return (
        *_fence(lease),
        outcome.state.value.encode(),
        _microseconds(lease.policy.retention),
        *_outcome_fields(outcome),
    )


def _microseconds(seconds: float) -> int:
    return max(round(seconds * 1_000_000), 1)


def _expected(token: int | None) -> bytes:
    return b"" if token is None else str(token).encode()


def _fence(lease: Lease) -> tuple[bytes, bytes]:
    return str(lease.fencing_token).encode(), lease.owner.encode()


def _error(of: EncodedOutcome | Release) -> dict[str, str | None]:
    kind, message = printable(of.error_type), printable(of.error_message)
    return {
        "error_type": None if kind is None else kind[:_TYPE_LIMIT],
        "error_message": None if message is None else message[:_MESSAGE_LIMIT],
    }


def _granted_fields(request: ClaimRequest) -> Iterator[bytes]:
    yield from _present(fingerprint=request.fingerprint, holder=request.holder, traceparent=request.traceparent)


def _outcome_fields(outcome: EncodedOutcome) -> Iterator[bytes]:
    yield from _present(outcome=outcome.body, codec=outcome.codec, not_kept=outcome.not_kept, **_error(outcome))


def _present(**fields: str | bytes | None) -> Iterator[bytes]:
    """Return name, value, name, value .. of the fields that are not None; an empty value is there all the same."""
    for name, value in fields.items():
        if value is not None:
            yield name.encode()
            yield value.encode() if isinstance(value, str) else value


def _unreadable(scope: str, key: str) -> StoreError:
    return StoreError(f"the record of {scope} {key!r} in Redis is none that this version can read; forget it")
