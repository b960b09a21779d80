"""What a run of endurance is to do: for its own process and for those of its consumers."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from typing import Self

REFUSED = "refused"
"""Keys that begin with it are of messages whose handler always fails, finally: they have to become dead letters."""

_REFUSED_ONE_IN = 50


@dataclass(frozen=True)
class Plan:
    """Survives the way to a consumer's process as one line of JSON."""

    broker: str
    """The module in tests/consumers/brokers."""
    url: str
    name: str
    """Of the queue, topic or subject; whatever else a broker module makes has a name that begins with it."""
    database_url: str
    redis_url: str
    folder: str
    """Where each consumer's process leaves its log, and its file of deliveries."""
    messages: int
    seed: int = 1
    consumers: int = 3
    workers: int = 4
    """Handlers that run at once in each process, where the client can do that."""
    lease: float = 1.0
    kill_every: float = 2.0
    seconds: float = 60.0
    """After which the run is given up."""

    @property
    def dead(self) -> str:
        """The queue, topic or subject of the dead letters."""
        return f"{self.name}_dead"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))

    def all_keys(self) -> list[str]:
        """The idempotency keys, one for each message."""
        kinds = (REFUSED if number % _REFUSED_ONE_IN == 0 else "order" for number in range(1, self.messages + 1))
        return [f"{kind}-{number}" for number, kind in enumerate(kinds, 1)]

    def deliveries(self) -> list[str]:
        """The keys as they are published: each at least twice, close together or far apart."""
        chance = random.Random(self.seed)
        placed = []
        for position, key in enumerate(self.all_keys()):
            placed.append((float(position), key))
            placed.append((position + chance.choice((0.1, 2.0, 20.0, self.messages * chance.random())), key))
            if chance.random() < 0.1:
                placed.append((self.messages * chance.random(), key))
        return [key for _, key in sorted(placed)]
