"""`idem-tasks relay`: sends what handlers published and nobody has sent yet."""

from __future__ import annotations

import signal
import threading
from typing import Annotated

import typer

from idem_tasks.cli import terminal
from idem_tasks.cli.app import load
from idem_tasks.errors import ConfigurationError, StoreError
from idem_tasks.idempotency import Idempotency
from idem_tasks.runtime import run_sync


def relay(
    *,
    app: Annotated[
        str,
        typer.Option(
            envvar="IDEM_TASKS_APP",
            show_envvar=True,
            metavar="MODULE[:APP]",
            help="The module that calls configure; APP is its Celery app or its Idempotency.",
        ),
    ],
    batch: Annotated[
        int, typer.Option(envvar="IDEM_TASKS_BATCH", help="How many messages to send before it looks again.", min=1)
    ] = 100,
    poll: Annotated[
        float, typer.Option(envvar="IDEM_TASKS_POLL", help="Seconds to wait when there is nothing to send.", min=0.01)
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Send what can be sent, then end.")] = False,
) -> None:
    """Send messages that handlers published and that a crash or an outage of the broker left behind.

    Any number may run at once; of each key the messages are sent in order. TERM and Ctrl-C end it after the message
    that is being sent. With --once it exits with 1 if messages are left.
    """
    idempotency, talk = load(app), terminal.talk()
    address = getattr(idempotency.store, "address", type(idempotency.store).__name__)
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: ending.set())
    with idempotency:
        if once:
            talk.print(f"Relaying once from {address}.", soft_wrap=True)
            left = _send_all(idempotency, batch, ending)
            if left:
                talk.print(f"{left} messages are left.")
                raise typer.Exit(1)
        else:
            talk.print(f"Relaying from {address}; TERM or Ctrl-C ends it.", soft_wrap=True)
            _send_for_ever(idempotency, batch, poll, ending)


def _send_all(idempotency: Idempotency, batch: int, ending: threading.Event) -> int:
    while True:
        report = idempotency.relay(batch, should_stop=ending.is_set)
        if ending.is_set() or not report.sent:
            return report.left


def _send_for_ever(idempotency: Idempotency, batch: int, poll: float, ending: threading.Event) -> None:
    talk, outbox = terminal.talk(), idempotency.services("blocking").relay
    while not ending.is_set():
        try:
            sent, _failed = run_sync(outbox.send(batch, ending.is_set))  # which does not count what is left
            more = sent >= batch
        except ConfigurationError:
            raise
        except StoreError as error:
            more = False
            talk.print(f"{terminal.line(str(error))}; trying again.", soft_wrap=True)
        if not more:
            ending.wait(poll)
