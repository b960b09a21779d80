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
