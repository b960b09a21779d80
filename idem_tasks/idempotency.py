"""`Idempotency`: a store, a policy, a codec and observers in one object; `run`, `claim` and the verbs for people."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from idem_tasks import config
from idem_tasks.asking import failure_of
from idem_tasks.batch import perform_batch
from idem_tasks.batch_members import Batch, members_of, message_plan, refuse_waiting
from idem_tasks.block import AsyncClaimBlock, ClaimBlock
from idem_tasks.call import Call, Services
from idem_tasks.claims import (
    AuditEntry,
    ClaimRequest,
    EncodedOutcome,
    Record,
    State,
    StepRecord,
    new_owner,
    person_name,
    process_name,
)
from idem_tasks.errors import ConfigurationError, OutcomeError
from idem_tasks.events import Announcer, EventName, Observer, log_event
from idem_tasks.heartbeat import Heartbeat, LoopHeartbeat, ThreadHeartbeat
from idem_tasks.keys import CallKey, check_key, check_scope, fingerprint_of
from idem_tasks.outbox import RelayReport, Sender, Senders
from idem_tasks.outcomes import UNANNOTATED, Codec, JsonCodec, OutcomeContext, OutcomeType, return_type_of
from idem_tasks.policy import LOCAL_CACHE_TTL, Duration, Policy, PolicyFields
from idem_tasks.runtime import Asyncio, Blocking, HandlerStopIteration, run_sync
from idem_tasks.session_argument import SessionArgument
from idem_tasks.stores import store_from_urls
from idem_tasks.stores.base import RuntimeName, Store, steps_of
from idem_tasks.stores.cached import cached
from idem_tasks.stores.local_cache import LocalCache
from idem_tasks.task import perform

T = TypeVar("T")


class _Arguments:
    """The default of `fingerprint=` in `run`: all arguments."""

    def __repr__(self) -> str:
        return "<all arguments>"


_ARGUMENTS = _Arguments()
_UNKNOWN: Any = object()
_PAGE = 500
"""Records read at once by `records`."""


class Idempotency:
    """Runs handlers once for each key, and shows what is recorded.

    It connects at its first use: per process for blocking calls, per event loop for asyncio. It may be made before
    a fork and used on both sides.
    """

    def __init__(
        self,
        *,
        store: Store,
        policy: Policy | None = None,
        codec: Codec | None = None,
        observers: Sequence[Observer] | None = None,
        senders: Mapping[str, Sender] | None = None,
        local_cache: int = 0,
        local_cache_ttl: Duration = LOCAL_CACHE_TTL,
    ) -> None:
        """`observers` hear of every event; the default logs them, and a list given here replaces it.

        `senders` are where `claim.publish_message(..., to=NAME)` sends to, by name: functions of an `OutboxMessage`,
        which raise if they could not send it.

        `local_cache` is how many recorded outcomes this process keeps, to answer duplicates of them without a round
        trip; 0: none. Each is kept for `local_cache_ttl` seconds at most, in which it is answered although another
        process has forgotten it.
        """
        self.store = store
        cache = LocalCache(local_cache, local_cache_ttl)
        self._asked = cached(store, cache) if local_cache else store
        self.policy = policy or Policy()
        self.codec: Codec = codec or JsonCodec()
        self._announce = Announcer((log_event,) if observers is None else observers)
        self._senders = Senders(senders)
        self._lock = threading.Lock()
        _made.add(self)
        self._blocking: Services | None = None
        self._loops: dict[asyncio.AbstractEventLoop, Services] = {}

    @classmethod
    def from_urls(
        cls,
        *,
        database_url: str | None = None,
        redis_url: str | None = None,
        create_schema: bool | None = None,
        policy: Policy | None = None,
        codec: Codec | None = None,
        observers: Sequence[Observer] | None = None,
        senders: Mapping[str, Sender] | None = None,
        local_cache: int = 0,
        local_cache_ttl: Duration = LOCAL_CACHE_TTL,
        **fields: Unpack[PolicyFields],
    ) -> Self:
        """Make one from URLs: both for the two tiers, or one alone.

        Neither: IDEM_TASKS_DATABASE_URL and IDEM_TASKS_REDIS_URL, else the SQLite file `idem_tasks.db`.
        `create_schema`: None makes the tables on first use on SQLite and leaves a server's to
        `idem-tasks init-db`; True makes them on first use everywhere. Raises `ConfigurationError`.
        """
        if database_url is None and redis_url is None:
            database_url, redis_url = config.urls_from_environment()
            if database_url is None and redis_url is None:
                database_url = config.DEFAULT_DATABASE_URL
        store = store_from_urls(database_url, redis_url, create_schema=create_schema)
        chosen = (policy or Policy()).replace(**fields)
        return cls(
            store=store,
            policy=chosen,
            codec=codec,
            observers=observers,
            senders=senders,
            local_cache=local_cache,
            local_cache_ttl=local_cache_ttl,
        )

    # Handlers

    def run(
        self,
        handler: Callable[..., T],
        /,
        *args: Any,
        scope: str,
        key: object,
        fingerprint: Any = _ARGUMENTS,
        policy: Policy | None = None,
        **kwargs: Any,
    ) -> T:
        """Call `handler(*args, **kwargs)` once for this scope and key, and return the outcome.

        `fingerprint` is whatever has to be the same when the key is; the default is all arguments, None is no
        check. Raises as a decorated handler does (`task.perform`).
        """
        call = self._call(handler, args, kwargs, scope, key, fingerprint, policy, "blocking")
        try:
            value: T = run_sync(perform(call, handler, args, kwargs))
        except HandlerStopIteration as carrier:
            raise carrier.error from None
        return value

    async def arun(
        self,
        handler: Callable[..., Awaitable[T]],
        /,
        *args: Any,
        scope: str,
        key: object,
        fingerprint: Any = _ARGUMENTS,
        policy: Policy | None = None,
        **kwargs: Any,
    ) -> T:
        """Await `handler(*args, **kwargs)` once for this scope and key, and return the outcome; see `run`."""
        call = self._call(handler, args, kwargs, scope, key, fingerprint, policy, "asyncio")
        value: T = await perform(call, handler, args, kwargs)
        return value

    def run_batch(
        self,
        handler: Callable[..., Sequence[T] | Mapping[Any, T]],
        messages: Iterable[Any],
        *,
        scope: str | Callable[[Any], object],
        key: str | Callable[[Any], object],
        fingerprint: str | Callable[[Any], object] | None = "message",
        session: Any = None,
        policy: Policy | None = None,
    ) -> list[T]:
        """Call `handler(new)` with those of the messages that are new, and return the outcomes of all, in their order.

        `key` and `scope` are templates over one message (`"{message[id]}"`) or callables of one; a scope without
        fields is that of all. `fingerprint` is a callable of one message, the whole message, or None for no check.
        The handler returns a list with one outcome for each message that it was given, in their order, or a dict
        from key to outcome; an exception in an outcome's place fails that message alone.

        With `session` all that is written and all outcomes are one transaction, as for `idempotent_task`. Raises
        `BatchError` if any message has no outcome, `ConfigurationError` for `on_in_progress="wait"`.
        """
        batch = self._batch(handler, messages, scope, key, fingerprint, session, policy, "blocking")
        outcomes: list[T] = run_sync(perform_batch(batch))
        return outcomes

    async def arun_batch(
        self,
        handler: Callable[..., Awaitable[Sequence[T] | Mapping[Any, T]]],
        messages: Iterable[Any],
        *,
        scope: str | Callable[[Any], object],
        key: str | Callable[[Any], object],
        fingerprint: str | Callable[[Any], object] | None = "message",
        session: Any = None,
        policy: Policy | None = None,
    ) -> list[T]:
        """Await `handler(new)` with those of the messages that are new, and return all outcomes; see `run_batch`."""
        batch = self._batch(handler, messages, scope, key, fingerprint, session, policy, "asyncio")
        outcomes: list[T] = await perform_batch(batch)
        return outcomes

    def claim(
        self,
        *,
        scope: str,
        key: object,
        fingerprint: Any = None,
        outcome_type: Any = UNANNOTATED,
        policy: Policy | None = None,
        **fields: Unpack[PolicyFields],
    ) -> ClaimBlock:
        """Claim a key for a `with` block: `claim.replayed`, `claim.complete(value)`, `claim.outcome`.

        `fingerprint` is any data that has to be the same when the key is; `outcome_type` is what an annotation is
        for a handler. A block that raises before `complete` releases the claim; one that ends without `complete`
        is completed with None.
        """
        request = self._request(scope, key, fingerprint, self._policy(policy, fields), "blocking")
        return ClaimBlock(lambda: Call(request, self.services("blocking"), lambda: outcome_type))

    def aclaim(
        self,
        *,
        scope: str,
        key: object,
        fingerprint: Any = None,
        outcome_type: Any = UNANNOTATED,
        policy: Policy | None = None,
        **fields: Unpack[PolicyFields],
    ) -> AsyncClaimBlock:
        """Claim a key for an `async with` block; `await claim.complete(value)`. See `claim`."""
        request = self._request(scope, key, fingerprint, self._policy(policy, fields), "asyncio")
        return AsyncClaimBlock(lambda: Call(request, self.services("asyncio"), lambda: outcome_type))

    # For people

    def get(self, scope: str, key: object) -> Record | None:
        """Return the record, or None."""
        return run_sync(self._store().get(check_scope(scope, stored=True), check_key(key, stored=True)))

    def steps(self, scope: str, key: object) -> list[StepRecord]:
        """Return the steps of a record in the order in which its handler begins them, without their outcomes.

        An empty list where there is no record, and where the store keeps no steps (Redis alone).
        """
        return run_sync(self._steps(self._store(), scope, key))

    def forget(
        self,
        scope: str,
        key: object,
        *,
        expect_token: int | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> bool:
        """Delete a record and its marker, so that the next delivery runs; returns whether there was one.

        Another process with `local_cache=` answers for it until its `local_cache_ttl` is over.

        Raises `InProgressError` while it runs; `ConflictError` if it has another fencing token than `expect_token`,
        so that what you saw is what you delete. `reason` and `actor` (`user@host`) go to the audit.
        """
        return run_sync(self._forget(self._store(), scope, key, expect_token, reason, actor))

    def resolve(
        self,
        scope: str,
        key: object,
        *,
        outcome: Any = _UNKNOWN,
        outcome_type: Any = UNANNOTATED,
        rerun: bool = False,
        error: Exception | str | None = None,
        expect_token: int | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> Record | None:
        """End a record that is in doubt, parked or overdue: with an outcome, with a final failure, or by a rerun.

        `error` is an exception, or `"type: message"`, as `record_failures` would have recorded it. `rerun=True` gives
        up "at most once" for this key, and sends nothing: the message was acknowledged, so send it again. An outcome
        with a class in it needs the return type of its handler as `outcome_type`.

        Returns the record as it is then, or None if there is none. Raises `InProgressError` while it runs,
        `ConflictError` if it has ended, or has another fencing token than `expect_token`: give that of the record
        that you looked at, so that a late answer does not end a later doubt. `OutcomeError` for an outcome that
        cannot be encoded. `reason` and `actor` (`user@host`) go to the audit.
        """
        ending = self._ending(scope, key, outcome, outcome_type, rerun, error)
        return run_sync(self._resolve(self._store(), scope, key, ending, expect_token, reason, actor))

    def audit(self, scope: str | None = None, key: object = None, *, limit: int = 100) -> list[AuditEntry]:
        """Return what people and functions did to records, the last first: to all, or to those of a scope, or to one.

        Raises `ConfigurationError` for records in Redis, which keeps no audit; the events tell the same.
        """
        return run_sync(self._audit(self._store(), scope, key, limit))

    def records(
        self,
        *,
        state: State | str | None = None,
        scope: str | None = None,
        attention: bool = False,
        after: tuple[str, str] | None = None,
        limit: int | None = None,
    ) -> Iterator[Record]:
        """Yield records in the order of scope and key, read in pages; those in `state` and `scope` if given.

        `attention`: only those that a person should look at: in doubt, parked, failed, or overdue, which are running
        ones whose lease is over. `after`: only those after this scope and key. `limit`: so many at most.
        """
        wanted = None if state is None else _state(state)
        store, left = self._store(), math.inf if limit is None else limit
        while left > 0:
            size = int(min(left, _PAGE))
            page = run_sync(store.records(state=wanted, scope=scope, after=after, limit=size, attention=attention))
            yield from page
            if len(page) < size:
                return
            left -= size
            after = (page[-1].scope, page[-1].key)

    def stats(self) -> dict[State, int]:
        """Return how many records there are in each state."""
        return run_sync(self._store().stats())

    def purge(self, *, batch: int = 1000, grace: float = 3600.0) -> int:
        """Delete records whose retention ended more than `grace` seconds ago, `batch` at a time; returns how many.

        The grace spares what expired while everything was down and may be redelivered now (F17). Running,
        in-doubt and parked records are never purged.
        """
        if batch < 1:
            raise ConfigurationError(f"batch={batch} must be 1 or more")
        store, purged = self._store(), 0
        while True:
            deleted = len(run_sync(store.purge(limit=batch, grace=grace)))
            purged += deleted
            if deleted < batch:
                return purged

    def relay(self, limit: int = 100, *, should_stop: Callable[[], bool] = lambda: False) -> RelayReport:
        """Send up to `limit` messages that handlers published and nobody has sent yet; see `docs/how-to/outbox.md`.

        Returns how many were sent, how many could not be (they are tried again later), and how many are left. It
        ends early, between two messages, once `should_stop()` is true. Any number of relays may run at once. Raises
        `StoreError`, and `ConfigurationError` where the records are not in SQL.
        """
        return run_sync(self.services("blocking").relay.run(limit, should_stop))

    def prepare(self) -> None:
        """Make the store's tables, or check that it can be used; what `idem-tasks init-db` does."""
        run_sync(self._store().prepare())

    def close(self) -> None:
        """Try once more to record what is pending, then close this process's blocking connections."""
        with self._lock:
            services, self._blocking = self._blocking, None
        if services is not None:
            run_sync(services.heartbeat.try_now())
            run_sync(services.store.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # The same from asyncio

    async def aget(self, scope: str, key: object) -> Record | None:
        """As `get`."""
        return await self._astore().get(check_scope(scope, stored=True), check_key(key, stored=True))

    async def asteps(self, scope: str, key: object) -> list[StepRecord]:
        """As `steps`."""
        return await self._steps(self._astore(), scope, key)

    async def aforget(
        self,
        scope: str,
        key: object,
        *,
        expect_token: int | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> bool:
        """As `forget`."""
        return await self._forget(self._astore(), scope, key, expect_token, reason, actor)

    async def aresolve(
        self,
        scope: str,
        key: object,
        *,
        outcome: Any = _UNKNOWN,
        outcome_type: Any = UNANNOTATED,
        rerun: bool = False,
        error: Exception | str | None = None,
        expect_token: int | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> Record | None:
        """As `resolve`."""
        ending = self._ending(scope, key, outcome, outcome_type, rerun, error)
        return await self._resolve(self._astore(), scope, key, ending, expect_token, reason, actor)

    async def aaudit(self, scope: str | None = None, key: object = None, *, limit: int = 100) -> list[AuditEntry]:
        """As `audit`."""
        return await self._audit(self._astore(), scope, key, limit)

    async def arelay(self, limit: int = 100, *, should_stop: Callable[[], bool] = lambda: False) -> RelayReport:
        """As `relay`; senders run in threads."""
        return await self.services("asyncio").relay.run(limit, should_stop)

    async def aclose(self) -> None:
        """As `close`, for the running event loop's connections."""
        services = self._loops.pop(asyncio.get_running_loop(), None)
        if services is not None:
            await services.heartbeat.try_now()
            await services.store.close()

    # What calls are made of

    def check_runtime(self, runtime: RuntimeName) -> None:
        """Raise `ConfigurationError` if the store cannot serve this runtime."""
        if runtime not in self.store.runtimes:
            kind = "async def" if runtime == "asyncio" else "blocking (def)"
            raise ConfigurationError(
                f"this {type(self.store).__name__} serves {' and '.join(sorted(self.store.runtimes))} handlers only, "
                f"not {kind} ones; make it from a URL to serve both"
            )

    def services(self, runtime: RuntimeName) -> Services:
        """Return the store, heartbeat and codec as `runtime` uses them, on this process or event loop."""
        make = _services_from.get()
        if make is not None:
            return make(self, runtime)
        if runtime == "blocking":
            return self._blocking or self._serve_blocking()
        loop = asyncio.get_running_loop()
        services = self._loops.get(loop)
        if services is None:
            with self._lock:
                self._loops = {known: its for known, its in self._loops.items() if not known.is_closed()}
                services = self._loops[loop] = self._serve(runtime, LoopHeartbeat)
        return services

    def _serve_blocking(self) -> Services:
        with self._lock:
            if self._blocking is None:
                self._blocking = self._serve("blocking", ThreadHeartbeat)
            return self._blocking

    def _serve(self, runtime: RuntimeName, heartbeat: Callable[[Store, Announcer], Heartbeat]) -> Services:
        self.check_runtime(runtime)
        store = self._asked.on(runtime, self._announce)
        world = Blocking() if runtime == "blocking" else Asyncio()
        return Services(store, heartbeat(store, self._announce), self._announce, self.codec, world, self._senders)

    def _store(self) -> Store:
        return self.services("blocking").store

    def _astore(self) -> Store:
        return self.services("asyncio").store

    def _policy(self, policy: Policy | None, fields: PolicyFields) -> Policy:
        return (policy or self.policy).replace(**fields).in_force()

    def _call(
        self,
        handler: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        scope: str,
        key: object,
        fingerprint: Any,
        policy: Policy | None,
        runtime: RuntimeName,
    ) -> Call:
        data = [list(args), kwargs] if fingerprint is _ARGUMENTS else fingerprint
        request = self._request(scope, key, data, (policy or self.policy).in_force(), runtime)
        return Call(request, self.services(runtime), return_type_of(handler))

    def _batch(
        self,
        handler: Callable[..., Any],
        messages: Iterable[Any],
        scope: str | Callable[[Any], object],
        key: str | Callable[[Any], object],
        fingerprint: str | Callable[[Any], object] | None,
        session: Any,
        policy: Policy | None,
        runtime: RuntimeName,
    ) -> Batch:
        chosen = (policy or self.policy).in_force()
        chosen.check_runtime(asynchronous=runtime == "asyncio")
        refuse_waiting(chosen)
        plan = message_plan(handler, key, scope, fingerprint)
        of_call = None if session is None else SessionArgument(handler, session, runtime).of((), {})
        services, outcome_type = self.services(runtime), OutcomeType(handler).resolve

        def call_of(message: Any) -> Call:
            request = self._request_for(lambda: plan.of((message,), {}), chosen)
            return Call(request, services, outcome_type, session=of_call)

        return Batch(members_of(messages, call_of), services, handler, session=of_call)

    def _request(self, scope: str, key: object, fingerprint: Any, policy: Policy, runtime: RuntimeName) -> ClaimRequest:
        policy.check_runtime(asynchronous=runtime == "asyncio")

        def make() -> CallKey:
            data = None if fingerprint is None else fingerprint_of(fingerprint)
            return CallKey(check_scope(scope), check_key(key), data)

        return self._request_for(make, policy)

    def _request_for(self, make: Callable[[], CallKey], policy: Policy) -> ClaimRequest:
        try:
            made = make()
        except Exception:
            # Turned off, or in shadow, nothing of ours may keep the handler from running.
            if policy.active and not policy.shadow:
                raise
            made = CallKey("", "", None)
        return ClaimRequest(
            scope=made.scope,
            key=made.key,
            fingerprint=made.fingerprint,
            owner=new_owner(),
            policy=policy,
            holder=process_name(),
        )

    async def _steps(self, store: Store, scope: str, key: object) -> list[StepRecord]:
        return await steps_of(store, check_scope(scope, stored=True), check_key(key, stored=True))

    async def _forget(
        self, store: Store, scope: str, key: object, expect_token: int | None, reason: str | None, actor: str | None
    ) -> bool:
        done = await store.forget(
            check_scope(scope, stored=True),
            check_key(key, stored=True),
            expect_token=expect_token,
            actor=actor or person_name(),
            reason=reason,
        )
        if done is not None:
            self._announce(EventName.FORGOTTEN, done.scope, done.key, **done.details())
        return done is not None

    def _ending(
        self, scope: str, key: object, outcome: Any, outcome_type: Any, rerun: bool, error: Exception | str | None
    ) -> EncodedOutcome | None:
        """Return what `resolve` is to record; None: nothing, the next delivery runs."""
        if [rerun, outcome is not _UNKNOWN, error is not None].count(True) != 1:
            raise ConfigurationError("resolve takes one of outcome=..., error=... and rerun=True")
        if outcome is _UNKNOWN and outcome_type is not UNANNOTATED:
            raise ConfigurationError("resolve takes outcome_type=... with outcome=... only")
        context = OutcomeContext(check_scope(scope, stored=True), check_key(key, stored=True), None)
        if rerun:
            return None
        if error is not None:
            kind, _, message = error.partition(":") if isinstance(error, str) else (error, "", "")
            return failure_of(kind, message.strip())
        try:
            return EncodedOutcome(body=self.codec.encode(outcome, outcome_type, context), codec=self.codec.name)
        except OutcomeError as problem:
            if outcome_type is not UNANNOTATED:
                raise
            hint = "for a handler that returns a class of yours, give resolve its return type as outcome_type"
            raise OutcomeError(f"{problem}; {hint}") from None

    async def _resolve(
        self,
        store: Store,
        scope: str,
        key: object,
        ending: EncodedOutcome | None,
        expect_token: int | None,
        reason: str | None,
        actor: str | None,
    ) -> Record | None:
        scope, key = check_scope(scope, stored=True), check_key(key, stored=True)
        done = await store.resolve(
            scope, key, ending, expect_token=expect_token, actor=actor or person_name(), reason=reason
        )
        if done is None:
            return None
        self._announce(EventName.RESOLVED, scope, key, **done.details())
        return await store.get(scope, key)

    async def _audit(self, store: Store, scope: str | None, key: object, limit: int) -> list[AuditEntry]:
        if scope is None and key is not None:
            raise ConfigurationError("audit takes a key with its scope")
        return await store.audit(
            scope=None if scope is None else check_scope(scope, stored=True),
            key=None if key is None else check_key(key, stored=True),
            limit=limit,
        )


_ServicesFrom = Callable[[Idempotency, RuntimeName], Services]
_services_from: ContextVar[_ServicesFrom | None] = ContextVar("idem_tasks_services_from", default=None)


@contextlib.contextmanager
def services_from(make: _ServicesFrom) -> Iterator[None]:
    """Let every `Idempotency` use the services that `make` gives it, in this context only; for tests."""
    token = _services_from.set(make)
    try:
        yield
    finally:
        _services_from.reset(token)


_made: weakref.WeakSet[Idempotency] = weakref.WeakSet()


def _renew_locks() -> None:
    """In a forked child: a lock's holder may be a thread that only the parent has."""
    for idempotency in list(_made):
        idempotency._lock = threading.Lock()  # noqa: SLF001 - of this module


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


def _state(state: State | str) -> State:
    with contextlib.suppress(ValueError):
        return State(state)
    raise ConfigurationError(f"no such state: {state!r}; known: {', '.join(known.value for known in State)}")
