"""Other libraries that answer duplicates, on the server that each of them shares with ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from benchmarks.by_hand.records import psycopg_url
from benchmarks.case import case
from benchmarks.measuring import Absent, Here, Way
from benchmarks.orders import AMOUNT, decorated, new_orders, ours
from benchmarks.peers.environments import (
    CELERY_ONCE,
    DBOS,
    FENCEKIT,
    IDEMKIT,
    POWERTOOLS,
    CannotRun,
    Peer,
    PeersWay,
    running,
)
from benchmarks.place import Place

GROUP = "Peers"
FIRST, DUPLICATE = "first call", "duplicate"

NOTES = {
    POWERTOOLS: "no fence, no renewal",
    FENCEKIT: "no renewal",
    CELERY_ONCE: "its lock alone: no outcome",
    IDEMKIT: "asyncio",
    DBOS: "a workflow",
}


def our_ways(idempotency_of: dict[str, tuple[str, str]], what: str, stack: ExitStack) -> dict[str, Way | Absent]:
    """Give ours on each of these pairs of database and Redis."""
    ways: dict[str, Way | Absent] = {}
    for name, (database_url, redis_url) in idempotency_of.items():
        call, order = decorated(stack.enter_context(ours(database_url, redis_url))), new_orders()
        if what == DUPLICATE:
            call("A-1", AMOUNT)
            ways[name] = Here(partial(call, "A-1", AMOUNT))
        else:
            ways[name] = Here(lambda call=call, order=order: call(order(), AMOUNT))  # type: ignore[misc]
    return ways


def their_ways(peers: tuple[Peer, ...], url: str, what: str, place: Place, stack: ExitStack) -> dict[str, Way | Absent]:
    """Give each peer's, or why it cannot be had."""
    ways: dict[str, Way | Absent] = {}
    for peer in peers:
        title = f"{peer.title} ({NOTES[peer]})"
        try:
            process = stack.enter_context(running(peer, url, place.folder))
            for name in process.ways:
                if name.startswith(what):
                    way = ways[title + name.removeprefix(what)] = PeersWay(process, name)
                    way.take(1)  # what does not work is found here, and not in mid-measurement
        except CannotRun as reason:
            ways[title] = Absent(str(reason))
    return ways


def on_redis(what: str, place: Place) -> Iterator[dict[str, Way | Absent]]:
    """Those that keep their records in Redis."""
    with ExitStack() as stack:
        own = {"ours, Redis alone": ("", place.redis), "ours, Redis and PostgreSQL": (place.postgres, place.redis)}
        peers = (POWERTOOLS, FENCEKIT, CELERY_ONCE, IDEMKIT)
        yield our_ways(own, what, stack) | their_ways(peers, place.redis, what, place, stack)


def on_postgres(what: str, place: Place) -> Iterator[dict[str, Way | Absent]]:
    """Those that keep their records in PostgreSQL."""
    with ExitStack() as stack:
        own = {
            "ours, PostgreSQL alone": (place.postgres, ""),
            "ours, Redis and PostgreSQL": (place.postgres, place.redis),
        }
        url = psycopg_url(place.postgres)
        yield our_ways(own, what, stack) | their_ways((IDEMKIT, DBOS), url, what, place, stack)


for _what in (FIRST, DUPLICATE):
    for _server, _ways in (("Redis", on_redis), ("PostgreSQL", on_postgres)):
        case(GROUP, f"{_what}, {_server}", needs=("redis", "postgres"), floor=f"ours, {_server} alone")(
            contextmanager(partial(_ways, _what))
        )
