"""Every error this library raises, under one root.

::

    IdemTasksError
    ├── ConfigurationError (ValueError)      at decoration or start
    │   └── MissingExtraError (ImportError)  names the extra to install
    ├── InvalidKeyError (ValueError)         no usable key or fingerprint; nothing ran
    ├── ConflictError                        another delivery of the same key
    │   ├── InProgressError                  runs right now; retry after a delay
    │   ├── FingerprintMismatchError         same key, other arguments
    │   ├── DuplicateError                   finished before; policy on_duplicate="raise"
    │   └── LeaseLostError                   this claim was taken over while its handler ran
    ├── InDoubtError                         a person has to say whether the effect happened
    ├── ParkedError                          too many crashes or failures; a person has to look
    │   └── StepsChangedError                other steps than at an earlier attempt of the same key
    ├── BatchError                           some members of a batch have no outcome; each has its own error
    ├── MessageError (ValueError)            a message that cannot be kept in the outbox; nothing was published
    ├── OutcomeError                         an outcome that cannot be encoded, decoded or was not kept
    ├── ReplayedFailureError                 the recorded failure of an earlier delivery
    └── StoreError                           Redis or SQL answered with an error; retry
        ├── StoreUnavailableError            Redis or SQL cannot be reached; retry
        └── StoreConfigurationError          it was reached, and is not set up for us (a ConfigurationError too)

Messages name the scope and key, never arguments, outcomes or secrets. All errors survive pickle, because Celery
sends them between processes, and can be made of their message alone, as Celery's JSON result backends do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class IdemTasksError(Exception):
    """Root of all errors of this library."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _restore, (type(self), self.args, self.__dict__.copy())


def _restore(cls: type[IdemTasksError], args: tuple[Any, ...], fields: dict[str, Any]) -> IdemTasksError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(fields)
    return error


class ConfigurationError(IdemTasksError, ValueError):
    """The set-up is wrong; raised at decoration, at start or at the first call, before any effect."""


class MissingExtraError(ConfigurationError, ImportError):
    """An optional dependency is not installed; `extra` is what to install."""

    def __init__(self, message: str | None = None, *, package: str = "", extra: str = "") -> None:
        self.package = package
        self.extra = extra
        super().__init__(message or f"{package} is not installed; run: pip install 'idem-tasks[{extra}]'")
        self.msg = str(self)  # ImportError's own, which ValueError's side of the tree leaves empty


class InvalidKeyError(IdemTasksError, ValueError):
    """A call has no usable idempotency key, scope or fingerprint; nothing was claimed and nothing ran."""


class ConflictError(IdemTasksError):
    """Another delivery of the same scope and key stands in the way."""

    def __init__(self, message: str = "", *, scope: str = "", key: str = "") -> None:
        self.scope = scope
        self.key = key
        super().__init__(message)


class InProgressError(ConflictError):
    """The same key runs elsewhere right now; `retry_after` (seconds) is what is left of its lease."""

    def __init__(self, message: str | None = None, *, scope: str = "", key: str = "", retry_after: float = 0.0) -> None:
        self.retry_after = retry_after
        super().__init__(
            message or f"{scope} {key!r} is being handled by another delivery; try again in {retry_after:.1f} s",
            scope=scope,
            key=key,
        )


class FingerprintMismatchError(ConflictError):
    """The key was used before with other arguments; `changed` names them where that is known."""

    def __init__(
        self, message: str | None = None, *, scope: str = "", key: str = "", changed: Sequence[str] = ()
    ) -> None:
        self.changed = tuple(changed)
        differing = f" ({', '.join(self.changed)})" if self.changed else ""
        super().__init__(
            message
            or f"{scope} {key!r} was used before with other arguments{differing}; "
            "use another key for another operation, or exclude what may differ with fingerprint=[...]",
            scope=scope,
            key=key,
        )


class DuplicateError(ConflictError):
    """The key is finished and the policy is on_duplicate="raise"; `outcome` is the recorded value."""

    def __init__(self, message: str | None = None, *, scope: str = "", key: str = "", outcome: Any = None) -> None:
        self.outcome = outcome
        super().__init__(message or f"{scope} {key!r} was handled before", scope=scope, key=key)


class LeaseLostError(ConflictError):
    """The claim was taken over while its handler ran, and no outcome is recorded yet.

    The effects of this handler may have happened. The message must be delivered again, not acknowledged.
    """

    def __init__(self, message: str | None = None, *, scope: str = "", key: str = "", fencing_token: int = 0) -> None:
        self.fencing_token = fencing_token
        super().__init__(
            message or f"{scope} {key!r}: the claim with fencing token {fencing_token} was lost while its handler ran",
            scope=scope,
            key=key,
        )


class InDoubtError(IdemTasksError):
    """A handler died or failed in mid-run, and nobody knows yet whether its effect happened (`on_crash`)."""

    def __init__(self, message: str | None = None, *, scope: str = "", key: str = "") -> None:
        self.scope = scope
        self.key = key
        super().__init__(
            message
            or f"{scope} {key!r} is in doubt: an earlier delivery ended in mid-run, so it is not run again; "
            "find out whether its effect happened, then run idem-tasks resolve, or call Idempotency.resolve"
        )


class ParkedError(IdemTasksError):
    """Too many crashes (`max_crashes`) or failures (`max_attempts`): the record waits for a person."""

    def __init__(
        self, message: str | None = None, *, scope: str = "", key: str = "", crashes: int = 0, failures: int = 0
    ) -> None:
        self.scope = scope
        self.key = key
        self.crashes = crashes
        self.failures = failures
        super().__init__(
            message
            or f"{scope} {key!r} is parked (crashes: {crashes}, failures: {failures}); idem-tasks show tells why. "
            "When the cause is mended, run idem-tasks resolve --rerun, or call Idempotency.resolve"
        )


class StepsChangedError(ParkedError):
    """A handler began another step than an earlier attempt of the same key did at that place; the step did not run.

    `earlier` are the names of that attempt's steps, `now` those begun by this one, the refused one last. The record
    is parked. Where the handler's code was changed, `forget` the record to begin all its steps again.
    """

    def __init__(
        self,
        message: str | None = None,
        *,
        scope: str = "",
        key: str = "",
        crashes: int = 0,
        failures: int = 0,
        earlier: Sequence[str] = (),
        now: Sequence[str] = (),
    ) -> None:
        self.earlier = tuple(earlier)
        self.now = tuple(now)
        super().__init__(
            message
            or f"{scope} {key!r} is parked: its steps were {', '.join(self.earlier)} at an earlier attempt "
            f"and are {', '.join(self.now)} now; a handler begins the same steps in the same order each time",
            scope=scope,
            key=key,
            crashes=crashes,
            failures=failures,
        )


class BatchError(IdemTasksError):
    """Some messages of a batch have no outcome.

    `results` are the outcomes in the order of the messages, with its own error in the place of each one without.
    """

    def __init__(
        self,
        message: str | None = None,
        *,
        results: Sequence[Any] = (),
        errors: Sequence[int] = (),
        surplus: Sequence[str] = (),
    ) -> None:
        self.results = list(results)
        self.errors = tuple(errors)
        """The positions of those that have no outcome."""
        self.surplus = tuple(surplus)
        """Keys for which the handler returned an outcome too many: no message of the batch has them, or it had one."""
        kinds = sorted({type(self.results[position]).__name__ for position in self.errors})
        super().__init__(
            message or f"{len(self.errors)} of {len(self.results)} messages have no outcome ({', '.join(kinds)})"
        )

    @property
    def retry_after(self) -> float:
        """Seconds after which nothing of it is in progress elsewhere any more, as far as is known; 0.0: nothing was."""
        return max((getattr(self.results[place], "retry_after", 0.0) for place in self.errors), default=0.0)


class MessageError(IdemTasksError, ValueError):
    """A message that a handler published cannot be written as JSON; nothing was published, and nothing is recorded."""


class OutcomeError(IdemTasksError):
    """An outcome could not be encoded or decoded, or was not kept. The handler is not run again."""


class ReplayedFailureError(IdemTasksError):
    """The recorded failure of an earlier delivery, whose own type cannot be rebuilt safely."""

    def __init__(self, message: str | None = None, *, error_type: str = "", error_message: str = "") -> None:
        self.error_type = error_type
        self.error_message = error_message
        super().__init__(message or f"{error_type}: {error_message}")


class StoreError(IdemTasksError):
    """Redis or the database answered with an error; the client's own error is `__cause__`."""


class StoreConfigurationError(ConfigurationError, StoreError):
    """Redis or the database was reached and is not set up for this: a table is missing, a password is refused.

    A `StoreError` too, because no message may be failed for it: it is to be delivered again once that is mended.
    """


class StoreUnavailableError(StoreError):
    """Redis or the database cannot be reached now; the message is to be delivered again."""


PUT_BACK = (InProgressError, LeaseLostError, StoreError)
"""Errors after which the message must come again: it is neither failed nor acknowledged as done."""


def comes_again(error: BaseException) -> bool:
    """Tell whether a message that ended with this error is put back; a batch is if any of its messages has to be."""
    if isinstance(error, BatchError):
        return any(comes_again(error.results[place]) for place in error.errors)
    return isinstance(error, PUT_BACK)
