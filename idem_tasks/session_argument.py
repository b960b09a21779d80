"""The argument `session` of a handler: given by its caller, or by us; never a part of its key or fingerprint."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from idem_tasks.stores.base import RuntimeName, SessionSource

NAME = "session"

_Parameter = inspect.Parameter


@dataclass(frozen=True, slots=True)
class SessionOfCall:
    """Where one call's session comes from, and whether its handler takes it as an argument."""

    source: SessionSource
    given: Any
    """The caller's own, or None."""
    is_missing: bool
    """Whether the handler has a parameter for it that its caller did not fill."""

    def passed(self, kwargs: Mapping[str, Any], session: Any) -> Mapping[str, Any]:
        """Return the handler's keyword arguments, the session among them."""
        return {**kwargs, NAME: session} if self.is_missing else kwargs


class SessionArgument:
    """Tells the argument `session` of one handler from all others."""

    def __init__(self, handler: Callable[..., Any], source: Any, runtime: RuntimeName) -> None:
        """`source` is what was given as `session=`; raises `ConfigurationError` if it cannot serve this runtime."""
        from idem_tasks.stores.sql_sessions import Sessions  # SQLAlchemy: only for those who use it

        self._source = Sessions(source, runtime)
        signature = inspect.signature(handler)
        parameters = list(signature.parameters.values())
        self._own = signature.parameters.get(NAME)
        self._position = -1
        others = [parameter for parameter in parameters if parameter.name != NAME]
        self.signature = signature.replace(parameters=others)
        """The handler's, without it."""
        self.shown = signature
        """What frameworks see, Celery and FastAPI among them: nobody has to give it."""
        if self._own is None:
            return
        if self._own.kind is not _Parameter.KEYWORD_ONLY:
            self._position = parameters.index(self._own)
        if self._own.default is _Parameter.empty:
            optional = self._own.replace(kind=_Parameter.KEYWORD_ONLY, default=None)
            has_rest = bool(others) and others[-1].kind is _Parameter.VAR_KEYWORD
            others.insert(len(others) - has_rest, optional)
            self.shown = signature.replace(parameters=others)

    def of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> SessionOfCall:
        """Return where this call's session comes from."""
        given, fills_it = kwargs.get(NAME), kwargs.get(NAME) is not None
        if 0 <= self._position < len(args):
            given, fills_it = args[self._position], True
        return SessionOfCall(self._source, given, is_missing=self._own is not None and not fills_it)

    def by_name(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> SessionOfCall:
        """Return the same for a handler that is called without it: it gets it by its name, if it has it at all."""
        return replace(self.of(args, kwargs), is_missing=self._own is not None)

    def without(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """Return the arguments that key and fingerprint are made of."""
        if NAME in kwargs:
            return args, {name: value for name, value in kwargs.items() if name != NAME}
        if 0 <= self._position < len(args):
            return args[: self._position] + args[self._position + 1 :], kwargs
        return args, kwargs
