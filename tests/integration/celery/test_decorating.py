"""What can be known before a message is sent: the order of decorators, the signature, eager and direct calls."""

# mypy: disable-error-code="untyped-decorator"

import asyncio
import inspect
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from celery import Celery, shared_task
from celery.exceptions import Ignore, Reject, Retry
from pydantic import BaseModel

from idem_tasks import ConfigurationError, Idempotency, InProgressError, MemoryStore, idempotency_of, idempotent_task


@pytest.fixture
def app() -> Celery:
    return Celery("unconnected", broker="memory://", backend="cache+memory://", set_as_current=False)


@pytest.fixture
def idempotency() -> Idempotency:
    return Idempotency(store=MemoryStore())


def handler(order: str) -> str:
    return order


@pytest.mark.parametrize("options", [{}, {"bind": True}, {"lazy": False}])
def test_the_wrong_order_is_refused_with_the_right_one(app: Celery, options: dict[str, Any]) -> None:
    """Over @app.task the worker would run the bare function; the message shows what to write."""
    with pytest.raises(ConfigurationError, match=r"(?s)under @app\.task.*@app\.task\(.*@idempotent_task\("):
        idempotent_task(key="{order}")(app.task(shared=False, **options)(handler))


def test_a_shared_task_in_the_wrong_order_is_refused() -> None:
    """Also where the task is a proxy that belongs to no app yet."""
    with pytest.raises(ConfigurationError, match=r"under @app\.task"):
        idempotent_task(key="{order}")(shared_task(name="decorating.wrong_order")(handler))


def test_refusing_does_not_configure_the_app(app: Celery) -> None:
    """A lazy task is told by its type; evaluating it would freeze the app's configuration."""
    with pytest.raises(ConfigurationError):
        idempotent_task(key="{order}")(app.task(handler, shared=False))
    assert not app.configured
    assert not app.finalized


def test_wrong_arguments_are_refused_when_sending(app: Celery) -> None:
    """The decorated function keeps its signature, by which Celery checks a call before it publishes."""

    @app.task(shared=False, bind=True)
    @idempotent_task(key="{order}")
    def charge(self: Any, order: str, amount: int = 1) -> None: ...

    for wrong in ({"args": ()}, {"args": ("A", 1, 2)}, {"args": ("A",), "kwargs": {"colour": "red"}}):
        with pytest.raises(TypeError):
            charge.apply_async(**wrong)


@shared_task(name="decorating.shared")
@idempotent_task(key="{order}", idempotency=Idempotency(store=MemoryStore()))
def shared(order: str) -> str:
    return order


def test_a_shared_task_is_found_by_its_proxy_and_in_each_app(app: Celery) -> None:
    """Its record is the same whoever runs it."""
    app.finalize()
    task = app.tasks["decorating.shared"]
    assert task.apply(args=("A-1",)).get() == shared("A-1") == "A-1"
    record = idempotency_of(shared).lookup("A-1")
    assert record is not None
    assert (record.scope, record.attempts) == ("decorating.shared", 1)
    assert idempotency_of(task).lookup("A-1") == record


class Order(BaseModel):
    id: str


def tasks(app: Celery, idempotency: Idempotency) -> dict[str, Any]:
    """One task of each kind, whose key is its order's."""

    @app.task(shared=False, name="plain")
    @idempotent_task(key="{order}", idempotency=idempotency)
    def plain(order: str) -> str:
        return order

    @app.task(shared=False, name="bound", bind=True)
    @idempotent_task(key="{order}", idempotency=idempotency)
    def bound(self: Any, order: str) -> str:
        return f"{self.name} {order}"

    @app.task(shared=False, name="retried", bind=True, autoretry_for=(OSError,), retry_kwargs={"max_retries": 2})
    @idempotent_task(key="{order}", idempotency=idempotency)
    def retried(self: Any, order: str) -> str:
        return order

    @app.task(shared=False, name="modelled", pydantic=True)
    @idempotent_task(key="{order.id}", idempotency=idempotency)
    def modelled(order: Order) -> str:
        return order.id

    class Based(app.Task):  # type: ignore[misc]
        name = "based"

        @idempotent_task(key="{order}", idempotency=idempotency)
        def run(self, order: str) -> str:
            return order

    return {
        "plain": plain,
        "bound": bound,
        "retried": retried,
        "modelled": modelled,
        "based": app.register_task(Based()),
    }


KINDS = ["plain", "bound", "retried", "modelled", "based"]


@pytest.mark.parametrize("kind", KINDS)
def test_eager_and_direct_calls_are_idempotent_under_the_same_key(
    app: Celery, idempotency: Idempotency, kind: str
) -> None:
    """`task()`, `task.apply()` and a worker's call share one scope, the task's name, and so one record."""
    task = tasks(app, idempotency)[kind]
    order: Any = {"id": "A-1"} if kind == "modelled" else "A-1"
    first = task(order)
    assert task.apply(args=(order,)).get() == first
    [record] = idempotency.records()
    assert (record.scope, record.key, record.attempts) == (kind, "A-1", 1)


@pytest.mark.parametrize("kind", KINDS)
def test_idempotency_of_finds_the_function_of_every_kind_of_task(
    app: Celery, idempotency: Idempotency, kind: str
) -> None:
    """Celery does not copy a function's attributes to its task: `idempotency_of(task)` finds them."""
    task = tasks(app, idempotency)[kind]
    order: Any = {"id": "A-1"} if kind == "modelled" else "A-1"
    model: Any = Order(id="A-1") if kind == "modelled" else "A-1"
    task(order)
    found = idempotency_of(task)
    assert (found.scope_for(model), found.key_for(model)) == (kind, "A-1")
    record = found.lookup(model)
    assert record is not None
    assert record.attempts == 1
    assert found.forget(model)
    assert found.lookup(model) is None


@pytest.mark.parametrize("eager", [False, True])
def test_in_progress_is_raised_where_there_is_no_message(app: Celery, idempotency: Idempotency, eager: bool) -> None:
    """An eager or direct call has nothing to put back: it raises InProgressError."""
    inside, outside = threading.Event(), threading.Event()

    @app.task(shared=False, name="held")
    @idempotent_task(key="{order}", idempotency=idempotency)
    def held(order: str) -> None:
        inside.set()
        outside.wait(10)

    thread = threading.Thread(target=held, args=("A-1",))
    thread.start()
    inside.wait(10)
    call = partial(held.apply, args=("A-1",), throw=True) if eager else partial(held, "A-1")
    with pytest.raises(InProgressError):
        call()
    outside.set()
    thread.join()


@pytest.mark.parametrize(
    "raised, failures, state",
    [
        (Retry("later"), 0, "released"),
        (Reject("no"), 0, "released"),
        (Ignore(), 0, "in_doubt"),
        (ValueError("no"), 1, "in_doubt"),
    ],
)
def test_only_retry_and_reject_prove_that_nothing_happened(
    app: Celery, idempotency: Idempotency, raised: Exception, failures: int, state: str
) -> None:
    """F55: under `hold` whatever else a handler raises leaves its effect in doubt; only real failures count."""

    @app.task(shared=False, name="doubtful")
    @idempotent_task(key="{order}", idempotency=idempotency, on_crash="hold")
    def doubtful(order: str) -> None:
        raise raised

    with pytest.raises(type(raised)):
        doubtful("A-1")
    [record] = idempotency.records()
    assert (record.state.value, record.failures) == (state, failures)


def coroutine_task(app: Celery, idempotency: Idempotency) -> Any:
    @app.task(shared=False, name="coroutine")
    @idempotent_task(key="{order}", idempotency=idempotency)
    async def coroutine(order: str) -> str:
        return order

    return coroutine


def test_a_coroutine_task_is_refused_at_its_call(app: Celery, idempotency: Idempotency) -> None:
    """F65: Celery would report a success though nothing ran; without a running loop nobody can await it."""
    result = coroutine_task(app, idempotency).apply(args=("A-1",))
    assert result.failed()
    with pytest.raises(ConfigurationError, match="never await"):
        result.get()


def test_a_coroutine_task_runs_where_somebody_awaits_it(app: Celery, idempotency: Idempotency) -> None:
    """Called directly, or by a pool that runs an event loop, it is a coroutine as any other."""
    task = coroutine_task(app, idempotency)

    async def pool() -> Any:
        return await task.apply(args=("A-1",)).result

    assert asyncio.run(task("A-1")) == "A-1"
    assert asyncio.run(pool()) == "A-1"
    [record] = idempotency.records()
    assert (record.scope, record.attempts) == ("coroutine", 1)


def test_a_decorated_coroutine_function_is_one(idempotency: Idempotency) -> None:
    """Frameworks ask `iscoroutinefunction` to know whether to await."""

    class Shop:
        @idempotent_task(key="{order}", idempotency=idempotency)
        async def charge(self, order: str) -> str:
            return order

    found: list[Callable[..., Any]] = [Shop.charge, Shop().charge]
    assert all(inspect.iscoroutinefunction(function) for function in found)
    assert asyncio.run(Shop().charge("A-1")) == "A-1"
