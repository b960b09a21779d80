"""Histories made by hand, one order at a time: what a run of chaos tells when all promises are kept."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

from tests.chaos.history import Answered, Effect, Fault, History, Kept, Published, Sent, Started, Stepped

SHOP = "rabbitmq+postgresql"
OTHER_SHOP = "redis+mariadb"

LEASE = 2.0
BEGAN = 1000.0
WORK = 0.2
"""Seconds of a run, before its effect and after it."""


@dataclass
class Made:
    """A history in the making; `at` is in seconds since the run began."""

    published: list[Published] = field(default_factory=list)
    started: list[Started] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)
    stepped: list[Stepped] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)
    answered: list[Answered] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    left: dict[str, int] = field(default_factory=lambda: {SHOP: 0, OTHER_SHOP: 0})

    def history(self, **changes: Any) -> History:
        told = History(
            seed=7,
            seconds=60.0,
            began=BEGAN,
            ended=BEGAN + 100.0,
            published=tuple(self.published),
            started=tuple(self.started),
            effects=tuple(self.effects),
            stepped=tuple(self.stepped),
            sent=tuple(self.sent),
            answered=tuple(self.answered),
            faults=tuple(self.faults),
            kept=tuple(self.kept),
            left_in_queues=dict(self.left),
            lease=LEASE,
        )
        return replace(told, **changes)

    def fault(self, kind: str, at: float, until: float | None = None, *, part: str, pids: tuple[int, ...] = ()) -> None:
        ended = BEGAN + (at if until is None else until)
        shop_and_part = part if part.startswith((SHOP, OTHER_SHOP)) else f"{SHOP} {part}"
        self.faults.append(Fault(kind, BEGAN + at, ended, shop_and_part, pids, ""))


_pids = itertools.count(100)


class Order:
    """One order of a history in the making."""

    def __init__(self, made: Made, order: str = "1", task: str = "charge", shop: str = SHOP) -> None:
        self.made = made
        self.key = {"shop": shop, "order": order, "task": task}
        self.runs = 0
        self.token = 0
        self.part = f"{shop} "

    def outcome(self, token: int) -> str:
        return f"{self.key['task']} {self.key['order']} under {token}, abcd"

    def publish(self, at: float = 0.0, *messages: str) -> None:
        for message in messages or ("m1",):
            self.made.published.append(Published(at=BEGAN + at, message=self._own(message), **self.key))

    def start(self, at: float, *, taken_over: bool = False, token: int | None = None) -> Started:
        self.runs += 1
        self.token = self.token + 1 if token is None else token
        row = Started(
            at=BEGAN + at,
            pid=next(_pids),
            attempt=self.runs,
            fencing_token=self.token,
            taken_over=taken_over,
            **self.key,
        )
        self.made.started.append(row)
        return row

    def effect(self, run: Started, at: float) -> Effect:
        row = Effect(at=BEGAN + at, pid=run.pid, attempt=run.attempt, fencing_token=run.fencing_token, **self.key)
        self.made.effects.append(row)
        return row

    def step(self, run: Started, at: float, value: str, name: str = "pick") -> None:
        self.made.stepped.append(
            Stepped(at=BEGAN + at, pid=run.pid, fencing_token=run.fencing_token, step=name, value=value, **self.key)
        )

    def send(self, at: float, id_: str = "id 1") -> None:
        self.made.sent.append(Sent(at=BEGAN + at, pid=1, id=id_, **self.key))

    def answer(
        self, at: float, outcome: str | None, *, pid: int = 1, message: str = "m1", error: str | None = None
    ) -> None:
        self.made.answered.append(
            Answered(at=BEGAN + at, pid=pid, message=self._own(message), outcome=outcome, error=error, **self.key)
        )

    def keep(self, state: str | None = "completed", token: int | None = None, *, crashes: int = 0) -> None:
        token = self.token if token is None else token
        outcome = self.outcome(token) if state == "completed" else None
        self.made.kept.append(
            Kept(
                state=state,
                outcome=outcome,
                attempts=self.runs,
                crashes=crashes,
                failures=0,
                fencing_token=token,
                **self.key,
            )
        )

    def complete(self, at: float, *, taken_over: bool = False, message: str = "m1") -> Started:
        """Run from beginning to end, and record the outcome."""
        run = self.start(at, taken_over=taken_over)
        self.effect(run, at + WORK)
        if self.key["task"] in ("post", "ship"):
            self.send(at + 2 * WORK)
        self.answer(at + 2 * WORK, self.outcome(run.fencing_token), pid=run.pid, message=message)
        self.keep(crashes=int(taken_over))
        return run

    # What a charge survives: each returns the faults it is explained by.

    def killed(self, at: float, kind: str = "child_killed", *, effect: bool = True) -> None:
        """Its first process is killed, after the effect or before it, and another takes over."""
        run = self.start(at)
        if effect:
            self.effect(run, at + WORK)
        self.made.fault(kind, at + 1.5 * WORK, part=f"{self.part}worker 0", pids=(99, run.pid))
        self.complete(at + 1.5 * WORK + LEASE, taken_over=True)

    def paused(self, at: float, *, effect_before: bool = True) -> None:
        """Its first process is paused past its lease; awake again it gets the other one's outcome."""
        run = self.start(at)
        self.made.fault("worker_paused", at + 0.1, at + 3.0, part=f"{self.part}worker 0", pids=(99, run.pid))
        self.complete(at + 0.1 + LEASE, taken_over=True)
        # Before it is stopped, or when it is awake again: in time that is after the other one's.
        self.effect(run, at + 0.05 if effect_before else at + 3.1)
        self.answer(at + 3.2, self.outcome(self.token), pid=run.pid)

    def cut_off(self, at: float, kind: str = "markers_flushed", since: float | None = None) -> None:
        """SQL is away at its finish for longer than its lease, and its marker is lost, or `since` then out of reach."""
        run = self.start(at)
        self.effect(run, at + WORK)
        self.made.fault("sql_restarted", at + 0.1, at + 3.0, part=f"{self.part}sql")
        self.answer(at + LEASE, None, pid=run.pid, error="Ignore")
        lost_at = at + LEASE + 0.3
        self.made.fault(kind, since or lost_at, lost_at, part=f"{self.part}markers")
        self.complete(at + 3.2, taken_over=True)

    def unrenewed(self, at: float) -> None:
        """SQL is away for longer than its lease in the middle of a long run."""
        run = self.start(at)
        self.made.fault("black_hole", at + 0.1, at + 2.6, part=f"{self.part}sql")
        self.effect(run, at + 1.0)
        self.complete(at + 2.7, taken_over=True)
        self.answer(at + 4.0, self.outcome(self.token), pid=run.pid)

    def in_doubt(self, at: float) -> None:
        """A payment's process is killed, and its message says that a person has to look."""
        run = self.start(at)
        self.effect(run, at + WORK)
        self.made.fault("worker_killed", at + 1.5 * WORK, part=f"{self.part}worker 0", pids=(run.pid,))
        self.answer(at + 1.0, None, pid=2, error="Ignore")
        self.answer(at + LEASE + 1.0, None, pid=2, error="InDoubtError")
        self.keep("in_doubt")

    def _own(self, message: str) -> str:
        return f"{self.key['shop']} {self.key['task']} {self.key['order']} {message}"
