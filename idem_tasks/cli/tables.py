"""`idem-tasks init-db`: the tables of the records."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from idem_tasks.cli import terminal
from idem_tasks.cli.where import DatabaseURL, Schema, TablePrefix, Where
from idem_tasks.config import DEFAULT_DATABASE_URL
from idem_tasks.idempotency import Idempotency
from idem_tasks.runtime import run_sync

_DEFAULT_PREFIX = "idem_tasks_"


def init_db(
    *,
    context: typer.Context,
    database_url: DatabaseURL = None,
    schema: Schema = None,
    table_prefix: TablePrefix = None,
    sql: Annotated[bool, typer.Option("--sql", help="Print the SQL for a DBA, and change nothing.")] = False,
) -> None:
    """Make the tables in a database, where they are not there yet, and bring older ones up to date.

    Without --database-url and IDEM_TASKS_DATABASE_URL it is sqlite:///idem_tasks.db, as for workers. A schema must be
    there already. May be run at every deployment, by several at once. With --sql it only prints, and does not connect.
    """
    where = Where.of(context, database_url=database_url, schema=schema, table_prefix=table_prefix)
    schema, prefix = where.schema, where.table_prefix or _DEFAULT_PREFIX
    url = where.database_url or DEFAULT_DATABASE_URL
    if sql:
        from idem_tasks.stores.migrations.offline import script

        sys.stdout.write(script(url, schema, prefix))
        return
    from idem_tasks import SQLStore
    from idem_tasks.stores.migrations.offline import newest_revision

    talk, named = terminal.talk(), f"{prefix}*" + (f" in schema {schema}" if schema else "")
    if where.database_url is None:
        talk.print("Neither --database-url nor IDEM_TASKS_DATABASE_URL is given: this is the default database.")
    store = SQLStore(url, schema=schema, table_prefix=prefix, create_schema=False)
    with Idempotency(store=store) as idempotency:
        before, newest = run_sync(store.revision()), newest_revision()
        idempotency.prepare()
    if before is None:
        done = f"Made the tables {named} in {store.address}, version {newest}."
    elif before == newest:
        done = f"{store.address} has the tables {named} already, version {newest}."
    else:
        done = f"Brought the tables {named} in {store.address} from version {before} to {newest}."
    talk.print(done, soft_wrap=True)
