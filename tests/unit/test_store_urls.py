"""Which store a URL names."""

from __future__ import annotations

import pytest

from idem_tasks import store_from_url
from idem_tasks.errors import ConfigurationError
from idem_tasks.stores import store_from_urls


@pytest.mark.parametrize(
    "url, kind",
    [
        ("memory://", "MemoryStore"),
        ("sqlite:///records.db", "SQLStore"),
        ("postgresql+psycopg://h/d", "SQLStore"),
        ("mariadb://h/d", "SQLStore"),
        ("redis://h", "RedisStore"),
        ("rediss://h", "RedisStore"),
        ("redis+sentinel://h/primary", "RedisStore"),
    ],
)
def test_the_scheme_names_the_store(url: str, kind: str) -> None:
    """Nothing connects before its first use."""
    assert type(store_from_url(url)).__name__ == kind


def test_an_unknown_scheme_is_told_the_known_ones() -> None:
    """A slip in a URL is a configuration error that names what there is, and quotes no password."""
    with pytest.raises(
        ConfigurationError, match=r"'postgers'; known: memory, mariadb, .*postgresql, .*redis"
    ) as caught:
        store_from_url("postgers://u:pa55w0rd@h/d")
    assert "pa55w0rd" not in str(caught.value)


def test_one_of_both_urls_is_needed() -> None:
    """Neither a database nor a Redis is no store, and never one in memory that a restart would empty."""
    with pytest.raises(ConfigurationError, match="a database URL, a Redis URL, or both"):
        store_from_urls(None, None)


@pytest.mark.parametrize("redis_url", [None, "redis://h"])
@pytest.mark.parametrize(
    "url, says",
    [
        ("postgresql://u:pa55w0rd@h:abc/d", "the database URL cannot be read; it looks like"),
        ("mysql://u:pa55w0rd@h:99999/d", "the port in the database URL is no number from 1 to 65535"),
        ("mysql://u:pa55w0rd@h:0/d", "the port in the database URL is no number from 1 to 65535"),
    ],
)
def test_a_port_that_is_none_is_said(url: str, redis_url: str | None, says: str) -> None:
    """With markers or without, in a configuration error that shows no password."""
    with pytest.raises(ConfigurationError, match=says) as caught:
        store_from_urls(url, redis_url)
    assert "pa55w0rd" not in str(caught.value)


def test_a_bracket_in_a_password_is_said() -> None:
    """Markers need the database's address, which cannot be told then."""
    with pytest.raises(ConfigurationError, match="write \\[ as %5B") as caught:
        store_from_urls("postgresql://u:pa[55w0rd@h/d", "redis://h")
    assert "55w0rd" not in str(caught.value)
    assert type(store_from_urls("postgresql://u:pa%5B55w0rd@h/d", "redis://h")).__name__ == "TieredStore"
