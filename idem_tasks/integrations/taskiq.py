"""Taskiq as a host: a middleware knows the message of a call, and sends it again where it must not be acknowledged.

The decorator goes under `@broker.task`. Loaded by itself once a function is decorated in a program that has imported
Taskiq; the middleware is added to the broker by hand.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from idem_tasks import hosts
from idem_tasks.decorator import idempotency_of
from idem_tasks.errors import PUT_BACK, ConfigurationError, MissingExtraError
from idem_tasks.events import EventName
from idem_tasks.integrations.settling import COUNT_HEADER, LONGEST_DELAY, later, times_put_back

try:
    from taskiq import AsyncBroker, AsyncTaskiqDecoratedTask, TaskiqMessage, TaskiqMiddleware, TaskiqResult
    from taskiq.exceptions import NoResultError, TaskRejectedError
    from taskiq.labels import prepare_label
except ImportError as error:
    raise MissingExtraError(package="taskiq", extra="taskiq") from error

_logger = logging.getLogger("idem_tasks")

_RIGHT_ORDER = """\
@idempotent_task goes under @broker.task; over it, a worker would run the bare function:

    @broker.task
    @idempotent_task(key="...")
    async def handler(...): ..."""

_PAUSE = 1.0
"""Seconds before a message is sent once more that the broker did not take."""

_SEND_TIMEOUT = 10.0
"""Seconds until a broker is taken not to answer; the message is sent once more then, and runs once all the same."""


class IdempotencyMiddleware(TaskiqMiddleware):
    """Sends a message again that is in progress elsewhere or whose outcome could not be recorded.

    `broker.add_middlewares(IdempotencyMiddleware())`, after the middlewares that retry. It is sent with its task id and
    labels, later each time but within `longest_delay` seconds, before this copy is acknowledged; nobody who waits for
    the task's result is answered. With `delay_label="delay"` the broker keeps it for so long: taskiq-aio-pika with a
    delay queue or the plugin for delayed messages. Without, the worker holds its copy meanwhile, as one of the tasks
    that it may run.
    """

    def __init__(self, *, longest_delay: float = LONGEST_DELAY, delay_label: str | None = None) -> None:
        super().__init__()
        if not longest_delay > 0:
            raise ConfigurationError(f"longest_delay={longest_delay!r} must be more than 0 seconds")
        self._longest_delay = float(longest_delay)
        self._delay_label = delay_label
        self._warned: set[str] = set()

    def startup(self) -> None:
        """Raise `ConfigurationError` if a middleware that retries was added after this one.

        Taskiq asks the last one first. One that retries would send what this one sends too: each copy makes two.
        """
        for middleware in self.broker.middlewares[self.broker.middlewares.index(self) :]:
            if any("Retry" in kind.__name__ for kind in type(middleware).__mro__):
                raise ConfigurationError(
                    f"add IdempotencyMiddleware after {type(middleware).__name__}, which would retry what is in "
                    "progress, and this sends it again too"
                )

    async def pre_execute(self, message: TaskiqMessage) -> TaskiqMessage:
        """Remember which message is about to run, as it was before its handler could change it (F18)."""
        if message.labels.get("ack_type") == "when_received" and message.task_name not in self._warned:
            self._warned.add(message.task_name)
            _logger.warning(
                "%s is acknowledged before it runs, so a worker that dies loses its message: "
                "give it ack_type='when_saved' or 'when_executed'",
                message.task_name,
            )
        if self._delay_label is not None and COUNT_HEADER in message.labels:
            message.labels.pop(self._delay_label, None)  # of that put-back, and not of what a retry sends
        _current.set(_Delivery(self.broker, message.model_copy(deep=True), outside=_current.get()))
        return message

    def post_execute(self, message: TaskiqMessage, result: TaskiqResult[Any]) -> None:
        """Remember the message again whose handler sent this one, where a broker in memory ran it at once."""
        delivery = _current.get()
        if delivery is not None:
            _current.set(delivery.outside)

    async def on_error(self, message: TaskiqMessage, result: TaskiqResult[Any], exception: BaseException) -> None:
        """Send a message again that its host gave back; Taskiq acknowledges it after this, whatever was raised."""
        delivery = _current.get()
        if delivery is None:
            return
        error, announce = delivery.given_back or (exception, partial(_announce, delivery, exception))
        if not isinstance(error, PUT_BACK):
            return
        # Also where a pool ran the task, and found no host there: nobody is answered, and nobody else sends it again.
        result.error = NoResultError()
        message.labels["retry_on_error"] = False
        again = later(error, times_put_back(delivery.message.labels), self._longest_delay)
        labels: dict[str, Any] = {COUNT_HEADER: again.count}
        if self._delay_label is None:
            await asyncio.sleep(again.delay)
        else:
            labels[self._delay_label] = again.delay
        labels = {name: _as_sent(value) for name, value in (delivery.message.labels | labels).items()}
        await self._send(delivery.message.model_copy(update={"labels": labels}))
        announce(EventName.PUT_BACK, count=again.count, delay=round(again.delay, 3), reason=again.reason)

    async def _send(self, message: TaskiqMessage) -> None:
        """Return when the broker has the message; until then this worker keeps its own copy unacknowledged."""
        while True:
            try:
                async with asyncio.timeout(_SEND_TIMEOUT):
                    await self.broker.kick(self.broker.formatter.dumps(message))
            except Exception as failed:  # noqa: BLE001 - whatever the broker's client raises
                _logger.error("%s could not be put back, and is tried again: %r", message.task_id, failed)  # noqa: TRY400 - its traceback may show the message
                await asyncio.sleep(_PAUSE)
            else:
                return


def _as_sent(label: Any) -> Any:
    """Return a label as Taskiq sends it: bytes are no JSON; the message has their type still."""
    return prepare_label(label)[0] if isinstance(label, bytes) else label


@dataclass(slots=True)
class _Delivery:
    """The message that is running here, as it came, and why it has to come again."""

    broker: AsyncBroker
    message: TaskiqMessage
    outside: _Delivery | None
    is_taken: bool = False  # a handler that calls itself is within the one delivery, which its outermost call settles
    given_back: tuple[BaseException, Callable[..., None]] | None = None
    process: int = field(default_factory=os.getpid)


_current: ContextVar[_Delivery | None] = ContextVar("idem_tasks_taskiq_delivery", default=None)


def _announce(delivery: _Delivery, error: BaseException, name: EventName, **details: Any) -> None:
    with contextlib.suppress(ConfigurationError):  # the task called what is idempotent, and is not so itself
        task = idempotency_of(delivery.broker.find_task(delivery.message.task_name))
        task.announce(name, getattr(error, "scope", ""), getattr(error, "key", ""), **details)


def refuse_task(target: object) -> None:
    """Raise `ConfigurationError` for a Taskiq task: the decorators are in the wrong order."""
    if issubclass(type(target), AsyncTaskiqDecoratedTask):  # isinstance would make a lazy task of Celery's
        raise ConfigurationError(_RIGHT_ORDER)


def find_host(function: Callable[..., Any]) -> TaskiqHost | None:
    """Return the host of this call if `function` is what the task of the current message runs, else None."""
    delivery = _current.get()
    if delivery is None or delivery.is_taken or not _runs(delivery, function):
        return None
    if delivery.process != os.getpid():  # a pool's, which hands errors over: the middleware sees to ours there
        return None
    delivery.is_taken = True
    return TaskiqHost(delivery)


def _runs(delivery: _Delivery, function: Callable[..., Any]) -> bool:
    return hosts.runs(getattr(delivery.broker.find_task(delivery.message.task_name), "original_func", None), function)


class TaskiqHost:
    """One delivery of a Taskiq message, seen from the function that its task runs."""

    def __init__(self, delivery: _Delivery) -> None:
        self._delivery = delivery

    @property
    def scope(self) -> str | None:
        """None: `module.qualname`, which is the same in a direct call and without the middleware."""
        return None

    @property
    def message(self) -> str:
        """The task's id; the same for every delivery and retry of it."""
        return self._delivery.message.task_id

    @property
    def framework_argument(self) -> bool:
        """False: a task gets what was sent, and dependencies by name."""
        return False

    def is_failure(self, error: BaseException) -> bool:
        """Tell a handler's failure from what it says to Taskiq."""
        return not isinstance(error, NoResultError | TaskRejectedError)

    def proves_no_effect(self, error: BaseException) -> bool:
        """Tell whether the handler asked for another delivery, by `Context.requeue`."""
        return isinstance(error, NoResultError)

    def settle(self, error: BaseException, announce: Callable[..., None]) -> BaseException:
        """Return what to raise to Taskiq: NoResultError for a message that the middleware is to send again.

        The rest is Taskiq's: a handler's own exception is retried by a middleware of its, or the task fails.
        """
        if isinstance(error, PUT_BACK):  # F31, F59
            self._delivery.given_back = error, announce
            return NoResultError()
        # A wrapper between Taskiq and this may call once more, and that call is again the one that settles.
        self._delivery.is_taken = False
        return error


hosts.register(find_host, refuse_task)
