"""Celery as a host: finds the task around a call, and settles its message so that it is never lost nor spun.

Loaded by itself once a function is decorated in a program that has imported Celery.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import inspect
import logging
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from celery import Celery, Task, bootsteps, signals
from celery._state import get_current_task
from celery.app.task import Context
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded
from celery.local import Proxy

from idem_tasks import hosts
from idem_tasks.decorator import IdempotentFunction, idempotency_of
from idem_tasks.errors import ConfigurationError, comes_again
from idem_tasks.events import EventName
from idem_tasks.integrations.celery_put_back import delay_of, put_back, times_put_back
from idem_tasks.runtime import register_interruption

_logger = logging.getLogger("idem_tasks")

_PAUSE_BEFORE_REJECT = 1.0
"""Seconds. A rejected message comes back at once, 6,000 times a second."""

_RIGHT_ORDER = """\
@idempotent_task goes under @app.task; over it, the worker would run the bare function:

    @app.task(acks_late=True, reject_on_worker_lost=True)
    @idempotent_task(key="...")
    def handler(...): ..."""


def refuse_task(target: object) -> None:
    """Raise `ConfigurationError` for a Celery task: the decorators are in the wrong order.

    By its type: `isinstance` would evaluate a lazy task, and with it the app's configuration, too early.
    """
    if issubclass(type(target), Task | Proxy):
        raise ConfigurationError(_RIGHT_ORDER)


def find_host(function: Callable[..., Any]) -> CeleryHost | None:
    """Return the host of this call if `function` is what the current Celery task runs, else None.

    Raises `ConfigurationError` for a coroutine function that nobody is going to await.
    """
    task = get_current_task()
    if task is None or not _runs(task, function):
        return None
    request = task.request
    if inspect.iscoroutinefunction(function) and not request.called_directly and not _loop_is_running():
        raise ConfigurationError(_never_awaited([task.name]))
    host = CeleryHost(task, request)
    host.refuse_to_begin_at_the_end()
    return host


def _runs(task: Task, function: Callable[..., Any]) -> bool:
    """Look for the function under `bind`, autoretry, pydantic and whatever else wraps a task's `run`."""
    return any(hosts.runs(run, function) for run in (task.run, getattr(task, "_orig_run", None)))


def _loop_is_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class CeleryHost:
    """One delivery of a Celery message, seen from the function that its task runs.

    A task that is called directly or eagerly has no message: its errors stay what they are.
    """

    def __init__(self, task: Task, request: Context) -> None:
        self._task = task
        self._request = request
        # A handler that calls itself is still within the one delivery, which its outermost call settles.
        nested = request.__dict__.setdefault("_idem_tasks_host", self) is not self
        self._has_message = not (request.called_directly or request.is_eager or nested)
        self._arguments = _copied(request.args, request.kwargs) if self._has_message else None

    @property
    def scope(self) -> str | None:
        """The task's name."""
        return str(self._task.name)

    @property
    def message(self) -> str:
        """The task's id; the same for every delivery and retry of it."""
        return str(self._request.id or "")

    @property
    def framework_argument(self) -> bool:
        """True with `bind=True` and for class-based tasks, whose first argument is the task."""
        return getattr(getattr(self._task, "_orig_run", self._task.run), "__self__", None) is not None

    def refuse_to_begin_at_the_end(self) -> None:
        """Send back what came to a worker in its cold shutdown: the handler would be cut off in mid-run."""
        if self._has_message and self._task.acks_late and _is_shutting_down():
            time.sleep(_PAUSE_BEFORE_REJECT)
            raise _rejected("the worker is shutting down")

    def is_failure(self, error: BaseException) -> bool:
        """Tell a handler's failure from Retry, Ignore, Reject and a shutdown."""
        return not isinstance(error, Retry | Ignore | Reject) and not _is_interruption(error)

    def proves_no_effect(self, error: BaseException) -> bool:
        """Tell whether the handler asked for another delivery by Retry or Reject."""
        return isinstance(error, Retry | Reject)

    def settle(self, error: BaseException, announce: Callable[..., None]) -> BaseException:
        """Return what to raise to Celery: Ignore once the message is put back, Reject if it is to come again.

        The rest is Celery's: a handler's own exception is retried or failed, `Retry` was published already.
        """
        if not self._has_message:
            return error
        if not isinstance(error, Retry | Ignore | Reject):
            if comes_again(error):  # F31, F59
                return self._put_back(error, announce)
            if _is_interruption(error) and self._task.acks_late:
                return _rejected("interrupted")
        # A wrapper between Celery and this may call once more, and that call is again the one that settles.
        self._request.__dict__.pop("_idem_tasks_host", None)
        return error

    def _put_back(self, error: BaseException, announce: Callable[..., None]) -> BaseException:
        assert self._arguments is not None
        args, kwargs = self._arguments
        count = times_put_back(self._request) + 1
        delay = delay_of(self._task.app, getattr(error, "retry_after", 0.0), count - 1)
        try:
            put_back(self._task, self._request, args, kwargs, delay=delay, count=count)
        except BaseException as failed:  # noqa: BLE001 - a soft limit or a shutdown can strike here too
            return self._not_published(error, failed)
        announce(EventName.PUT_BACK, count=count, delay=round(delay, 3), reason=type(error).__name__)
        acknowledged: BaseException = Ignore()
        return acknowledged

    def _not_published(self, error: BaseException, failed: BaseException) -> BaseException:
        """Have the broker deliver this copy again; one that was acknowledged before it ran fails, and is seen."""
        _logger.error("%s[%s] could not be put back: %r", self._task.name, self.message, failed)
        if isinstance(failed, SystemExit):
            return failed  # ends this process, and an unacknowledged message is delivered again
        if not self._task.acks_late:
            return error
        if _is_interruption(failed):
            return _rejected("interrupted")
        with contextlib.suppress(SoftTimeLimitExceeded):  # it was not published: struck or not, it must be rejected
            time.sleep(_PAUSE_BEFORE_REJECT)
        return _rejected("in progress")


def _rejected(reason: str) -> BaseException:
    """Have the broker deliver the message again.

    The reason is a string: an exception that does not survive pickle would kill the worker's main process.
    """
    rejected: BaseException = Reject(reason, requeue=True)
    return rejected


def _copied(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Copy a message's arguments before the handler can change them: they may be published again (F18)."""
    try:
        return copy.deepcopy((args, kwargs))
    except Exception:  # noqa: BLE001 - pickled arguments can be anything
        return args, kwargs


def _is_interruption(error: BaseException) -> bool:
    """Tell whether the worker's shutdown struck the handler, in a pool that runs it in the worker's process.

    There the pool takes the end of a killed greenlet for success, and acknowledges (F41); in solo, Celery's
    signal handler itself raises in the middle of whatever runs.
    """
    greenlet = sys.modules.get("greenlet")
    if greenlet is not None and isinstance(error, greenlet.GreenletExit):
        return True
    return _is_shutting_down() or _comes_from_signal_handler(error)


def _comes_from_signal_handler(error: BaseException) -> bool:
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__") == "celery.apps.worker" for frame, _ in frames)


def _is_shutting_down() -> bool:
    """Tell whether a cold shutdown of this process has begun; that of its parent does not concern a child."""
    worker_state = sys.modules.get("celery.worker.state")
    return worker_state is not None and worker_state.should_terminate is not None


# At worker start


class CheckTasks(bootsteps.Step):  # type: ignore[misc] # Celery is untyped
    """Refuses to start a worker that could not run a task, and warns of tasks whose messages it may lose."""

    def __init__(self, worker: Any, **_: Any) -> None:
        pool = worker.pool_cls.__module__
        found = _idempotent_tasks(worker.app)
        coroutines = [name for name, (_task, function) in found.items() if function.asynchronous]
        if coroutines and pool.startswith("celery.concurrency."):
            raise ConfigurationError(_never_awaited(coroutines))
        for name, (task, _function) in found.items():
            if warning := _warning(task, prefork=pool == "celery.concurrency.prefork"):
                _logger.warning("%s %s", name, warning)


def _idempotent_tasks(app: Celery) -> dict[str, tuple[Task, IdempotentFunction]]:
    found: dict[str, tuple[Task, IdempotentFunction]] = {}
    for name, task in sorted(app.tasks.items()):
        try:
            found[name] = (task, idempotency_of(task))
        except ConfigurationError:
            continue
    return found


def _warning(task: Task, *, prefork: bool) -> str | None:
    """Say by which setting of a task its message can be lost (F44)."""
    if not task.acks_late:
        return (
            "is acknowledged before it runs, so a worker that dies loses its message: "
            "add acks_late=True and reject_on_worker_lost=True to @app.task"
        )
    if prefork and not task.reject_on_worker_lost:
        return (
            "counts as done when its process is killed, so that its message is lost: "
            "add reject_on_worker_lost=True to @app.task"
        )
    return None


def _never_awaited(names: list[str]) -> str:
    return (
        f"{', '.join(names)}: an async def task, and Celery's pools never await one: it would be reported as a "
        "success though nothing ran; make it a plain def, for example one that calls asyncio.run(...)"
    )


def _check_when_worker_starts(instance: Any, **_: Any) -> None:
    instance.app.steps["worker"].add(CheckTasks)


signals.celeryd_init.connect(_check_when_worker_starts, weak=False)
register_interruption(SoftTimeLimitExceeded)
hosts.register(find_host, refuse_task)
