"""Why an effect of `charge` or `ship` may have been repeated: the windows of docs/guarantees.md, and nothing else.

An outside effect under `on_crash="rerun"` happens once, "unless in mid-run a worker dies, is paused past its lease,
runs past `max_hold`, or the handler raises after the effect; or SQL stays unreachable at the finish past the lease and
the marker is lost; or the database's clock jumps". Here no handler raises, none runs for `max_hold`, and no clock
jumps. What is left, and how each follows from that page:

killed              "3 run: it dies" and "4 finish, not yet recorded: as in 3, with the effect done". The process that
                    ran the earlier effect was killed between the start of that run and the repeat, and never answered.
paused              "3 run: it is paused for longer than its lease: the next delivery runs the handler beside it, so
                    both effects may happen"; the same in "2 claim, before the handler". The process was stopped before
                    it answered, for longer than what was left of its lease, and the repeat began then, or while it
                    still ran: a lease that is over is renewed no more.
SQL out of reach    "4 finish: tried again as long as the lease lives. Then the outcome is kept in the marker". SQL
and the marker lost went away before the run answered, and stayed away for as long as the rest of its lease; its
                    message was put back; and what lost the marker, or kept it from being written, struck then or
                    between then and the repeat. The process
                    "keeps trying", so the repeat came before its next try was due.
SQL out of reach    "3 run: renewals fail and are tried again until the lease is over", and "a worker that is alive but
in mid-run          cannot renew is as one that is paused": the same, but the repeat began while the earlier run
                    had not answered. No marker is asked for: it is renewed after its record, so it ran out with it.
SQL out of reach    Under "Steps": "SQL is away until its lease is over", before a step's outcome is recorded: "runs it
at the end of       again". Nothing but the record keeps that outcome, so no marker is asked for; the message was put
a step              back, and the claim given up if SQL came back at that moment.

In each of them but the last the dead claim is found by the next delivery, so the run that follows says `taken_over`; a
run after a claim that was given up is explained by nothing. How much of a lease was left is not known: it is renewed at
each third of it, and on a busy machine a little later. So half of it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tests.chaos.history import Effect, Fault, Started

KILLS = frozenset({"child_killed", "worker_killed"})

SQL_AWAY = frozenset({"sql_restarted", "black_hole", "connections_cut"})

MARKERS_LOST = frozenset({"markers_flushed", "redis_out_of_memory", "redis_restarted", "sentinel_failover"})

MARKERS_AWAY = frozenset(
    {"redis_out_of_memory", "redis_restarted", "sentinel_failover", "black_hole", "connections_cut"}
)

SLACK = 0.5
"""Seconds between what a fault is said to have begun or ended, or a row was written, and when it was so."""

LONGEST_PAUSE = 30.0
"""Seconds between two tries of a process to record a pending outcome, at most."""


@dataclass(frozen=True)
class Run:
    """One run of a handler that had its effect, and when its process answered for that order, if it did."""

    started: Started
    effect: Effect
    answered_at: float | None
    was_put_back: bool


@dataclass(frozen=True)
class Explained:
    """A repeated effect, and the faults that the documents allow it after."""

    first: Effect
    faults: tuple[Fault, ...]
    second: Effect

    @property
    def kind(self) -> str:
        return " and ".join(fault.kind for fault in self.faults)


def explain(run: Run, next_run: Started, faults: Iterable[Fault], lease: float) -> tuple[Fault, ...]:
    """Return the faults by which a later run may repeat the effect of `run`; () if none. `next_run` follows it."""
    faults = tuple(faults)
    if run.started.task == "ship" and run.was_put_back:
        for fault in faults:
            if _sql_was_away(run, next_run, fault, lease):
                return (fault,)
    if not next_run.taken_over:
        return ()
    for fault in faults:
        if fault.kind in KILLS and _killed(run, next_run, fault):
            return (fault,)
        if fault.kind == "worker_paused" and _paused(run, next_run, fault, lease):
            return (fault,)
    for fault in faults:
        if _sql_was_away(run, next_run, fault, lease):
            if run.answered_at is None or run.answered_at >= next_run.at:
                return (fault,)
            if run.was_put_back and (others := _marker_was_lost(run, next_run, fault, faults)):
                return (fault, *others)
    return ()


def may_be_in_doubt(
    run: Started, answered_at: float | None, since: float, faults: Iterable[Fault], lease: float
) -> bool:
    """Tell whether a fault is a reason to doubt this run `since` then: killed, paused past its lease, or without SQL.

    For how long before is not asked: who put it in doubt may itself have been struck, and somebody else told of it.
    """
    for fault in faults:
        struck = fault.at <= since and fault.until + SLACK >= run.at - lease / 2
        if fault.kind in KILLS and run.pid in fault.pids and struck and answered_at is None:
            return True
        away = (fault.kind == "worker_paused" and run.pid in fault.pids) or is_of_sql(fault, run.shop)
        lasted = min(fault.until, since) - max(fault.at, run.at - lease / 2)
        if struck and away and lasted >= lease / 2 and (answered_at is None or fault.at <= answered_at):
            return True
    return False


def was_held_up(run: Started, faults: Iterable[Fault], lease: float) -> bool:
    """Tell whether this run may have begun long after its claim: paused before it, or the claim's answer came late."""
    return any(
        fault.at <= run.at and fault.until >= run.at - lease
        for fault in faults
        if (fault.kind == "worker_paused" and run.pid in fault.pids) or is_of_sql(fault, run.shop)
    )


def strikes_claims(fault: Fault, shop: str, since: float, until: float) -> bool:
    """Tell whether this fault may have struck a claim between these times, whoever made it."""
    strikes = fault.kind in KILLS or fault.kind == "worker_paused" or is_of_sql(fault, shop)
    return strikes and fault.at <= until and fault.until + SLACK >= since


def is_of_sql(fault: Fault, shop: str) -> bool:
    return fault.kind in SQL_AWAY and fault.target == f"{shop} sql"


def _killed(run: Run, next_run: Started, fault: Fault) -> bool:
    return (
        run.started.pid in fault.pids
        and run.answered_at is None
        and fault.at <= next_run.at
        and fault.until + SLACK >= max(run.started.at, run.effect.at)  # what came later was not struck by it
    )


def _paused(run: Run, next_run: Started, fault: Fault, lease: float) -> bool:
    rest = lease / 2
    return (
        run.started.pid in fault.pids
        and (run.answered_at is None or fault.at <= run.answered_at)
        and fault.until >= run.started.at - rest  # earlier only if it was paused between its claim and its start
        and fault.until - fault.at >= rest
        and fault.at + rest <= next_run.at
        and next_run.at <= max(fault.until + rest, run.answered_at or 0.0)  # awake again it renews no more, and runs on
    )


def _sql_was_away(run: Run, next_run: Started, fault: Fault, lease: float) -> bool:
    rest = lease / 2
    return (
        is_of_sql(fault, run.started.shop)
        and (run.answered_at is None or fault.at <= run.answered_at)
        and fault.until - max(fault.at, run.started.at) >= rest
        and fault.until - SLACK <= next_run.at <= fault.until + LONGEST_PAUSE  # a claim needs SQL too
    )


def _marker_was_lost(run: Run, next_run: Started, sql: Fault, faults: Iterable[Fault]) -> tuple[Fault, ...]:
    assert run.answered_at is not None
    for fault in faults:
        if fault.target != f"{run.started.shop} markers" or fault.at > next_run.at:
            continue
        # Lost after it was kept, which is just before the answer; or out of reach, so that it could not be kept.
        if (fault.kind in MARKERS_LOST and fault.until + SLACK >= run.answered_at) or (
            fault.kind in MARKERS_AWAY and fault.at <= run.answered_at and fault.until >= sql.at
        ):
            return (fault,)
    return ()
