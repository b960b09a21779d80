"""What all processes of one run of the demo know: its name, its folder, its servers."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, get_args

Side = Literal["without", "with"]
SIDES: tuple[Side, ...] = get_args(Side)
"""Both halves of the demo: without and with idem_tasks."""

VARIABLE = "IDEM_TASKS_DEMO_SETTINGS"
"""The environment variable by which a process of the demo gets them; nobody else is to set it."""

LEASE = 5.0
"""Seconds. After a kill its order waits as long, so it is short; a machine that stalls longer would break it."""

WORKER_LOST_WAIT = 1.0
"""Seconds after which Celery gives a killed process's message back; its default of 10 would be most of the demo."""

SCOPE = "charge"
"""The scope of the records; the Celery task has the same name."""


@dataclass(frozen=True, slots=True)
class Settings:
    """One run of the demo. Everything it makes on a server has `name` in its own name."""

    name: str
    folder: Path
    orders: int
    database_url: str
    redis_url: str
    redis_patience: float
    broker_url: str | None
    lifeline: int
    keep: bool

    @property
    def table_prefix(self) -> str:
        """Begins the names of all tables."""
        return f"{self.name}_"

    @property
    def redis_prefix(self) -> str:
        """Begins the names of all markers in Redis."""
        return f"{self.name}:"

    @property
    def seconds_of_a_charge(self) -> float:
        """How long the card provider takes to answer: as a real one, less if there are many orders."""
        return min(0.3, 6.0 / self.orders)

    def queue(self, side: Side) -> str:
        """Return the name of this side's queue, exchange and routing key."""
        return f"{self.name}.{side}"

    def as_environment(self) -> dict[str, str]:
        """Return the environment of a process of this run: this one's, less what would change how it works."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("CELERY_", "IDEM_TASKS_"))}
        package = str(Path(__file__).parents[2])  # it may run from a folder that is not installed
        kept["PYTHONPATH"] = os.pathsep.join(filter(None, [package, kept.get("PYTHONPATH")]))
        own = {"TMPDIR": str(self.folder), VARIABLE: json.dumps(dataclasses.asdict(self), default=str)}
        return {**kept, **own}

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Return those of the run that this process belongs to."""
        fields = json.loads(environment[VARIABLE])
        return cls(**{**fields, "folder": Path(fields["folder"])})
