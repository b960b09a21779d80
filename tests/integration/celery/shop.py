"""The app that the tests' workers run: `celery -A shop worker`, told by SHOP_* in the environment what to use."""

# mypy: disable-error-code="untyped-decorator"
import asyncio
import functools
import json
import os
import signal
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

from celery import Celery, current_task, shared_task, signature
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded
from ledger import Ledger  # type: ignore[import-not-found] # beside this file, for the worker
from limited_queue import limited_queue  # type: ignore[import-not-found]
from pydantic import BaseModel

from idem_tasks import (
    RERUN,
    DeadClaim,
    Event,
    EventName,
    OutboxMessage,
    Outcome,
    StoreUnavailableError,
    configure,
    current_claim,
    current_claims,
    idempotent_batch,
    idempotent_task,
    log_event,
    outbox,
)
from idem_tasks.integrations.celery_outbox import CelerySender, relay_task

ledger = Ledger(os.environ["SHOP_LEDGER"])
LATE: Any = {"acks_late": True, "reject_on_worker_lost": True}


def note_event(event: Event) -> None:
    ledger.note(event.name.value, event.key, scope=event.scope, **event.details)
    if event.name is EventName.PUT_BACK:
        ledger.note(f"put_back_{event.details['reason']}", event.key)
    if current_task and event.name in {EventName.IN_PROGRESS, EventName.REPLAYED}:
        ledger.note("seen", event.key, **facts(current_task.request))


class DyingSender(CelerySender):
    """Kills its process before it sends, or after, where the test says so, the first time."""

    def __call__(self, message: OutboxMessage) -> None:
        if ledger.count("dies before send", message.key) and not ledger.count("died", message.key):
            ledger.note("died", message.key)
            os.kill(os.getpid(), signal.SIGKILL)
        super().__call__(message)
        if ledger.count("dies after send", message.key) and not ledger.count("died", message.key):
            ledger.note("died", message.key)
            os.kill(os.getpid(), signal.SIGKILL)


outbox._LEASE = 2.0  # seconds; so that a test need not wait for a minute after a sender that died
configure(**json.loads(os.environ["SHOP_STORE"]), observers=[log_event, note_event], senders={"celery": DyingSender()})
app = Celery("shop")
app.conf.update(json.loads(os.environ["SHOP_CONFIG"]))
if limit := os.environ.get("SHOP_DELIVERY_LIMIT"):
    app.conf.task_queues = [limited_queue(app.conf.task_default_queue, int(limit))]


def held_until_told(order: str, seconds: float = 30.0) -> None:
    """Run until the test notes `go` for this order, or `go-2` for its second attempt."""
    own = f"go-{current_claim().attempt}"
    deadline = time.monotonic() + seconds
    while not (ledger.count("go", order) or ledger.count(own, order)) and time.monotonic() < deadline:
        time.sleep(0.02)


def facts(request: Any) -> dict[str, Any]:
    """What must be the same of every copy of a message."""
    names = ("id", "root_id", "parent_id", "group", "group_index", "retries", "shadow", "expires", "timelimit",
             "reply_to", "correlation_id", "ignore_result", "callbacks", "errbacks", "chain", "chord", "args",
             "kwargs", "argsrepr", "origin", "stamped_headers", "stamps")  # fmt: skip
    headers = {name: value for name, value in (request.headers or {}).items() if name != "idem_tasks_put_back"}
    found = {name: getattr(request, name, None) for name in names} | {"headers": headers}
    return json.loads(json.dumps(found, default=repr))  # type: ignore[no-any-return]


@app.task(name="shop.charge", bind=True, **LATE)
@idempotent_task(key="{order}", fingerprint=["order"])
def charge(self: Any, order: str, amount: int = 1, *, hold: bool = False) -> str:
    """Charge once; `hold`: not before the test says `go`."""
    ledger.note("started", order, amount=amount, attempt=current_claim().attempt, **facts(self.request))
    if hold:
        held_until_told(order)
    ledger.note("effect", order, amount=amount)
    return f"charged {order} {amount}"


@app.task(name="shop.order", **LATE)
@idempotent_task(key="{order}", fingerprint=None)
def order(order: str, *, canvas: Any = None, dies: bool = False, number: int = 1) -> list[str]:
    """Publish charges of this order, or a canvas; `dies`: before its outcome is recorded, the first time."""
    claim = current_claim()
    ledger.note("ordering", order, attempt=claim.attempt)
    if canvas is not None:
        published = [claim.publish(signature(canvas))]
    else:
        published = [claim.publish(charge, f"{order}-{n}", n) for n in range(number)]
    if dies and claim.attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return published


relay_task(app)


@app.task(name="shop.ship", bind=True, **LATE)
@idempotent_batch(key="{message}", scope="shop.charge", fingerprint=None)
def ship(self: Any, orders: list[str]) -> list[str | Exception]:
    """Ship them one after another; in the midst of those named so, die at the first attempt."""
    shipped: list[str | Exception] = []
    for order, claim in zip(orders, current_claims(), strict=True):
        if "dies" in order and claim.attempt == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ledger.note("effect", order, task=self.request.id)
        shipped.append(ValueError("no") if "fails" in order else f"shipped {order}")
    return shipped


@app.task(name="shop.ship_in_doubt", **LATE)
@idempotent_batch(key=str, fingerprint=None, on_crash="hold")
def ship_in_doubt(orders: list[str]) -> list[str]:
    """Ship the first one, and die before anybody is told; nobody may ship again."""
    ledger.note("effect", orders[0])
    os.kill(os.getpid(), signal.SIGKILL)
    return orders


@shared_task(name="shop.shared", **LATE)
@idempotent_task(key="{order}")
def shared(order: str) -> str:
    ledger.note("effect", order)
    return f"shared {order}"


class Order(BaseModel):
    id: str
    amount: Decimal


@app.task(name="shop.pydantic", bind=True, pydantic=True, **LATE)
@idempotent_task(key="{order.id}")
def pydantic_charge(self: Any, order: Order) -> Order:
    ledger.note("effect", order.id, type=type(order).__name__, request=self.request.id)
    return order


class Refund(app.Task):  # type: ignore[misc, name-defined] # Celery is untyped
    name = "shop.refund"
    acks_late = True
    reject_on_worker_lost = True

    @idempotent_task(key="{order}")
    def run(self, order: str) -> str:
        ledger.note("effect", order)
        return f"refunded {order}"


app.register_task(Refund())


@app.task(name="shop.retry_now", bind=True, max_retries=3, **LATE)
@idempotent_task(key="{order}")
def retry_now(self: Any, order: str) -> int:
    """Retry at once, and keep the claim until the retry has met it: `self.retry` publishes before it raises."""
    if self.request.retries == 0:
        try:
            raise self.retry(countdown=0)
        except Retry:
            ledger.wait("put_back", order, seconds=10)
            raise
    ledger.note("effect", order)
    return int(self.request.retries)


@app.task(name="shop.autoretry", autoretry_for=(OSError,), default_retry_delay=0, max_retries=3, bind=True, **LATE)
@idempotent_task(key="{order}")
def autoretry(self: Any, order: str) -> int:
    ledger.note("started", order)
    if self.request.retries < 2:
        raise OSError("not yet")
    ledger.note("effect", order)
    return int(self.request.retries)


@app.task(name="shop.raises", **LATE)
@idempotent_task(key="{order}")
def raises(order: str, what: str) -> str:
    """The first time, raise; the second time, don't."""
    ledger.note("started", order)
    if ledger.count("started", order) == 1:
        raise {"ignore": Ignore(), "reject": Reject("no", requeue=False), "again": Reject("again", requeue=True),
               "error": ValueError("no")}[what]  # fmt: skip
    ledger.note("effect", order)
    return "done"


@dataclass
class Receipt:
    order: str
    at: datetime
    day: date
    amount: Decimal


@app.task(name="shop.exact", **LATE)
@idempotent_task(key="{order}")
def exact(order: str) -> dict[str, Any]:
    """Return what JSON alone would change, without saying so in the annotation."""
    ledger.note("effect", order)
    return {
        "at": datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC),
        "amount": Decimal("1.10"),
        "order": order,
        "nothing": None,
    }


@app.task(name="shop.annotated", **LATE)
@idempotent_task(key="{order}")
def annotated(order: str) -> tuple[datetime, Decimal]:
    ledger.note("effect", order)
    return datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC), Decimal("1.10")


@app.task(name="shop.collect", **LATE)
def collect(results: Any, key: str) -> Any:
    """A chord's body, not idempotent: so that it shows how often the chord fired."""
    ledger.note("collected", key, results=results)
    return results


@app.task(name="shop.add", **LATE)
@idempotent_task(key="{key}", fingerprint=None)
def add(before: Any, key: str) -> Any:
    ledger.note("effect", key, before=before)
    return f"{before}+{key}"


@app.task(name="shop.limited", soft_time_limit=1, **LATE)
@idempotent_task(key="{order}")
def limited(order: str) -> str:
    ledger.note("started", order)
    if ledger.count("started", order) == 1:
        try:
            held_until_told(order)
        except SoftTimeLimitExceeded:
            ledger.note("soft_limit", order)
            raise
    ledger.note("effect", order)
    return "done"


@app.task(name="shop.patient", soft_time_limit=1, **LATE)
@idempotent_task(key="{order}", scope="shop.charge", fingerprint=None, on_in_progress="wait", wait_timeout=20)
def patient(order: str) -> str:
    """Shares its key with `charge`, and waits for it."""
    ledger.note("effect", order)
    return "never while the other one runs"


def twice(function: Any) -> Any:
    """Call again after a ConnectionError, as a wrapper that retries does."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except ConnectionError:
            return function(*args, **kwargs)

    return wrapper


@app.task(name="shop.insistent", **LATE)
@twice
@idempotent_task(key="{order}")
def insistent(order: str) -> str:
    ledger.note("started", order)
    match ledger.count("started", order):
        case 1:
            raise ConnectionError
        case 2:
            raise StoreUnavailableError("somebody else's store")
    return "done"


@app.task(name="shop.hard_limited", time_limit=1, **LATE)
@idempotent_task(key="{order}")
def hard_limited(order: str) -> str:
    ledger.note("started", order)
    if ledger.count("started", order) == 1:
        held_until_told(order)
    ledger.note("effect", order)
    return "done"


@app.task(name="shop.dies", **LATE)
@idempotent_task(key="{order}")
def dies(order: str) -> int:
    """Die at the worst moment, the first time."""
    ledger.note("effect", order)
    if current_claim().attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return current_claim().attempt


@app.task(name="shop.dies_in_doubt", **LATE)
@idempotent_task(key="{order}", on_crash="hold")
def dies_in_doubt(order: str) -> None:
    """Charge and die before anybody is told; nobody may charge again."""
    ledger.note("effect", order)
    os.kill(os.getpid(), signal.SIGKILL)


def at_provider(path: str, body: bytes | None = None) -> str | None:
    """Ask the provider over HTTP; None for what it does not know."""
    try:
        with urllib.request.urlopen(f"{os.environ['SHOP_PROVIDER']}{path}", body, timeout=1) as reply:
            return str(reply.read().decode())
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def ask_the_provider(claim: DeadClaim) -> Any:
    ledger.note("asked", claim.key)
    if "dies asking" in claim.key:
        os.kill(os.getpid(), signal.SIGKILL)
    receipt = at_provider(f"/{claim.provider_key('charge')}")
    return RERUN if receipt is None else Outcome(receipt)


@app.task(name="shop.asks", **LATE)
@idempotent_task(key="{order}", on_crash=ask_the_provider)
def asks(order: str, dies: str) -> str | None:
    """Charge at the provider, and die before or after that, the first time."""
    claim = current_claim()
    ledger.note("started", order)
    if dies == "before" and claim.attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    receipt = at_provider(f"/{claim.provider_key('charge')}", b"charge")
    if dies == "after" and claim.attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return receipt


@app.task(name="shop.kills", **LATE)
@idempotent_task(key="{order}", max_crashes=1)
def kills(order: str) -> None:
    """Die every time."""
    ledger.note("started", order)
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(name="shop.unsure", acks_late=True)
@idempotent_task(key="{order}")
def unsure(order: str) -> None:
    """Celery takes a killed process for done."""


@app.task(name="shop.early")
@idempotent_task(key="{order}", fingerprint=None)
def early(order: str, hold: bool = False) -> str:
    """Acknowledged before it runs."""
    ledger.note("started", order)
    if hold:
        held_until_told(order)
    ledger.note("effect", order)
    return "done"


@app.task(name="shop.changes", **LATE)
@idempotent_task(key="{order[id]}")
def changes(order: dict[str, Any]) -> str:
    """Change the argument, then be held."""
    ledger.note("started", order["id"])
    order["state"] = "seen"
    held_until_told(order["id"])
    ledger.note("effect", order["id"])
    return "done"


@app.task(name="shop.changes_and_comes_again", **LATE)
@idempotent_task(key="{order[id]}")
def changes_and_comes_again(order: dict[str, Any]) -> str:
    """Change the argument, then ask for another delivery; return what came with that."""
    ledger.note("started", order["id"])
    came, order["state"] = str(order["state"]), "seen"
    if ledger.count("started", order["id"]) == 1:
        raise StoreUnavailableError("somebody else's store")
    return came


if os.environ.get("SHOP_COROUTINE"):

    @app.task(name="shop.coroutine", **LATE)
    @idempotent_task(key="{order}")
    async def coroutine(order: str) -> str:
        ledger.note("effect", order)
        await asyncio.sleep(0)
        return "done"
