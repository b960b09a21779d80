"""What happened in a run of chaos, as told by those who saw it; one JSON object a line on disk.

All times are `time.time()` of the one machine. A shop is a broker with its stores, such as "rabbitmq+postgresql".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

FAULT_KINDS = (
    "child_killed",
    "worker_killed",
    "worker_paused",
    "markers_flushed",
    "redis_restarted",
    "sql_restarted",
    "connections_cut",
    "black_hole",
    "redis_out_of_memory",
    "sentinel_failover",
)

TASKS = ("charge", "pay", "post", "ship")
"""`charge` runs again after a crash; `pay` is held for a person; `post` writes a row in its record's transaction; and
`ship` runs again too, and has its effect in the first of two steps. The last two publish a message each."""


@dataclass(frozen=True)
class Published:
    """One message that the broker accepted; the duplicates of an order are further ones with ids of their own."""

    at: float
    shop: str
    order: str
    task: str
    message: str


@dataclass(frozen=True)
class Started:
    """A handler began."""

    at: float
    shop: str
    order: str
    task: str
    pid: int
    attempt: int
    fencing_token: int
    taken_over: bool


@dataclass(frozen=True)
class Effect:
    """The outside effect of a handler happened; of a `post`, its row is there at the end."""

    at: float
    shop: str
    order: str
    task: str
    pid: int
    attempt: int
    fencing_token: int


@dataclass(frozen=True)
class Stepped:
    """A handler was given the outcome of a step, its own or an earlier one's."""

    at: float
    shop: str
    order: str
    task: str
    pid: int
    fencing_token: int
    step: str
    value: str


@dataclass(frozen=True)
class Sent:
    """A message that a handler had published was sent, by a worker or by the relay at the end."""

    at: float
    shop: str
    order: str
    task: str
    pid: int
    id: str


@dataclass(frozen=True)
class Answered:
    """A delivery returned `outcome`, or raised an exception of the type named `error`."""

    at: float
    shop: str
    order: str
    task: str
    pid: int
    message: str
    outcome: str | None
    error: str | None


@dataclass(frozen=True)
class Fault:
    """What was done to the shop from `at` until `until`; the same time twice for an instant."""

    kind: str
    at: float
    until: float
    target: str  # the shop and its part: "redis+mariadb worker 1", "... broker", "... markers", "... database"
    pids: tuple[int, ...]  # of the processes struck
    details: str


@dataclass(frozen=True)
class Kept:
    """The record at the end, as SQL has it; the state is None if there is none."""

    shop: str
    order: str
    task: str
    state: str | None
    outcome: str | None
    attempts: int
    crashes: int
    failures: int
    fencing_token: int


@dataclass(frozen=True)
class History:
    """A whole run."""

    seed: int
    seconds: float
    began: float
    ended: float
    published: tuple[Published, ...]
    started: tuple[Started, ...]
    effects: tuple[Effect, ...]
    stepped: tuple[Stepped, ...]
    sent: tuple[Sent, ...]
    answered: tuple[Answered, ...]
    faults: tuple[Fault, ...]
    kept: tuple[Kept, ...]
    left_in_queues: dict[str, int]  # messages that were not settled at the end, by shop
    lease: float = 0.0  # seconds, of all claims; without it a run cannot be judged


Row: TypeAlias = Published | Started | Effect | Stepped | Sent | Answered | Fault | Kept

ROWS: dict[str, type[Row]] = {
    "published": Published,
    "started": Started,
    "effects": Effect,
    "stepped": Stepped,
    "sent": Sent,
    "answered": Answered,
    "faults": Fault,
    "kept": Kept,
}


def write(history: History, file: Path) -> None:
    """Write the run's own values on the first line, and one row on each line after it, by time."""
    head = {field.name: getattr(history, field.name) for field in fields(History) if field.name not in ROWS}
    rows = [(name, row) for name in ROWS for row in getattr(history, name)]
    rows.sort(key=lambda named: getattr(named[1], "at", history.ended))
    lines = [{"row": "run", **head}, *({"row": name, **asdict(row)} for name, row in rows)]
    with file.open("wb") as out:
        out.writelines(msgspec.json.encode(line) + b"\n" for line in lines)


def read(file: Path) -> History:
    """Read what `write` wrote."""
    rows: dict[str, list[Row]] = {name: [] for name in ROWS}
    head: dict[str, Any] = {}
    for line in _lines(file):
        name = line.pop("row")
        if name == "run":
            head = line
        else:
            rows[name].append(msgspec.convert(line, ROWS[name]))
    return History(**head, **{name: tuple(found) for name, found in rows.items()})  # type: ignore[arg-type]


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    with file.open("rb") as lines:
        for line in lines:
            yield msgspec.json.decode(line, type=dict[str, Any])
