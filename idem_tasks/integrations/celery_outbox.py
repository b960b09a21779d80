"""Celery tasks and signatures as messages of the outbox: written as JSON with all their ids, and published again.

Every task of a chain, group or chord has its id from the beginning, so that whatever is sent twice is an exact
duplicate: a task under `@idempotent_task` then answers with its recorded outcome.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import date, datetime
from numbers import Real
from typing import Any

from celery import Celery, Task
from celery._state import get_current_app, get_current_task
from celery.canvas import Signature, chunks
from celery.utils.time import maybe_iso8601
from kombu import Producer
from kombu.serialization import dumps

from idem_tasks import config
from idem_tasks.claims import OutboxMessage
from idem_tasks.errors import ConfigurationError, MessageError
from idem_tasks.idempotency import Idempotency
from idem_tasks.integrations.celery_put_back import CONFIRM_TIMEOUT, confirming_producer
from idem_tasks.integrations.kombu import check_headers, check_options
from idem_tasks.outbox import message_id
from idem_tasks.runtime import run_sync
from idem_tasks.tagged import NoForm, tag, type_name, untag

Plain = dict[str, Any]
"""A signature as the dict that Celery itself sends."""


def freeze(task: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], id_: str) -> Plain:
    """Return the task's or canvas's signature as dicts, with an id for every task in it; `task` itself is not changed.

    Ids that the user gave stay. Raises `ConfigurationError` for what is neither, for a signature with arguments and for
    options that could never be sent; `TypeError` for arguments that the task does not take, as `apply_async` does.
    """
    if isinstance(task, Task):
        signature = task.signature(args, dict(kwargs))
    elif isinstance(task, Signature):
        if args or kwargs:
            raise ConfigurationError("a signature is published as it is; put its arguments into it")
        signature = task.group() if isinstance(task, chunks) else task
    else:
        raise ConfigurationError(f"publish takes a Celery task or signature, not {type_name(type(task))}")
    plain: Plain = _plain(signature)
    _give_ids(plain, id_, _ids_from(id_))
    request = _request()
    if request is not None:
        plain["options"].setdefault("root_id", request.root_id or request.id)
        plain["options"].setdefault("parent_id", request.id)
    _check_serializable(plain, signature)
    _check_sendable(plain, signature.app)
    return plain


def _request() -> Any:
    task = get_current_task()
    return None if task is None or task.request.called_directly else task.request


def _plain(value: Any) -> Any:
    """Copy a signature as far as it consists of signatures and lists; arguments are left as they are."""
    if isinstance(value, Signature):
        return {name: _plain_parts(part) if name != "args" else part for name, part in value.items()}
    return value


def _plain_parts(value: Any) -> Any:
    if isinstance(value, Signature):
        return _plain(value)
    if type(value) is dict:
        return {name: _plain_parts(part) for name, part in value.items()}
    if isinstance(value, list) or type(value).__name__ == "_regen":
        return [_plain_parts(part) for part in value]
    if type(value) is tuple:
        return tuple(_plain_parts(part) for part in value)
    return value


def _ids_from(id_: str) -> Iterator[str]:
    number = 0
    while True:
        yield message_id(id_, number)
        number += 1


def _give_ids(signature: Plain, id_: str, others: Iterator[str]) -> None:
    """Give `id_` to what bears the signature's result, and to all other tasks in it the others, in order."""
    kwargs, options = signature["kwargs"], signature["options"]
    for links in (options.get("link"), options.get("link_error")):
        for link in links if isinstance(links, list) else [links] if links else []:
            _give_ids(link, next(others), others)
    match signature.get("subtask_type"):
        case "chain" if kwargs["tasks"]:
            *first, last = kwargs["tasks"]
            for each in first:
                _give_ids(each, next(others), others)
            _give_ids(last, id_, others)
        case "group":
            options.setdefault("task_id", id_)
            for each in kwargs["tasks"]:
                _give_ids(each, next(others), others)
        case "chord":
            options.setdefault("task_id", next(others))  # from which Celery takes the id of the header's group
            for each in _header(kwargs):
                _give_ids(each, next(others), others)
            if kwargs["body"]:
                _give_ids(kwargs["body"], id_, others)
        case _:
            options.setdefault("task_id", id_)


def _header(kwargs: Plain) -> list[Plain]:
    header = kwargs["header"]
    tasks: list[Plain] = list(header["kwargs"]["tasks"] if isinstance(header, dict) else header)
    return tasks


def result_id(signature: Plain) -> str:
    """Return the id under which the signature's result is found."""
    kwargs = signature["kwargs"]
    match signature.get("subtask_type"):
        case "chain" if kwargs["tasks"]:
            return result_id(kwargs["tasks"][-1])
        case "chord" if kwargs["body"]:
            return result_id(kwargs["body"])
        case _:
            return str(signature["options"].get("task_id", ""))


def _check_serializable(plain: Plain, signature: Signature) -> None:
    """Find out now, and not when it is sent, whether Celery can write it."""
    serializer = plain["options"].get("serializer") or signature.app.conf.task_serializer
    try:
        dumps(plain, serializer=serializer)
    except Exception as error:  # a class may raise anything
        raise MessageError(
            f"{plain['task']} cannot be published: its arguments cannot be written as {serializer} "
            f"({type(error.__cause__ or error).__name__})"
        ) from error


def _check_sendable(plain: Plain, app: Celery) -> None:
    """Raise now what every send would raise: what is wrong would hold up all later messages of its key."""
    options, kwargs = plain["options"], plain["kwargs"]
    check_options(options)
    check_headers(options.get("headers") or {})
    for name, kinds in _TIMES.items():
        if not _is_time(options.get(name), kinds):
            raise ConfigurationError(f"{name}={options[name]!r} is no time that Celery could send")
    match plain.get("subtask_type"):
        case "chain":
            parts = kwargs["tasks"][:1]  # the others are sent by those before them, with their results
        case "group":
            parts = kwargs["tasks"]
        case "chord":
            parts = _header(kwargs)
        case _:
            parts = []
            task = app.tasks.get(plain["task"])
            if task is not None and task.typing and hasattr(task, "__header__"):
                task.__header__(*plain["args"], **kwargs)  # as apply_async does
    for part in parts:
        _check_sendable(part, app)


_TIMES: dict[str, tuple[type, ...]] = {"countdown": (Real,), "expires": (Real, datetime, str), "eta": (date, str)}


def _is_time(value: Any, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, str) and str in kinds:
        try:
            maybe_iso8601(value)
        except ValueError:
            return False
    return value is None or isinstance(value, kinds)


def encode(plain: Plain) -> Any:
    """Return it in the exact JSON form of outcomes, which keeps tuples, datetimes and decimals; or `MessageError`."""
    try:
        return tag(plain)
    except NoForm as error:
        raise MessageError(
            f"{plain['task']} cannot be published: an argument of type {type_name(error.kind)} cannot be kept"
        ) from None


def use_app(found: Any) -> bool:
    """Make `found` the Celery app of this process, with all its tasks and so their queues; False if it is none."""
    if not isinstance(found, Celery):
        return False
    found.set_default()
    found.set_current()
    found.loader.import_default_modules()
    return True


class CelerySender:
    """Publishes what `claim.publish` kept, with publisher confirms; `app` is the current app unless it is given.

    The sender of `publish` unless `senders={"celery": ...}` says otherwise, which a process with several apps needs.
    """

    def __init__(self, app: Celery | None = None) -> None:
        self._app = app

    def __call__(self, message: OutboxMessage) -> None:
        """Return once the broker has all messages of the signature; raise what Celery raises."""
        app = self._app or get_current_app()
        signature = Signature.from_dict(untag(message.body), app=app)
        with confirming_producer(app) as producer:
            signature.apply_async(producer=_Confirmed(producer), add_to_parent=False)


class _Confirmed:
    """A producer whose every publish waits for its confirmation so long; a canvas would keep that in its tasks."""

    def __init__(self, producer: Producer) -> None:
        self._producer = producer

    def publish(self, *args: Any, **options: Any) -> Any:
        options.setdefault("confirm_timeout", CONFIRM_TIMEOUT)
        return self._producer.publish(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)


def relay_task(
    app: Celery, *, idempotency: Idempotency | None = None, name: str = "idem_tasks.relay", limit: int = 1000
) -> Task:
    """Make a task of `app` that relays up to `limit` messages, for Celery beat; it returns how many were sent.

    `idempotency` is the process-wide one unless it is given. It is not retried: the next one does the same.
    """

    def relay() -> int:
        sent, _failed = run_sync((idempotency or config.default_idempotency()).services("blocking").relay.send(limit))
        return sent

    return app.task(relay, name=name, ignore_result=True, acks_late=False)
