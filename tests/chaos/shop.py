"""The app that the workers run: `celery -A tests.chaos.shop worker`, told by CHAOS_SHOP in the environment what to use.

Every delivery writes what its caller got, every handler that it began and that it had its effect.
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

import functools
import json
import os
import secrets
import time
from collections.abc import Callable
from typing import Any

from celery import Celery, current_task
from kombu.transport import TRANSPORT_ALIASES
from sqlalchemy import create_engine, insert
from sqlalchemy.orm import Session, sessionmaker

from idem_tasks import configure, current_claim, idempotent_task, log_event
from tests.chaos.history import Answered, Effect, Started, Stepped
from tests.chaos.ledger import Ledger
from tests.chaos.sales import SALES, post_office, sale

Handler = Callable[..., str]

SETTINGS = json.loads(os.environ["CHAOS_SHOP"])
SHOP: str = SETTINGS["name"]
LATE: Any = {"acks_late": True, "reject_on_worker_lost": True}

TRANSPORT_ALIASES["redis"] = "tests.chaos.careful_redis:Transport"
ledger = Ledger(SETTINGS["ledger"])
configure(**SETTINGS["store"], observers=[log_event], senders={"post": post_office(ledger, SHOP)})
Sales = sessionmaker(create_engine(SETTINGS["store"]["database_url"], **SETTINGS["engine"]))
app = Celery("shop")
app.conf.update(SETTINGS["celery"])


def telling(handler: Handler) -> Handler:
    """Stand between Celery and the decorator, and write down what Celery gets."""

    @functools.wraps(handler)
    def told(order: str, before: float, after: float) -> str:
        try:
            outcome = handler(order, before, after)
        except BaseException as error:
            note_answer(order, None, type(error).__name__)
            raise
        note_answer(order, outcome, None)
        return outcome

    return told


def note_answer(order: str, outcome: str | None, error: str | None) -> None:
    task = current_task
    ledger.note(Answered(time.time(), SHOP, order, task.name, os.getpid(), task.request.id, outcome, error))


@app.task(name="charge", **LATE)
@telling
@idempotent_task(key="{order}", on_crash="rerun")
def charge(order: str, before: float, after: float) -> str:
    return work("charge", order, before, after)


@app.task(name="pay", **LATE)
@telling
@idempotent_task(key="{order}", on_crash="hold")
def pay(order: str, before: float, after: float) -> str:
    return work("pay", order, before, after)


@app.task(name="post", **LATE)
@telling
@idempotent_task(key="{order}", on_crash="rerun", session=Sales)
def post(order: str, before: float, after: float, session: Session) -> str:
    claim, pid = current_claim(), os.getpid()
    ledger.note(Started(time.time(), SHOP, order, "post", pid, claim.attempt, claim.fencing_token, claim.taken_over))
    time.sleep(before)  # the work that faults strike, here and below
    session.execute(insert(SALES).values(sale(order, pid, claim.attempt, claim.fencing_token)))
    claim.publish_message(order, to="post")
    time.sleep(after)
    return f"post {order} under {claim.fencing_token}, {secrets.token_hex(4)}"


@app.task(name="ship", **LATE)
@telling
@idempotent_task(key="{order}", on_crash="rerun")
def ship(order: str, before: float, after: float) -> str:
    claim, pid = current_claim(), os.getpid()
    token = claim.fencing_token
    ledger.note(Started(time.time(), SHOP, order, "ship", pid, claim.attempt, token, claim.taken_over))

    def pick() -> str:
        time.sleep(before)  # work, as above
        ledger.note(Effect(time.time(), SHOP, order, "ship", pid, claim.attempt, token))
        return secrets.token_hex(4)

    def label() -> str:
        time.sleep(after)
        return secrets.token_hex(4)

    values = []
    for step in (pick, label):
        values.append(claim.step(step.__name__, step))
        ledger.note(Stepped(time.time(), SHOP, order, "ship", pid, token, step.__name__, values[-1]))
    claim.publish_message(order, to="post")
    return f"ship {order} under {token}, {' '.join(values)}"


def work(task: str, order: str, before: float, after: float) -> str:
    """Have the effect between these seconds of work; what it returns is different each time."""
    claim, pid = current_claim(), os.getpid()
    token = claim.fencing_token
    ledger.note(Started(time.time(), SHOP, order, task, pid, claim.attempt, token, claim.taken_over))
    time.sleep(before)
    ledger.note(Effect(time.time(), SHOP, order, task, pid, claim.attempt, token))
    time.sleep(after)
    return f"{task} {order} under {token}, {secrets.token_hex(4)}"
