"""The framework around a handler, if there is one: what the story needs to know of it, and how it is found.

An integration registers a finder when it is imported. It is imported when its library already is, so that a bare
decorator on a Celery task does the right thing and `import idem_tasks` still loads no Celery.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any, Protocol

from idem_tasks.errors import ConfigurationError

_INTEGRATIONS = {name: f"idem_tasks.integrations.{name}" for name in ("celery", "dramatiq", "taskiq")}


class Host(Protocol):
    """The framework that called the handler and will settle its message."""

    @property
    def scope(self) -> str | None:
        """The default scope, such as the Celery task's name."""
        ...

    @property
    def message(self) -> str:
        """The id of the task or message, for people."""
        ...

    @property
    def framework_argument(self) -> bool:
        """Whether the first positional argument is the framework's own, such as Celery's Task."""
        ...

    def is_failure(self, error: BaseException) -> bool:
        """Tell a handler's failure from the framework's control flow (Celery's Retry, Ignore and Reject)."""
        ...

    def proves_no_effect(self, error: BaseException) -> bool:
        """Tell whether the handler itself asked for another delivery, and so knows that nothing happened."""
        ...

    def settle(self, error: BaseException, announce: Callable[..., None]) -> BaseException:
        """Return what to raise to the framework instead of `error`, or `error` itself.

        An error of ours that must not be acknowledged (in progress, lease lost, store unavailable) is put back
        for a later delivery before this returns, and announced (`Call.announce`).
        """
        ...


Finder = Callable[[Callable[..., Any]], Host | None]
Refusal = Callable[[object], None]
_finders: list[Finder] = []
_refusals: list[Refusal] = []


def register(finder: Finder, refusal: Refusal) -> None:
    """Add an integration.

    `finder` finds the host of a decorated function's call; `refusal` raises `ConfigurationError` for an object of
    the framework's that must not be decorated.
    """
    _finders.append(finder)
    _refusals.append(refusal)


def find(function: Callable[..., Any]) -> Host | None:
    """Return the host of the call of this decorated function that is going on, or None for a direct call."""
    if not _INTEGRATIONS.keys().isdisjoint(sys.modules.keys()):
        _load_integrations()
    for finder in _finders:
        host = finder(function)
        if host is not None:
            return host
    return None


def runs(outer: Any, function: Callable[..., Any]) -> bool:
    """Tell whether `outer`, what a framework calls, is `function` under decorators and as a method."""
    layer = outer
    for _ in range(_MAX_WRAPPERS):
        layer = getattr(layer, "__func__", layer)
        if layer is None or layer is function:
            break
        layer = getattr(layer, "__wrapped__", None)
    return layer is function


_MAX_WRAPPERS = 50

SETTLES_MESSAGES = "settles_messages"
"""The attribute by which the callback of a consumer is known; it is True."""


def refuse_wrong_order(target: object) -> None:
    """Raise `ConfigurationError` if `target` is a framework's object, which has to be made of the decorated one."""
    _load_integrations()
    for refusal in _refusals:
        refusal(target)
    # After them: to ask a lazy task of Celery would make it, and with it the configuration of its app.
    if getattr(target, SETTLES_MESSAGES, False) is True:
        raise ConfigurationError(
            "this is a callback that settles messages: put the decorator under @idempotent_callback, or give its "
            "keywords to that; over it, a duplicate would be replayed and its message never settled"
        )


def _load_integrations() -> None:
    for library, integration in list(_INTEGRATIONS.items()):
        if library in sys.modules:
            # Struck off once it is there: a thread that comes meanwhile waits for the import too.
            importlib.import_module(integration)
            _INTEGRATIONS.pop(library, None)
