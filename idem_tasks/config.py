"""`configure`: the process-wide `Idempotency`, from its arguments or from IDEM_TASKS_* in the environment."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Unpack

from idem_tasks.errors import ConfigurationError
from idem_tasks.policy import LOCAL_CACHE_TTL, Duration, Policy, PolicyFields

if TYPE_CHECKING:
    from idem_tasks.events import Observer
    from idem_tasks.idempotency import Idempotency
    from idem_tasks.outbox import Sender
    from idem_tasks.outcomes import Codec
    from idem_tasks.stores.base import Store

DEFAULT_DATABASE_URL = "sqlite:///idem_tasks.db"
"""Where records are kept when nothing else is said: a file in the working directory."""

_lock = threading.RLock()
_default: Idempotency | None = None


def _renew_lock() -> None:
    """In a forked child: the lock's holder may be a thread that only the parent has."""
    global _lock  # noqa: PLW0603 - as below
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def configure(
    *,
    database_url: str | None = None,
    redis_url: str | None = None,
    create_schema: bool | None = None,
    store: Store | None = None,
    policy: Policy | None = None,
    codec: Codec | None = None,
    observers: Sequence[Observer] | None = None,
    senders: Mapping[str, Sender] | None = None,
    local_cache: int = 0,
    local_cache_ttl: Duration = LOCAL_CACHE_TTL,
    **fields: Unpack[PolicyFields],
) -> Idempotency:
    """Make the `Idempotency` that every decorated handler of this process uses unless it was given its own.

    Without arguments IDEM_TASKS_DATABASE_URL and IDEM_TASKS_REDIS_URL are read; without those either it is the
    SQLite file `idem_tasks.db`. Nothing is connected yet. An earlier one is replaced, not closed: handlers may be
    running under it. Raises `ConfigurationError`.
    """
    global _default  # noqa: PLW0603 - the one process-wide default is this module's purpose
    from idem_tasks.idempotency import Idempotency

    chosen = (policy or Policy()).replace(**fields)
    options: dict[str, Any] = {
        "policy": chosen,
        "codec": codec,
        "observers": observers,
        "senders": senders,
        "local_cache": local_cache,
        "local_cache_ttl": local_cache_ttl,
    }
    if store is not None:
        if database_url or redis_url or create_schema is not None:
            raise ConfigurationError("configure takes either store= or URLs, not both")
        made = Idempotency(store=store, **options)
    else:
        made = Idempotency.from_urls(
            database_url=database_url, redis_url=redis_url, create_schema=create_schema, **options
        )
    with _lock:
        _default = made
    return made


def default_idempotency() -> Idempotency:
    """Return what `configure` made; make it from the environment at the first use if nobody called that."""
    made = _default
    if made is None:
        with _lock:
            made = _default  # another thread may have been here meanwhile
            return configure() if made is None else made
    return made


def configured() -> Idempotency | None:
    """Return what `configure` made; None if nobody has called it, or used the default."""
    return _default


@contextmanager
def default_restored() -> Iterator[Idempotency | None]:
    """Give what `configure` made, or None if nobody called it, and restore that afterwards; for tests."""
    global _default  # noqa: PLW0603 - as above
    before = _default
    try:
        yield before
    finally:
        with _lock:
            _default = before


def urls_from_environment() -> tuple[str | None, str | None]:
    """Return IDEM_TASKS_DATABASE_URL and IDEM_TASKS_REDIS_URL; None for what is not set."""
    return os.environ.get("IDEM_TASKS_DATABASE_URL") or None, os.environ.get("IDEM_TASKS_REDIS_URL") or None
