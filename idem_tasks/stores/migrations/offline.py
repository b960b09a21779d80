"""The migrations without a connection: as a script, for those who let nothing but people change a schema."""

from __future__ import annotations

from functools import cache
from io import StringIO
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import create_mock_engine

from idem_tasks.stores.sql_urls import parse_url, target


@cache
def newest_revision() -> str:
    """Return the number of the newest revision, such as 0001."""
    return str(ScriptDirectory(str(Path(__file__).parent)).get_current_head())


def script(database_url: str, schema: str | None, prefix: str) -> str:
    """Return the SQL that makes the tables in this kind of database; nothing is connected to."""
    url = target(parse_url(database_url), "blocking").url
    output = StringIO()
    config = Config(output_buffer=output)
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    # Alembic takes no more from it than its dialect.
    config.attributes.update(connection=create_mock_engine(url, executor=lambda *_: None), schema=schema, prefix=prefix)
    command.upgrade(config, "head", sql=True)
    return output.getvalue()
