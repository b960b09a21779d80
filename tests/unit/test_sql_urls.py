"""Settings of a database URL that its driver gets, and which kinds of database are served."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from sqlalchemy import Insert, create_engine
from sqlalchemy.dialects import mysql

from idem_tasks.errors import ConfigurationError
from idem_tasks.stores.sql import SQLStore
from idem_tasks.stores.sql_statements import statements_for
from idem_tasks.stores.sql_urls import parse_url, target


@pytest.mark.parametrize(
    "query, options",
    [
        ("", "-c lock_timeout=1000"),
        ("?options=-c%20search_path%3Djobs", "-c search_path=jobs -c lock_timeout=1000"),
        ("?options=-c%20a%3D1&options=-c%20b%3D2", "-c a=1 -c b=2 -c lock_timeout=1000"),
        ("?options=-c%20lock_timeout%3D5s", "-c lock_timeout=5s"),
    ],
)
def test_postgres_waits_for_a_lock_as_long_as_the_url_says(query: str, options: str) -> None:
    """The short lock timeout (F46) is added to other options, and never put over the URL's own."""
    url = target(parse_url(f"postgresql://h/d{query}"), "blocking").url
    assert url.query["options"] == options


@pytest.mark.parametrize("name", ["connect_timeout", "read_timeout", "write_timeout"])
def test_mysql_waits_for_the_network_as_long_as_the_url_says(name: str) -> None:
    """A silent server is given up after a while (F39), which the URL may change."""
    assert target(parse_url("mysql://h/d"), "blocking").options["connect_args"][name] > 0
    changed = target(parse_url(f"mysql://h/d?{name}=7"), "blocking")
    assert name not in changed.options["connect_args"]
    assert changed.url.query[name] == "7"


def test_mysql_is_asked_for_no_returning() -> None:
    """MariaDB returns what it inserted; MySQL cannot, and is sent a plain INSERT."""
    insert = statements_for("mysql", None, "idem_tasks_").claim
    assert isinstance(insert, Insert)
    claim = str(insert.compile(dialect=mysql.dialect()))
    assert claim.startswith("INSERT")
    assert "RETURNING" not in claim


def test_an_engine_of_another_kind_is_refused() -> None:
    """Records need what only the databases named have."""
    engine = create_engine("mssql+pymssql://h/d", module=SimpleNamespace(paramstyle="pyformat", __version__="2.1.4"))
    with pytest.raises(ConfigurationError, match=r"mssql is not supported; use one of: .*postgresql"):
        SQLStore(engine)
