"""The root of the command line: global options, the commands, and what errors end with which exit code."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from idem_tasks import __version__
from idem_tasks.cli import UNUSABLE, decisions, demo, records, relay, tables, terminal, where
from idem_tasks.errors import IdemTasksError

INTERRUPTED = 130

_ON_TERMINAL = sys.stdout.isatty() and sys.stderr.isatty()

application = typer.Typer(
    name="idem-tasks",
    help="Stops redelivered messages from running their side effects twice.",
    epilog=(
        "Exit codes: 0 done, 1 found something, 2 usage, 3 no such record, 4 refused, "
        "5 a server or the configuration cannot be used."
    ),
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich" if _ON_TERMINAL else None,  # no boxes in a pipe
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"idem-tasks {__version__}\n")
        raise typer.Exit


@application.callback()
def options(
    *,
    version: Annotated[  # noqa: ARG001 - its callback prints it
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
    context: typer.Context,
    database_url: where.DatabaseURL = None,
    redis_url: where.RedisURL = None,
    schema: where.Schema = None,
    table_prefix: where.TablePrefix = None,
    app: where.App = None,
    no_color: Annotated[bool, typer.Option("--no-color", help="Print no colours; so does NO_COLOR.")] = False,
) -> None:
    context.obj = where.Where(database_url, redis_url, schema, table_prefix, app)
    if no_color:
        terminal.forbid_color()


application.command("demo")(demo.demo)
application.command("ls")(records.ls)
application.command("show")(records.show)
application.command("resolve")(decisions.resolve)
application.command("forget")(decisions.forget)
application.command("audit")(records.audit)
application.command("init-db")(tables.init_db)
application.command("relay")(relay.relay)


def run() -> int:
    """Run the command of this process's arguments, and return the exit code."""
    terminal.escape_what_stdout_cannot_have()
    try:
        application(prog_name="idem-tasks")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        return INTERRUPTED
    except IdemTasksError as error:
        # Our messages name no password, and a traceback would add nothing to them.
        sys.stderr.write(f"idem-tasks: {terminal.line(str(error))}\n")
        return UNUSABLE
    return 0
