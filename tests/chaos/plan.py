"""Which faults come, in which order: all of it from the seed."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass

GAP = (0.4, 2.4)
"""Seconds between the beginnings of two faults; most overlap."""

EACH_SHOP: tuple[tuple[str, str], ...] = (
    ("child_killed", "worker"),
    ("child_killed", "worker"),
    ("child_killed", "worker"),
    ("worker_killed", "worker"),
    ("worker_paused", "worker"),
    ("worker_paused", "worker"),
    ("markers_flushed", "markers"),
    ("sql_restarted", "sql"),
    ("connections_cut", "markers"),
    ("connections_cut", "sql"),
    ("connections_cut", "broker"),
    ("black_hole", "markers"),
    ("black_hole", "sql"),
    ("redis_out_of_memory", "markers"),
)

ONE_SHOP: tuple[tuple[int, str, str], ...] = ((0, "redis_restarted", "markers"), (1, "sentinel_failover", "markers"))

DECK = tuple((shop, kind, part) for shop in (0, 1) for kind, part in EACH_SHOP) + ONE_SHOP


@dataclass(frozen=True)
class Planned:
    """One fault to come."""

    after: float  # seconds since the one before
    kind: str
    shop: int
    part: str
    pick: float  # 0 to 1: which one of several
    strength: float  # 0 to 1: how long, how much


def planned(seed: int, kinds: Collection[str] | None = None) -> Iterator[Planned]:
    """Faults without end, of these kinds only; each kind at each place once before any comes again.

    Raises `ValueError` where there is no such fault.
    """
    deck = [card for card in DECK if kinds is None or card[1] in kinds]
    if not deck:
        raise ValueError(f"no fault is of these kinds: {', '.join(kinds or ())}")
    chance = random.Random(f"faults {seed}")
    while True:
        for shop, kind, part in chance.sample(deck, k=len(deck)):
            yield Planned(chance.uniform(*GAP), kind, shop, part, chance.random(), chance.random())
