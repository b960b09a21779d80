"""`@idempotent_batch`: puts the story of many messages (`batch.py`) around a handler that takes a list of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Never, ParamSpec, Protocol, TypeVar, Unpack, cast, overload

from idem_tasks import hosts
from idem_tasks.batch import perform_batch
from idem_tasks.batch_members import Batch, members_of, message_plan, refuse_waiting
from idem_tasks.decorator import IdempotentFunction, runtime_of, wrapped
from idem_tasks.errors import ConfigurationError
from idem_tasks.keys import scope_of
from idem_tasks.outcomes import OutcomeType
from idem_tasks.policy import Policy, PolicyFields
from idem_tasks.session_argument import SessionArgument

if TYPE_CHECKING:
    from idem_tasks.hosts import Host
    from idem_tasks.idempotency import Idempotency
    from idem_tasks.keys import CallKey

P = ParamSpec("P")
T = TypeVar("T")


class BatchDecorator(Protocol):
    """Makes a handler that returns a list or a mapping into one that returns a list."""

    @overload
    def __call__(
        self, handler: Callable[P, Coroutine[Any, Any, Mapping[Any, T]]], /
    ) -> Callable[P, Coroutine[Any, Any, list[T]]]: ...
    @overload
    def __call__(
        self, handler: Callable[P, Coroutine[Any, Any, Sequence[T]]], /
    ) -> Callable[P, Coroutine[Any, Any, list[T]]]: ...
    @overload
    def __call__(self, handler: Callable[P, Mapping[Any, T]], /) -> Callable[P, list[T]]: ...
    @overload
    def __call__(self, handler: Callable[P, Sequence[T]], /) -> Callable[P, list[T]]: ...


def idempotent_batch(
    *_positional: Never,  # so that a bare @idempotent_batch hears that it needs key=
    key: str | Callable[[Any], object],
    scope: str | Callable[[Any], object] | None = None,
    fingerprint: str | Callable[[Any], object] | None = "message",
    idempotency: Idempotency | None = None,
    session: Any = None,
    policy: Policy | None = None,
    **fields: Unpack[PolicyFields],
) -> BatchDecorator:
    """Make a function or coroutine function of a list of messages run its effects once for the key of each message.

    The handler is given the messages that are new, in their order. It returns a list with one outcome for each of
    them, in their order, or a dict from key to outcome; an exception in an outcome's place fails that message alone,
    and one that it raises fails them all. Its caller gets the outcomes of all messages, in their order, or
    `BatchError` if any has none.

    `key` and `scope` are templates over one message (`"{message[id]}"`, `"{message.id}"`) or callables of one;
    `fingerprint` is a callable of one, the whole message, or None for no check. The rest is as for `idempotent_task`;
    with `session` all that is written and all outcomes are one transaction. `current_claims()` has the claims.

    Raises `ConfigurationError` at decoration for a handler of other parameters than the messages and `session`, for
    `on_in_progress="wait"`, and for whatever else can be known then.
    """
    known = (policy or Policy()).replace(**fields)
    refuse_waiting(known)

    def decorate(handler: Callable[..., Any]) -> Callable[..., Any]:
        hosts.refuse_wrong_order(handler)
        runtime = runtime_of(handler)
        known.check_runtime(asynchronous=runtime == "asyncio")
        argument = None if session is None else SessionArgument(handler, session, runtime)
        signature = inspect.signature(handler) if argument is None else argument.signature
        plan = message_plan(handler, key, scope, fingerprint)
        task = IdempotentBatch(handler, plan, runtime, idempotency, policy, fields, argument)
        task.takes(signature)
        return wrapped(task, argument)

    return cast(BatchDecorator, decorate)


class IdempotentBatch(IdempotentFunction):
    """What is known of one decorated handler of many messages; its verbs for people take one message."""

    returns = OutcomeType
    takes_many = True
    _signature: inspect.Signature
    _messages: str
    _leading: int

    def takes(self, signature: inspect.Signature) -> None:
        """Find the parameter that is the list of messages; `ConfigurationError` where it is not the only one."""
        parameters = list(signature.parameters.values())
        self._leading = int(len(parameters) > 1 and parameters[0].name in ("self", "cls"))
        own = parameters[self._leading :]
        if len(own) != 1 or own[0].kind not in _BY_POSITION:
            raise ConfigurationError(
                f"{scope_of(self.function)} takes {signature}; the handler of a batch takes one list of messages, "
                "and its session, if session= is given"
            )
        self._signature, self._messages = signature, own[0].name

    def begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], host: Host | None) -> Batch:
        """Freeze the key of each message, before the handler can change one."""
        idempotency, policy = self._resolve()
        refuse_waiting(policy)
        session = None
        if self._session is not None:
            session = self._session.by_name(args, kwargs)
            args, kwargs = self._session.without(args, kwargs)
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        members = members_of(
            bound.arguments[self._messages], lambda message: replace(self.call((message,), {}, host), session=session)
        )
        services, leading = idempotency.services(self._runtime), bound.args[: self._leading]
        return Batch(members, services, self.function, leading, host, session)

    def perform(self, delivery: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Coroutine[Any, Any, Any]:
        """Return the story of this batch."""
        return perform_batch(delivery)

    def of_task(self, name: str, *, bound: bool) -> IdempotentFunction:
        """Return the same for the framework's task of this name: its verbs take one message, also where it is bound."""
        return super().of_task(name, bound=False)

    def _key(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], **options: Any) -> CallKey:
        """Of one message, to which neither a session nor a framework's task belongs."""
        return self._plan.of(args, kwargs, default_scope=options.get("default_scope"))


_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
