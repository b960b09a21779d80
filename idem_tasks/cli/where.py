"""Which store a command is about: the options that say so, before or after the command's name."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from idem_tasks import config
from idem_tasks.cli.answers import Answer
from idem_tasks.cli.app import load
from idem_tasks.errors import ConfigurationError
from idem_tasks.idempotency import Idempotency
from idem_tasks.stores import store_from_urls


def _option(name: str, help_text: str, **more: Any) -> Any:
    return typer.Option(name, help=help_text, rich_help_panel="Which store", **more)


DatabaseURL = Annotated[
    str | None, _option("--database-url", "The database; also IDEM_TASKS_DATABASE_URL.", metavar="URL")
]
RedisURL = Annotated[
    str | None, _option("--redis-url", "The markers' Redis; also IDEM_TASKS_REDIS_URL.", metavar="URL")
]
Schema = Annotated[str | None, _option("--schema", "The schema of the tables; also IDEM_TASKS_SCHEMA.")]
TablePrefix = Annotated[
    str | None, _option("--table-prefix", "What the tables' names begin with; also IDEM_TASKS_TABLE_PREFIX.")
]
App = Annotated[
    str | None,
    _option(
        "--app",
        "A module of yours that calls configure, or MODULE:APP with its Idempotency: its store is used; "
        "also IDEM_TASKS_APP.",
        metavar="MODULE[:APP]",
    ),
]


@dataclass(frozen=True, slots=True)
class Where:
    """What was said of the store; None where nothing was."""

    database_url: str | None = None
    redis_url: str | None = None
    schema: str | None = None
    table_prefix: str | None = None
    app: str | None = None

    @classmethod
    def of(cls, context: typer.Context, **said: str | None) -> Where:
        """Return what is in force: what stands after the command's name, before it, or in the environment."""
        before = context.find_root().obj
        given = {
            field.name: said.get(field.name) or (getattr(before, field.name) if isinstance(before, Where) else None)
            for field in fields(cls)
        }
        if given["app"] and any(given[name] for name in given if name != "app"):
            raise typer.BadParameter("--app says it all: give either --app or the options of a store")
        if given["app"]:
            return cls(app=given["app"])
        found = {name: value or os.environ.get(f"IDEM_TASKS_{name.upper()}") for name, value in given.items()}
        if found["app"] and not any(given.values()):
            return cls(app=found["app"])
        return cls(**{name: value or None for name, value in (found | {"app": None}).items()})

    @contextmanager
    def open(self) -> Iterator[Idempotency]:
        """Give the `Idempotency` of this store; raises `ConfigurationError` where there is none."""
        if self.app:
            yield load(self.app)
            return
        database_url = self.database_url
        if database_url is None and self.redis_url is None:
            database_url = config.DEFAULT_DATABASE_URL
        if database_url is not None:
            _refuse_a_missing_file(database_url, given=self.database_url is not None)
        store = store_from_urls(
            database_url,
            self.redis_url,
            create_schema=False,
            schema=self.schema,
            table_prefix=self.table_prefix,
        )
        with Idempotency(store=store, observers=[]) as idempotency:
            yield idempotency


def _refuse_a_missing_file(url: str, *, given: bool) -> None:
    """To look at a database must not make one."""
    if not url.startswith("sqlite") or not (path := urlsplit(url).path[1:]) or Path(path).exists():
        return
    hint = "" if given else "; give --database-url, --redis-url or --app, or set IDEM_TASKS_DATABASE_URL"
    raise ConfigurationError(f"there is no database file {path}{hint}")


_JSON = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def on_a_store(command: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function of an open `Idempotency`, an `Answer` and options of its own."""

    @functools.wraps(command)
    def run(*, context: typer.Context, as_json: bool, **options: Any) -> None:
        said = {name: options.pop(name) for name in ("database_url", "redis_url", "schema", "table_prefix", "app")}
        where, answer = Where.of(context, **said), Answer(context.info_name or "", as_json=as_json)
        with answer.errors(), where.open() as idempotency:
            command(idempotency, answer, **options)

    own = list(inspect.signature(command, eval_str=True).parameters.values())[2:]
    shared: dict[str, tuple[Any, Any]] = {
        "as_json": (_JSON, False),
        "database_url": (DatabaseURL, None),
        "redis_url": (RedisURL, None),
        "schema": (Schema, None),
        "table_prefix": (TablePrefix, None),
        "app": (App, None),
    }
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("context", keyword, annotation=typer.Context),
        *(each.replace(kind=keyword) for each in own),
        *(inspect.Parameter(name, keyword, default=value, annotation=kind) for name, (kind, value) in shared.items()),
    ]
    signed: Any = run
    signed.__signature__ = inspect.Signature(parameters)
    signed.__annotations__ = {each.name: each.annotation for each in parameters}
    return run
