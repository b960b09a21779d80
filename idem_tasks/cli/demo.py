"""`idem-tasks demo`."""

from __future__ import annotations

from typing import Annotated

import typer

from idem_tasks.cli import terminal
from idem_tasks.errors import MissingExtraError

_MODULES = ("celery", "fakeredis", "kombu", "lupa")


def demo(
    *,
    orders: Annotated[int, typer.Option(help="How many orders to charge.", min=1, max=1000)] = 10,
    redis_url: Annotated[
        str | None, typer.Option(help="A Redis for the markers; without it, one in memory.", metavar="URL")
    ] = None,
    database_url: Annotated[
        str | None, typer.Option(help="A database for records and ledger; without it, SQLite.", metavar="URL")
    ] = None,
    broker_url: Annotated[
        str | None, typer.Option(help="amqp:// or redis:// for the messages; without it, files.", metavar="URL")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave files, tables and markers to look at.")] = False,
) -> None:
    """Kill a worker in the middle of a charge, and count the charges without and with idem_tasks.

    Starts real Celery workers, needs no server, and takes about 15 seconds. On servers given by URL it uses names of
    its own and removes them again. The environment's IDEM_TASKS_* are not read: they may name servers in use.

    Exits with 1 unless every order was charged exactly once with idem_tasks.
    """
    _require_extra()
    from idem_tasks.demo import run_demo
    from idem_tasks.demo.servers import Servers
    from idem_tasks.demo.show import show

    talk = terminal.talk()
    servers = Servers(database_url=database_url, redis_url=redis_url, broker_url=broker_url)
    try:
        report = run_demo(servers, talk, orders=orders, keep=keep)
    except KeyboardInterrupt:
        talk.print(f"Interrupted: the workers were ended, {'the rest is kept' if keep else 'nothing is left behind'}.")
        raise
    show(report, terminal.data(), talk)
    if report.faults:
        raise typer.Exit(1)


def _require_extra() -> None:
    for module in _MODULES:
        try:
            __import__(module)
        except ModuleNotFoundError:
            raise MissingExtraError(package=module, extra="demo") from None
