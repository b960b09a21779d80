"""Redis URLs: what they say, and a clear word about what is wrong with one."""

from __future__ import annotations

from typing import Any

import pytest

from idem_tasks.errors import ConfigurationError
from idem_tasks.stores.redis import RedisStore
from idem_tasks.stores.redis_urls import parse_address

SECRET = "pa55w0rd"


@pytest.mark.parametrize(
    "url, expected",
    [
        ("redis://localhost", {"kind": "single", "hosts": (("localhost", 6379),), "db": 0, "tls": False}),
        ("redis://h:1/5", {"hosts": (("h", 1),), "db": 5}),
        ("redis://h:1/5?max_connections=3", {"db": 5, "query": "max_connections=3"}),
        ("rediss://h/", {"tls": True, "db": 0}),
        ("valkey://h", {"kind": "single", "tls": False}),
        ("valkeys://h", {"tls": True}),
        ("redis://[::1]:7/0", {"hosts": (("::1", 7),)}),
        ("redis://[::1]/0", {"hosts": (("::1", 6379),)}),
        ("redis://u%40x:p%2Fw%3A@h", {"username": "u@x", "password": "p/w:", "hosts": (("h", 6379),)}),
        ("redis://:pw@h", {"username": None, "password": "pw"}),
        ("redis://:p@w@h", {"password": "p@w"}),
        ("unix:///run/r.sock?db=2", {"kind": "unix", "path": "/run/r.sock", "query": "db=2"}),
        ("unix://u:p@/run/r.sock", {"username": "u", "password": "p", "path": "/run/r.sock"}),
        (
            "redis+sentinel://u:p@a:1,b/mymaster/3",
            {"kind": "sentinel", "hosts": (("a", 1), ("b", 26379)), "service": "mymaster", "db": 3, "password": "p"},
        ),
        ("rediss+sentinel://a/m", {"tls": True, "service": "m", "db": 0}),
        ("redis+cluster://a:1,b:2", {"kind": "cluster", "hosts": (("a", 1), ("b", 2))}),
        ("valkeys+cluster://a/0", {"kind": "cluster", "tls": True}),
    ],
)
def test_what_a_url_says(url: str, expected: dict[str, Any]) -> None:
    """Every form that the documentation names is read as it says, and the store can be made."""
    address = parse_address(url)
    assert {name: getattr(address, name) for name in expected} == expected
    RedisStore(url)


@pytest.mark.parametrize(
    "url, message",
    [
        (f"localhost:6379/{SECRET}", "begins with a scheme"),
        ("", "begins with a scheme"),
        (f"postgresql://u:{SECRET}@h/db", "no scheme of Redis"),
        (f"http://u:{SECRET}@h", "no scheme of Redis"),
        ("redis+ring://h", "no scheme of Redis"),
        ("redis://", "names no host"),
        ("redis:///0", "names no host"),
        (f"redis://:{SECRET}@/0", "names no host"),
        ("redis://:6379/0", "names no host"),
        (f"redis://:a/{SECRET}@h:0/0", "port"),
        (f"redis://u:{SECRET}/x", "port"),
        ("redis://h:99999/0", "port"),
        ("redis://h:/0", "port"),
        ("redis://a,b/0", "one host"),
        ("redis://h/zero", "one number"),
        ("redis://h/0/1", "one number"),
        ("redis+sentinel://h:1", "names the service"),
        ("redis+sentinel://h:1/m/x", "one number"),
        ("redis+cluster://h:1/2", "only database 0"),
        ("unix://run/r.sock", "path of a socket"),
        (f"redis://:{SECRET}@h?no_such_option=1", "no_such_option"),
        (f"redis://:{SECRET}@h?decode_responses=true", "decode_responses"),
        (f"redis://:{SECRET}@h?socket_timeout=soon", "socket_timeout"),
    ],
)
def test_what_is_wrong_with_a_url(url: str, message: str) -> None:
    """A mistake is an error when the store is made; it names the mistake, and shows no password."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        RedisStore(url)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


def test_no_password_is_shown() -> None:
    """Neither a store nor an address shows what it knows."""
    url = f"redis://user:{SECRET}@host:6379/0?sentinel_password={SECRET}"
    assert SECRET not in f"{RedisStore(url)!r} {parse_address(url)!r} {parse_address(url).name}"


def test_a_prefix_is_text() -> None:
    """A prefix of another type is refused when the store is made."""
    with pytest.raises(ConfigurationError, match="prefix"):
        RedisStore("redis://h", prefix=b"x")  # type: ignore[arg-type]
