"""Dramatiq as a host: a middleware knows the message of a call, and settles it so that it is never lost nor spun.

The decorator goes under `@dramatiq.actor`. Loaded by itself once a function is decorated in a program that has imported
Dramatiq; the middleware is added to the broker by hand.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from idem_tasks import hosts
from idem_tasks.errors import (
    PUT_BACK,
    ConfigurationError,
    DuplicateError,
    FingerprintMismatchError,
    InDoubtError,
    MissingExtraError,
    OutcomeError,
    ParkedError,
    ReplayedFailureError,
)
from idem_tasks.events import EventName
from idem_tasks.integrations.settling import COUNT_HEADER, LONGEST_DELAY, later, times_put_back

try:
    import dramatiq
    from dramatiq.errors import RateLimitExceeded, Retry
    from dramatiq.middleware import Interrupt, Middleware, Shutdown, SkipMessage
except ImportError as error:
    raise MissingExtraError(package="dramatiq", extra="dramatiq") from error

_logger = logging.getLogger("idem_tasks")

_RIGHT_ORDER = """\
@idempotent_task goes under @dramatiq.actor; over it, a worker would run the bare function:

    @dramatiq.actor
    @idempotent_task(key="...")
    def handler(...): ..."""

_FINAL = (
    DuplicateError,
    FingerprintMismatchError,
    InDoubtError,
    OutcomeError,
    ParkedError,
    ReplayedFailureError,
)
"""What would be the same each time: the message goes to Dramatiq's dead letters, without any retry."""

_PAUSE = 1.0
"""Seconds before a message is published once more that the broker did not take; its client has tried a few times."""


class IdempotencyMiddleware(Middleware):
    """Puts back what is in progress or could not be recorded, and makes dead letters of what waits for a person.

    `broker.add_middleware(IdempotencyMiddleware())`. A message that is put back uses up none of its retries. It is
    published again, later each time but within `longest_delay` seconds, before this copy is acknowledged:
    `RabbitmqBroker` needs `confirm_delivery=True` for that to be safe, and a worker without it logs a warning.
    """

    def __init__(self, *, longest_delay: float = LONGEST_DELAY) -> None:
        if not longest_delay > 0:
            raise ConfigurationError(f"longest_delay={longest_delay!r} must be more than 0 seconds")
        self._longest_delay = float(longest_delay)

    def before_worker_boot(self, broker: dramatiq.Broker, worker: dramatiq.Worker) -> None:
        """Warn of a broker that may lose what is put back (F60)."""
        if getattr(broker, "confirm_delivery", True) is False:
            _logger.warning(
                "%s does not wait until RabbitMQ has a message, so one that is put back or retried can be lost: give "
                "it confirm_delivery=True",
                type(broker).__name__,
            )

    def before_process_message(self, broker: dramatiq.Broker, message: dramatiq.MessageProxy) -> None:
        """Remember which message this thread is about to process."""
        _current.set(_Delivery(broker, message, self._longest_delay))

    def after_process_message(
        self,
        broker: dramatiq.Broker,
        message: dramatiq.MessageProxy,
        *,
        result: Any = None,
        exception: BaseException | None = None,
    ) -> None:
        """Forget it."""
        _current.set(None)

    def after_skip_message(self, broker: dramatiq.Broker, message: dramatiq.MessageProxy) -> None:
        """Forget it."""
        _current.set(None)


@dataclass(slots=True)
class _Delivery:
    """What this thread is processing, as it was before the handler could change its arguments (F18)."""

    broker: dramatiq.Broker
    message: dramatiq.MessageProxy
    longest_delay: float
    is_taken: bool = False  # a handler that calls itself is within the one delivery, which its outermost call settles
    unchanged: dramatiq.Message[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.unchanged = copy.deepcopy(self.message.copy())


_current: ContextVar[_Delivery | None] = ContextVar("idem_tasks_dramatiq_delivery", default=None)


def refuse_actor(target: object) -> None:
    """Raise `ConfigurationError` for an actor: the decorators are in the wrong order."""
    if issubclass(type(target), dramatiq.Actor):  # isinstance would make a lazy task of Celery's
        raise ConfigurationError(_RIGHT_ORDER)


def find_host(function: Callable[..., Any]) -> DramatiqHost | None:
    """Return the host of this call if `function` is what the actor of the current message runs, else None."""
    delivery = _current.get()
    if delivery is None or delivery.is_taken or not _runs(delivery, function):
        return None
    delivery.is_taken = True
    return DramatiqHost(delivery)


def _runs(delivery: _Delivery, function: Callable[..., Any]) -> bool:
    return hosts.runs(delivery.broker.get_actor(delivery.message.actor_name).fn, function)


class DramatiqHost:
    """One delivery of a Dramatiq message, seen from the function that its actor runs."""

    def __init__(self, delivery: _Delivery) -> None:
        self._delivery = delivery

    @property
    def scope(self) -> str | None:
        """None: `module.qualname`, which is the same in a direct call and without the middleware."""
        return None

    @property
    def message(self) -> str:
        """The message's id; the same for every delivery and retry of it."""
        return str(self._delivery.message.message_id)

    @property
    def framework_argument(self) -> bool:
        """False: an actor gets what was sent."""
        return False

    def is_failure(self, error: BaseException) -> bool:
        """Tell a handler's failure from Retry, SkipMessage, a rate limit, and what interrupts a thread."""
        return not isinstance(error, Retry | SkipMessage | RateLimitExceeded | Interrupt)

    def proves_no_effect(self, error: BaseException) -> bool:
        """Tell whether the handler asked for another delivery."""
        return isinstance(error, Retry | RateLimitExceeded)

    def settle(self, error: BaseException, announce: Callable[..., None]) -> BaseException:
        """Return what to raise to Dramatiq: SkipMessage once the message is put back or is to be a dead letter.

        The rest is Dramatiq's: a handler's own exception and a time limit are retried, or failed.
        """
        if isinstance(error, (*PUT_BACK, Shutdown)):  # F31, F59
            return self._put_back(error, announce)
        if isinstance(error, _FINAL):
            announce(EventName.DEAD_LETTERED, reason=type(error).__name__, origin=self._delivery.message.queue_name)
            self._delivery.message.fail()
            return SkipMessage(f"{type(error).__name__}: {error}")
        # A wrapper between Dramatiq and this may call once more, and that call is again the one that settles.
        self._delivery.is_taken = False
        return error

    def _put_back(self, error: BaseException, announce: Callable[..., None]) -> BaseException:
        delivery = self._delivery
        again = later(error, times_put_back(delivery.unchanged.options), delivery.longest_delay)
        self._publish(delivery.unchanged.copy(options={COUNT_HEADER: again.count}), again.delay)
        announce(EventName.PUT_BACK, count=again.count, delay=round(again.delay, 3), reason=again.reason)
        delivery.message.options["store_results"] = False  # a skipped message would be answered with None
        return SkipMessage("put back")

    def _publish(self, message: dramatiq.Message[Any], delay: float) -> None:
        """Return when the broker has the message; until then this thread keeps its own copy unacknowledged.

        Whatever is raised, Dramatiq would acknowledge that copy.
        """
        while True:
            try:
                self._delivery.broker.enqueue(message, delay=int(delay * 1000))
            except Exception as failed:  # noqa: BLE001 - whatever the broker's client raises
                _logger.error("%s could not be put back, and is tried again: %r", self.message, failed)  # noqa: TRY400 - its traceback may show the message
                time.sleep(_PAUSE)
            else:
                return


hosts.register(find_host, refuse_actor)
