"""Policy: how long things last, and what happens when they go wrong."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypedDict, get_args

from idem_tasks.errors import ConfigurationError

Duration = float | timedelta
"""Seconds as a number, or a timedelta."""

OnDuplicate = Literal["replay", "skip", "raise"]
OnInProgress = Literal["raise", "wait"]
OnCrash = Literal["rerun", "hold"] | Callable[[Any], Any]
"""A function is given a `DeadClaim` and returns an `Outcome`, `RERUN` or `HOLD`, or an awaitable of one."""
OnMarkerUnavailable = Literal["bypass", "raise"]
OnStoreUnavailable = Literal["raise", "run"]

LOCAL_CACHE_TTL = 60.0
"""Seconds that an outcome in a process's own cache answers at most, unless something else is said.

A broker delivers most copies again within them, and a person who forgot a record waits no longer than that.
"""

_CHOICES: dict[str, tuple[str, ...]] = {
    "on_duplicate": get_args(OnDuplicate),
    "on_in_progress": get_args(OnInProgress),
    "on_marker_unavailable": get_args(OnMarkerUnavailable),
    "on_store_unavailable": get_args(OnStoreUnavailable),
}
_MINIMUM_LEASE = 0.1
"""Seconds. Below this a renewal every third of the lease cannot be relied upon over a network."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """All that can be chosen about a handler's claims; every field is also a keyword of the decorator.

    Durations are given as seconds or `timedelta` and kept as float seconds.
    Raises `ConfigurationError` where a value is out of range or two contradict each other.
    """

    lease: float = 60.0
    """Seconds a claim stands without a renewal; it is renewed every third of it while the handler runs."""
    max_hold: float = 3600.0
    """Seconds after which renewals stop, so that a hung handler does not keep its key for ever."""
    retention: float = 7 * 86400.0
    """Seconds an outcome answers duplicates; must outlast the broker's longest redelivery or replay."""
    cache_ttl: float = 86400.0
    """Seconds Redis, or a local cache, answers instead of SQL; never longer than `retention`."""
    on_duplicate: OnDuplicate = "replay"
    """`replay` returns the recorded outcome; `skip` keeps none and returns None; `raise` raises DuplicateError."""
    on_in_progress: OnInProgress = "raise"
    """`raise` raises InProgressError at once; `wait` waits up to `wait_timeout` for the outcome first."""
    wait_timeout: float = 10.0
    """Seconds that `on_in_progress="wait"` waits."""
    on_crash: OnCrash = "rerun"
    """`rerun` runs a dead holder's work again (at least once); `hold` leaves it in doubt (at most once).

    A function is given the `DeadClaim`, looks at the outside world and returns an `Outcome`, `RERUN` or `HOLD`.
    """
    record_failures: tuple[type[Exception], ...] = ()
    """Exception types whose failure is final: recorded, and raised again for every duplicate."""
    safe_to_retry: tuple[type[BaseException], ...] = ()
    """Under `hold` or a function: exception types which prove that no effect happened; others leave it in doubt."""
    max_attempts: int | None = None
    """Handler failures before the record is parked; None: no limit."""
    max_crashes: int | None = 3
    """Takeovers from dead holders before the record is parked; None: no limit."""
    on_marker_unavailable: OnMarkerUnavailable = "bypass"
    """`bypass` lets SQL alone arbitrate while Redis is away; `raise` raises StoreUnavailableError."""
    on_store_unavailable: OnStoreUnavailable = "raise"
    """`raise` raises StoreUnavailableError while SQL is away; `run` runs the handler unprotected."""
    max_outcome_bytes: int = 1024 * 1024
    """Encoded outcomes above this many bytes are not kept; the record is still completed."""
    shadow: bool = False
    """Detect and count duplicates, but run everything: for a safe roll-out."""
    enabled: bool = True
    """False runs the bare handler. IDEM_TASKS_DISABLED=1 does so everywhere."""

    def __post_init__(self) -> None:
        for name in ("lease", "max_hold", "retention", "cache_ttl", "wait_timeout"):
            object.__setattr__(self, name, seconds(name, getattr(self, name)))
        for name in ("record_failures", "safe_to_retry"):
            object.__setattr__(self, name, _exception_types(name, getattr(self, name)))
        for name, choices in _CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        _check_on_crash(self.on_crash)
        for name in ("max_attempts", "max_crashes", "max_outcome_bytes"):
            check_count(name, getattr(self, name), optional=name != "max_outcome_bytes")
        for name in ("shadow", "enabled"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigurationError(f"{name} must be True or False, not {getattr(self, name)!r}")
        self._check_together()

    def _check_together(self) -> None:
        if self.lease < _MINIMUM_LEASE:
            raise ConfigurationError(f"lease={self.lease} is too short to be renewed; use {_MINIMUM_LEASE} s or more")
        if self.max_hold < self.lease:
            raise ConfigurationError(f"max_hold={self.max_hold} is shorter than lease={self.lease}")
        if self.retention <= 0:
            raise ConfigurationError("retention must be more than 0 seconds")
        if self.safe_to_retry and not self.doubts:
            raise ConfigurationError('safe_to_retry only has a meaning with on_crash="hold" or a function')
        if self.cache_ttl <= 0:
            raise ConfigurationError("cache_ttl must be more than 0 seconds")
        if self.cache_ttl > self.retention:
            # A retention below the default cache_ttl is no mistake: Redis then answers as long as SQL does.
            object.__setattr__(self, "cache_ttl", self.retention)

    def replace(self, **changes: Any) -> Policy:
        """Return a copy with these fields changed; raises `ConfigurationError` for an unknown field."""
        unknown = changes.keys() - FIELD_NAMES
        if unknown:
            raise ConfigurationError(
                f"unknown keyword: {', '.join(sorted(unknown))}; it is no field of Policy, which has: "
                f"{', '.join(sorted(FIELD_NAMES))}"
            )
        return dataclasses.replace(self, **changes) if changes else self

    def in_force(self) -> Policy:
        """Return the policy as claims are made under it: in shadow nothing is left parked or in doubt."""
        if not self.shadow:
            return self
        return self.replace(on_crash="rerun", safe_to_retry=(), max_attempts=None, max_crashes=None)

    @property
    def doubts(self) -> bool:
        """Whether work that ended in mid-run is left in doubt: under `hold`, and under a function until it answered."""
        return self.on_crash != "rerun"

    def check_runtime(self, *, asynchronous: bool) -> None:
        """Raise `ConfigurationError` for a coroutine function as `on_crash` where nobody could await it."""
        if not asynchronous and is_coroutine_function(self.on_crash):
            raise ConfigurationError(
                f"on_crash={_name_of(self.on_crash)} is an async def function, and nobody awaits it for a handler that "
                "is a plain def: make it a plain def too"
            )

    @property
    def active(self) -> bool:
        """False where `enabled` is false or IDEM_TASKS_DISABLED is 1, true, yes or on; read at each call."""
        # Anything but a clear yes, such as "false" or a slip of the pen, keeps the protection.
        setting = os.environ.get("IDEM_TASKS_DISABLED")
        if setting is not None and setting.strip().lower() in ("1", "true", "yes", "on"):
            _warn_of_disabled()
            return False
        return self.enabled


@functools.cache
def _warn_of_disabled() -> None:
    """Say it once in each process, so that a switch left on by mistake is seen."""
    logging.getLogger("idem_tasks").warning("IDEM_TASKS_DISABLED is set: handlers run without protection")


FIELD_NAMES = frozenset(field.name for field in dataclasses.fields(Policy))


class PolicyFields(TypedDict, total=False):
    """The fields of `Policy` as keywords, for type checkers."""

    lease: Duration
    max_hold: Duration
    retention: Duration
    cache_ttl: Duration
    on_duplicate: OnDuplicate
    on_in_progress: OnInProgress
    wait_timeout: Duration
    on_crash: OnCrash
    record_failures: type[Exception] | tuple[type[Exception], ...]
    safe_to_retry: type[BaseException] | tuple[type[BaseException], ...]
    max_attempts: int | None
    max_crashes: int | None
    on_marker_unavailable: OnMarkerUnavailable
    on_store_unavailable: OnStoreUnavailable
    max_outcome_bytes: int
    shadow: bool
    enabled: bool


def seconds(name: str, value: object) -> float:
    """Return a duration as float seconds; raises `ConfigurationError` for what is none."""
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigurationError(f"{name} must be seconds or a timedelta, not {type(value).__name__}")
    if not 0 <= value < 1e10:
        raise ConfigurationError(f"{name}={value} must be from 0 to 10,000,000,000 seconds")
    return float(value)


def _exception_types(name: str, value: object) -> tuple[type[BaseException], ...]:
    kinds = value if isinstance(value, tuple | list | set | frozenset) else (value,)
    base = Exception if name == "record_failures" else BaseException
    for kind in kinds:
        if not (isinstance(kind, type) and issubclass(kind, base)):
            raise ConfigurationError(f"{name} takes exception types, not {kind!r}")
    return tuple(kinds)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigurationError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}")


def _check_on_crash(value: object) -> None:
    """Find out at decoration what else would only be found out after a crash."""
    if isinstance(value, str) or not callable(value) or isinstance(value, type):
        if value not in ("rerun", "hold"):
            raise ConfigurationError(f"on_crash={value!r} must be 'rerun', 'hold' or a function of the dead claim")
        return
    function = inspect.unwrap(value.func if isinstance(value, functools.partial) else value)
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigurationError(f"on_crash={_name_of(value)} is a generator function: calling it asks nobody")
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return  # of a builtin, which shows none
    try:
        signature.bind(None)
    except TypeError as error:
        raise ConfigurationError(
            f"on_crash={_name_of(value)} must be 'rerun', 'hold' or a function of the dead claim alone; "
            f"this one takes {signature}"
        ) from error


def is_coroutine_function(function: object) -> bool:
    """Recognise one also behind partials and wrappers, and as the `__call__` of an object."""
    while isinstance(function, functools.partial):
        function = function.func
    if not callable(function):
        return False
    if not inspect.isroutine(function):
        return inspect.iscoroutinefunction(type(function).__call__)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(inspect.unwrap(function))


def _name_of(function: object) -> str:
    return str(getattr(function, "__qualname__", None) or repr(function))


def check_count(name: str, value: object, *, optional: bool) -> None:
    """Raise `ConfigurationError` for what is no whole number from 0; None is one where it is `optional`."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigurationError(f"{name}={value!r} must be a whole number, 0 or more")
