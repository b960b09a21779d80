"""What `--app MODULE[:APP]` means: whose `Idempotency` a command uses."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import typer

from idem_tasks import config
from idem_tasks.errors import ConfigurationError, IdemTasksError
from idem_tasks.idempotency import Idempotency


def load(place: str) -> Idempotency:
    """Import a module as `python -m` would find it, and return its `Idempotency`, or what it configured.

    Never the default that nobody asked for: that would be some other database, an empty one, and nobody would notice.
    Raises `ConfigurationError` if it cannot be imported, `BadParameter` if it says of no `Idempotency`.
    """
    name, colon, attribute = place.partition(":")
    if not all(name.split(".")) or (colon and not all(attribute.split("."))):
        raise _wrong(f"{place!r} is not MODULE or MODULE:APP, such as shop.celery:app")
    module, found = _imported(place, name, attribute)
    if isinstance(found, Idempotency):
        return found
    if found is not module and not _is_celery(place, found):
        kind = type(found).__name__
        raise _wrong(f"{place} is of type {kind}, neither a Celery app nor an Idempotency{_instead(name, module)}")
    configured = config.configured()
    if configured is not None:
        return configured
    if _own(module) or config.urls_from_environment() == (None, None):
        raise _wrong(f"{name} was imported and did not call configure{_instead(name, module)}")
    return config.default_idempotency()  # as its workers do, from the environment


def _imported(place: str, name: str, attribute: str) -> tuple[ModuleType, Any]:
    """Return the module and what of it is named."""
    sys.path.insert(0, os.getcwd())  # noqa: PTH109 - a text, as the other entries
    with _said_in_a_line(place):
        module = importlib.import_module(name)
    found: Any = module
    try:
        for part in attribute.split(".") if attribute else ():
            found = getattr(found, part)
    except AttributeError as error:
        raise ConfigurationError(f"--app {place}: {error}") from error
    return module, found


def _is_celery(place: str, found: Any) -> bool:
    if "celery" not in sys.modules:
        return False
    from idem_tasks.integrations.celery_outbox import use_app

    with _said_in_a_line(place):  # it imports the modules of its tasks
        return use_app(found)


@contextmanager
def _said_in_a_line(place: str) -> Iterator[None]:
    """Turn whatever a user's module raises, or ends the process with, into one line."""
    try:
        yield
    except (ImportError, SyntaxError, IdemTasksError) as error:
        raise ConfigurationError(f"--app {place}: {' '.join(str(error).split())}") from error
    except (Exception, SystemExit) as error:
        # Without its words: they may be a URL with its password.
        frames = [each for each in traceback.extract_tb(error.__traceback__) if not each.filename.startswith("<frozen")]
        raise ConfigurationError(
            f"--app {place}: {type(error).__name__} was raised while it was imported, in {frames[-1].filename}, line "
            f"{frames[-1].lineno}; to see all of it: python -c 'import {place.partition(':')[0]}'"
        ) from error


def _own(module: ModuleType) -> list[str]:
    return [name for name, value in vars(module).items() if isinstance(value, Idempotency)]


def _instead(name: str, module: ModuleType) -> str:
    """Say what to write."""
    own = " or ".join(f"--app {name}:{each}" for each in _own(module))
    return f"; write {own}" if own else f"; call configure in it, or give an Idempotency as --app {name}:NAME"


def _wrong(message: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint="--app")
