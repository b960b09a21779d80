"""Counts what a handler did, by name: `effects=` of `assert_idempotent`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Awaitable, Callable, Mapping, Sized
from typing import TYPE_CHECKING, Any, TypeAlias

from idem_tasks.errors import ConfigurationError

if TYPE_CHECKING:
    from sqlalchemy import Engine

Counts = dict[str, int]

Counted: TypeAlias = "int | Mapping[str, int]"
Effects: TypeAlias = (
    "Callable[[], Counted | Awaitable[Counted]] | Sized | Mapping[str, Callable[[], int] | Sized] | Engine"
)
"""A callable that returns a number or numbers by name, something recorded, several of them by name, or an Engine."""

_OURS = "idem_tasks_"


async def count(effects: Any) -> Counts:
    """Return how many effects there are now, by name; raises `ConfigurationError` for what cannot be counted."""
    if effects is None:
        return {}
    if _is_engine(effects):
        return _rows(effects)
    if isinstance(effects, Mapping):
        return {str(name): _number(await _called(what, _NAMED)) for name, what in effects.items()}
    counted = await _called(effects)
    if isinstance(counted, Mapping):
        return {str(name): _number(number) for name, number in counted.items()}
    return {"effects": _number(counted)}


_NAMED = "; a dict that is itself to be counted goes under a name, as in {'charges': receipts}"


async def _called(effects: Any, remedy: str = "") -> Any:
    """Return what a callable returns, awaited if need be, or the length of what is recorded."""
    if isinstance(effects, Sized) and not isinstance(effects, str | bytes):
        return len(effects)
    if not callable(effects):
        raise ConfigurationError(
            "effects= takes a callable that returns a number (or numbers by name), a list, a mapping of callables and "
            f"lists by name, or a SQLAlchemy Engine, not {type(effects).__name__}{remedy}"
        )
    counted = effects()
    return await counted if inspect.isawaitable(counted) else counted


def _number(counted: Any) -> int:
    if not isinstance(counted, int):
        raise ConfigurationError(f"effects= counted {counted!r}, which is no whole number")
    return counted


def _is_engine(effects: Any) -> bool:
    sqlalchemy = sys.modules.get("sqlalchemy")
    return sqlalchemy is not None and isinstance(effects, sqlalchemy.Engine)


def _rows(engine: Engine) -> Counts:
    """Count the rows of every table but ours."""
    from sqlalchemy import func, inspect as inspector, select, table

    names = [name for name in inspector(engine).get_table_names() if not name.startswith(_OURS)]
    with engine.connect() as connection:
        return {name: connection.execute(select(func.count()).select_from(table(name))).scalar_one() for name in names}
