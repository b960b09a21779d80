"""Redis URLs: what they say, and a clear word about what is wrong with one. No message shows a password."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote

from idem_tasks.errors import ConfigurationError

_FORMS = (
    "redis://host:6379/0, rediss:// (TLS), valkey://, valkeys://, unix:///path/to/socket, "
    "redis+sentinel://host:26379,host:26379/service/0 or redis+cluster://host:6379,host:6379"
)
_TRANSPORTS = {"redis": False, "valkey": False, "rediss": True, "valkeys": True}
_PORTS = {"single": 6379, "cluster": 6379, "sentinel": 26379}


@dataclass(frozen=True, slots=True)
class Address:
    """Where a Redis is, and how to get in."""

    kind: Literal["single", "unix", "sentinel", "cluster"]
    tls: bool = False
    hosts: tuple[tuple[str, int], ...] = ()
    path: str = ""
    service: str = ""
    db: int = 0
    username: str | None = None
    password: str | None = None
    query: str = ""

    @property
    def name(self) -> str:
        """What people may see of it."""
        hosts = ",".join(f"{host}:{port}" for host, port in self.hosts)
        service = f"{self.service!r} by the Sentinels " if self.kind == "sentinel" else ""
        return self.path or service + hosts

    def __repr__(self) -> str:
        return f"<Address {self.name}>"


def parse_address(url: str) -> Address:
    """Return what the URL says; raises `ConfigurationError` naming what is wrong and how it should be."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        raise ConfigurationError(f"a Redis URL begins with a scheme: {_FORMS}")
    rest, _, query = rest.partition("?")
    userinfo, _, place = rest.rpartition("@")
    username, password = _credentials(userinfo)
    if scheme == "unix":
        if not place.startswith("/"):
            raise ConfigurationError("a unix:// URL names the path of a socket: unix:///run/redis.sock?db=0")
        return Address("unix", path=unquote(place), username=username, password=password, query=query)
    transport, _, topology = scheme.partition("+")
    if transport not in _TRANSPORTS or topology not in ("", "sentinel", "cluster"):
        raise ConfigurationError(f"{scheme}:// is no scheme of Redis; use {_FORMS}")
    authority, *parts = place.split("/")
    parts = [unquote(part) for part in parts if part]
    kind: Literal["single", "sentinel", "cluster"] = topology or "single"  # type: ignore[assignment]
    return Address(
        kind,
        tls=_TRANSPORTS[transport],
        hosts=_hosts(authority, kind),
        service=_service(parts) if kind == "sentinel" else "",
        db=_database(parts, kind),
        username=username,
        password=password,
        query=query,
    )


def _credentials(userinfo: str) -> tuple[str | None, str | None]:
    username, _, password = userinfo.partition(":")
    return unquote(username) or None, unquote(password) or None


def _hosts(authority: str, kind: str) -> tuple[tuple[str, int], ...]:
    hosts = []
    for part in authority.split(","):
        host, colon, port = part.rpartition(":")
        if not colon or port.endswith("]"):  # the colons of [::1]
            host, port = part, str(_PORTS[kind])
        if not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
            # The text is not shown: with an unescaped / in a password it would be a part of that.
            raise ConfigurationError(
                "the port in the Redis URL is no number from 1 to 65535; "
                "in a user name or password, write / as %2F, @ as %40, : as %3A"
            )
        if not host:
            raise ConfigurationError("the Redis URL names no host; write for example redis://localhost:6379/0")
        hosts.append((unquote(host).strip("[]"), int(port)))
    if kind == "single" and len(hosts) > 1:
        raise ConfigurationError(
            "a redis:// URL names one host; for several use redis+sentinel://…/service or redis+cluster://…"
        )
    return tuple(hosts)


def _service(parts: list[str]) -> str:
    if not parts:
        raise ConfigurationError("a Sentinel URL names the service to follow: redis+sentinel://host:26379/mymaster/0")
    return parts.pop(0)


def _database(parts: list[str], kind: str) -> int:
    if not parts:
        return 0
    if len(parts) > 1 or not (parts[0].isascii() and parts[0].isdigit()):
        raise ConfigurationError("the database in a Redis URL is one number: redis://localhost:6379/0")
    if kind == "cluster" and int(parts[0]):
        raise ConfigurationError("a Redis Cluster has only database 0; leave the number out of the URL")
    return int(parts[0])
