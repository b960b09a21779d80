"""`@idempotent_task`: puts the story (`task.py`) around a handler, once, and keeps what it needs for every call."""

from __future__ import annotations

import asyncio
import functools
import inspect
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Never, ParamSpec, Protocol, TypeVar, Unpack, cast

from idem_tasks import config, hosts
from idem_tasks.call import Call
from idem_tasks.claims import ClaimRequest, Record, new_owner, process_name
from idem_tasks.errors import ConfigurationError
from idem_tasks.events import EventName
from idem_tasks.hosts import Host
from idem_tasks.keys import CallKey, KeyPlan
from idem_tasks.outcomes import ReturnType
from idem_tasks.policy import Policy, PolicyFields
from idem_tasks.runtime import HandlerStopIteration, run_sync
from idem_tasks.session_argument import SessionArgument
from idem_tasks.stores.base import RuntimeName
from idem_tasks.task import perform

if TYPE_CHECKING:
    from idem_tasks.idempotency import Idempotency

P = ParamSpec("P")
R = TypeVar("R")


def idempotent_task(
    *_positional: Never,  # so that a bare @idempotent_task hears that it needs key=
    key: str | Callable[..., object],
    scope: str | Callable[..., object] | None = None,
    fingerprint: str | Sequence[str] | Callable[..., object] | None = "arguments",
    idempotency: Idempotency | None = None,
    session: Any = None,
    policy: Policy | None = None,
    **fields: Unpack[PolicyFields],
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function or coroutine function run its effects once for each key.

    `key` is a template over the handler's own parameters (`"{order_id}"`, `"{order.id}"`, `"{event[id]}"`) or a
    callable that is given the same arguments. `scope` is the Celery task's name, else `module.qualname`; name it
    yourself and the function may be renamed. `fingerprint` says which arguments must be the same whenever the key
    is. `idempotency` defaults to what `configure` made. All other keywords are fields of `Policy`.

    `session` is a `sessionmaker`, `async_sessionmaker` or scoped session of SQLAlchemy, or a callable that returns a
    session: what the handler writes through it and its outcome are one transaction, which this commits. The handler
    gets it as its parameter `session`, if it has one and its caller did not fill it, and as `current_claim().session`.
    It may run again within one call, after a deadlock that undid all it wrote.

    With Celery it goes under `@app.task`. Raises `ConfigurationError` at decoration for whatever can be known then.
    """
    known = (policy or Policy()).replace(**fields)  # so that a wrong field is an error here, not at the first call

    def decorate(handler: Callable[P, R]) -> Callable[P, R]:
        hosts.refuse_wrong_order(handler)
        runtime = runtime_of(handler)
        known.check_runtime(asynchronous=runtime == "asyncio")
        argument = None if session is None else SessionArgument(handler, session, runtime)
        signature = None if argument is None else argument.signature
        plan = KeyPlan(handler, key=key, scope=scope, fingerprint=fingerprint, signature=signature)
        task = IdempotentFunction(handler, plan, runtime, idempotency, policy, fields, argument)
        return cast(Callable[P, R], wrapped(task, argument))

    return decorate


def wrapped(task: IdempotentFunction, argument: SessionArgument | None) -> Callable[..., Any]:
    """Return the function that stands in the handler's place; raises `ConfigurationError` for what is known by now."""
    task.check_early()
    wrapper: Any = _asyncio_wrapper(task) if task.asynchronous else _blocking_wrapper(task)
    # Celery reads the parameters to check a call before it is published; `wraps` alone would show it (*args).
    wrapper.__signature__ = inspect.signature(task.function) if argument is None else argument.shown
    wrapper.idempotency = task
    return cast(Callable[..., Any], wrapper)


def runtime_of(handler: Callable[..., Any]) -> RuntimeName:
    """Recognise a coroutine function, also behind partials and wrappers; refuse what cannot be a handler."""
    if isinstance(handler, staticmethod | classmethod):
        raise ConfigurationError(f"@idempotent_task goes under @{type(handler).__name__}, next to the function")
    if isinstance(handler, type) or not callable(handler):
        raise ConfigurationError(f"idempotent_task decorates functions and methods, not {type(handler).__name__}")
    if _find(handler) is not None:
        raise ConfigurationError("this is decorated with @idempotent_task already; its own claim would be in its way")
    function = handler
    while isinstance(function, functools.partial):
        function = function.func
    candidates = {id(found): found for found in (function, inspect.unwrap(function))}
    if not inspect.isroutine(function):
        candidates[id(function)] = type(function).__call__
    for found in candidates.values():
        if inspect.isgeneratorfunction(found) or inspect.isasyncgenfunction(found):
            raise ConfigurationError(
                f"{getattr(function, '__qualname__', function)} is a generator function: calling it runs nothing yet, "
                "so there is no outcome to record; decorate a function that returns a value"
            )
    asynchronous = any(inspect.iscoroutinefunction(found) for found in candidates.values())
    return "asyncio" if asynchronous else "blocking"


def _blocking_wrapper(task: IdempotentFunction) -> Callable[..., Any]:
    @functools.wraps(task.function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        host = hosts.find(wrapper)
        delivery = task.begin(args, kwargs, host)
        try:
            return run_sync(task.perform(delivery, args, kwargs))
        except HandlerStopIteration as carrier:
            raise carrier.error from None
        except BaseException as error:
            if host is None:
                raise
            settled = host.settle(error, delivery.announce)
            if settled is error:
                raise
            raise settled from error

    return wrapper


def _asyncio_wrapper(task: IdempotentFunction) -> Callable[..., Coroutine[Any, Any, Any]]:
    """A plain function that returns the coroutine: a host that is not going to await it has to refuse the call."""

    @functools.wraps(task.function)
    def wrapper(*args: Any, **kwargs: Any) -> Coroutine[Any, Any, Any]:
        return run(hosts.find(wrapper), args, kwargs)

    @functools.wraps(task.function)
    async def run(host: Host | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        delivery = task.begin(args, kwargs, host)
        try:
            return await task.perform(delivery, args, kwargs)
        except BaseException as error:
            if host is None or isinstance(error, GeneratorExit):  # the event loop is gone: nothing can be awaited
                raise
            settled = await asyncio.to_thread(host.settle, error, delivery.announce)
            if settled is error:
                raise
            raise settled from error

    return _marked_as_coroutine_function(wrapper)


def _marked_as_coroutine_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make `inspect.iscoroutinefunction` say True of a function that returns a coroutine."""
    if sys.version_info >= (3, 12):
        return inspect.markcoroutinefunction(function)
    # Python 3.11 looks at this flag only to answer that question: calls go by the bytecode.
    function.__code__ = function.__code__.replace(co_flags=function.__code__.co_flags | inspect.CO_COROUTINE)
    return function


class Delivery(Protocol):
    """What a decorated handler was called with, as its framework's message is settled by it."""

    def announce(self, name: EventName, **details: Any) -> None:
        """Tell the observers what became of it."""


class IdempotentFunction:
    """What is known of one decorated handler: `charge.idempotency`, or `idempotency_of(charge)` for a Celery task."""

    returns = ReturnType
    """Where the type of an outcome is found."""

    takes_many = False
    """Whether it is called with a list of messages."""

    def __init__(
        self,
        function: Callable[..., Any],
        plan: KeyPlan,
        runtime: RuntimeName,
        idempotency: Idempotency | None,
        policy: Policy | None,
        fields: Mapping[str, Any],
        session: SessionArgument | None = None,
    ) -> None:
        self.function = function
        """The bare handler, without any protection."""
        self._plan = plan
        self._runtime = runtime
        self._idempotency = idempotency
        self._policy = policy
        self._fields = fields
        self._session = session
        self._return_type = self.returns(function)
        self._resolved: tuple[Idempotency, Policy] | None = None

    def check_early(self) -> None:
        """Raise `ConfigurationError` for whatever can be known at decoration."""
        if self._idempotency is None:
            return
        self._idempotency.check_runtime(self._runtime)
        own = (self._policy or self._idempotency.policy).replace(**self._fields)
        own.check_runtime(asynchronous=self.asynchronous)
        if own.on_duplicate != "skip":
            self._idempotency.codec.check(self._return_type.early())

    @property
    def idempotency(self) -> Idempotency:
        """The `Idempotency` that it uses: its own, or the process-wide one."""
        return self._resolve()[0]

    @property
    def asynchronous(self) -> bool:
        """Whether the handler is a coroutine function."""
        return self._runtime == "asyncio"

    @property
    def policy(self) -> Policy:
        """The policy in force: the decorator's fields over those of `policy=` or of its `Idempotency`."""
        return self._resolve()[1]

    def _resolve(self) -> tuple[Idempotency, Policy]:
        idempotency = self._idempotency or config.default_idempotency()
        resolved = self._resolved
        if resolved is None or resolved[0] is not idempotency:
            policy = (self._policy or idempotency.policy).replace(**self._fields).in_force()
            policy.check_runtime(asynchronous=self.asynchronous)
            if policy.on_duplicate != "skip" and policy.active:
                idempotency.codec.check(self._return_type.resolve())
            resolved = self._resolved = (idempotency, policy)
        return resolved

    def call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], host: Host | None) -> Call:
        """Step 0: freeze scope, key and fingerprint of one delivery, before the handler can change its arguments."""
        idempotency, policy = self._resolve()
        holder, of_host = process_name(), _NO_HOST
        if host is not None:
            holder = f"{holder} {host.message}"
            of_host = {"default_scope": host.scope, "framework_argument": host.framework_argument}
        session = None if self._session is None else self._session.of(args, kwargs)
        try:
            made = self._key(args, kwargs, **of_host)
        except Exception:
            # Turned off, or in shadow, nothing of ours may keep the handler from running.
            if policy.active and not policy.shadow:
                raise
            made = CallKey("", "", None)
        request = ClaimRequest(
            scope=made.scope,
            key=made.key,
            fingerprint=made.fingerprint,
            owner=new_owner(),
            policy=policy,
            holder=holder,
        )
        return Call(request, idempotency.services(self._runtime), self._return_type.resolve, host, session)

    def begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], host: Host | None) -> Delivery:
        """Return what `perform` performs, and what announces how its message is settled."""
        return self.call(args, kwargs, host)

    def perform(self, delivery: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Coroutine[Any, Any, Any]:
        """Return the story of this delivery."""
        return perform(delivery, self.function, args, kwargs)

    def announce(self, name: EventName, scope: str, key: str, **details: Any) -> None:
        """Tell the observers of its `Idempotency` what became of a message; for integrations."""
        self.idempotency.services(self._runtime).announce(name, scope, key, **details)

    def key_for(self, *args: Any, **kwargs: Any) -> str:
        """Return the idempotency key that a call with these arguments has."""
        return self._key(args, kwargs).key

    def scope_for(self, *args: Any, **kwargs: Any) -> str:
        """Return the scope that a call with these arguments has."""
        return self._key(args, kwargs).scope

    def lookup(self, *args: Any, **kwargs: Any) -> Record | None:
        """Return the record of a call with these arguments, or None."""
        made = self._key(args, kwargs)
        return self.idempotency.get(made.scope, made.key)

    def forget(self, *args: Any, **kwargs: Any) -> bool:
        """Delete the record of a call with these arguments, so that its next delivery runs; False if there is none."""
        made = self._key(args, kwargs)
        return self.idempotency.forget(made.scope, made.key)

    def _key(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], **options: Any) -> CallKey:
        if self._session is not None:
            args, kwargs = self._session.without(args, kwargs)
        return self._plan.of(args, kwargs, **options)

    def of_task(self, name: str, *, bound: bool) -> IdempotentFunction:
        """Return the same for the framework's task of this name; `bound`: its handler gets the task itself first."""
        return _OfTask(self, name, bound)


class _OfTask(IdempotentFunction):
    """A handler as a framework's task knows it: under the task's name, called without the task itself."""

    def __init__(self, function: IdempotentFunction, name: str, bound: bool) -> None:
        self.__dict__.update(function.__dict__)
        self._name = name
        self._bound = bound

    def _key(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], **options: Any) -> CallKey:
        own = (None, *args) if self._bound else args
        return super()._key(own, kwargs, default_scope=self._name, framework_argument=self._bound)


def idempotency_of(task: Any) -> IdempotentFunction:
    """Return what is known of a decorated function or method, or of the task or actor that a framework made of one.

    Raises `ConfigurationError` for anything else.
    """
    found = _find(task) or _find(getattr(task, "fn", None))
    if found is not None:
        return found
    for attribute in ("_orig_run", "run"):
        run = getattr(task, attribute, None)
        found = _find(run)
        if found is not None:
            return found.of_task(task.name, bound=getattr(run, "__self__", None) is not None)
    raise ConfigurationError(f"{task!r} is not decorated with @idempotent_task")


def _find(function: Any) -> IdempotentFunction | None:
    """Look for the decorator's mark on a function, and on what it wraps."""
    for _ in range(_MAX_WRAPPERS):
        marked = getattr(function, "__dict__", {}).get("idempotency")
        if isinstance(marked, IdempotentFunction):
            return marked
        function = getattr(function, "__func__", None) or getattr(function, "__dict__", {}).get("__wrapped__")
        if function is None:
            return None
    return None


_MAX_WRAPPERS = 50
_NO_HOST: Mapping[str, Any] = {}
