"""The scenarios that the promises are held to: small ones gone through to the end, large ones drawn at random."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

from idem_tasks.policy import Policy
from idem_tasks.testing.explorer.handlers import ask_provider
from idem_tasks.testing.explorer.scenario import LEASE, Behaviour, Fault, HandlerFailedError, Scenario, policy


def _each(faults: Iterable[Fault], count: int = 1) -> dict[Fault, int]:
    return dict.fromkeys(faults, count)


_ALL: tuple[Fault, ...] = get_args(Fault)
_NETWORK = _each(("command lost", "reply lost", "sent again"))
_CRASHES = _each(("killed", "lease over", "markers lost"))
_OUTAGES = _each(("SQL down", "Redis down"))
_ONE_EACH = _each(fault for fault in _ALL if fault not in ("record lost", "retention over", "purge"))
_PAIRED = {
    fault: count
    for fault, count in _ONE_EACH.items()
    if fault
    not in (
        *("command late", "delivered again", "Redis down", "shutdown", "resolve with an outcome"),
        *("sent again", "third of a lease over"),
    )
}
_LATE = _each(("command late", "forget")) | _CRASHES
_LATE_UNDER_HOLD: dict[Fault, int] = {fault: count for fault, count in _LATE.items() if fault != "markers lost"}
_MANY = _each((fault for fault in _ALL if fault != "record lost"), 3)
_STEPS = ("charge", "ship")
_MESSAGES = ("receipt", "parcel")

EXHAUSTIVE: tuple[Scenario, ...] = (
    Scenario(name="three copies at once", policy=policy(), copies=3, deliveries=3, every_reply=True),
    Scenario(name="one fault, rerun", policy=policy(), faults=_ONE_EACH, every_reply=True),
    Scenario(name="one fault, hold", policy=policy("hold"), faults=_ONE_EACH, every_reply=True),
    Scenario(name="two faults", policy=policy(), faults=_PAIRED, most_faults=2),
    Scenario(name="two faults, hold", policy=policy("hold"), faults=_PAIRED, most_faults=2),
    Scenario(name="a late command", policy=policy(), faults=_LATE, most_faults=2),
    Scenario(name="a late command, hold", policy=policy("hold"), faults=_LATE_UNDER_HOLD, most_faults=2),
    Scenario(name="three copies, one fault", policy=policy(), copies=3, deliveries=3, faults=_ONE_EACH),
    Scenario(
        name="a crash every time",
        policy=policy(max_crashes=1),
        copies=1,
        deliveries=3,
        faults=_each(["killed", "lease over"], 2),
        most_faults=4,
    ),
    Scenario(
        name="heartbeats in time",
        policy=policy(),
        faults=_each(["third of a lease over"], 3),
        most_faults=3,
        beats_in_time=True,
    ),
    Scenario(
        name="retention",
        policy=policy(),
        faults=_each(["retention over", "purge", "killed"]),
        most_faults=3,
    ),
    Scenario(
        name="little retention is left",
        policy=policy(max_hold=LEASE, retention=0.5, cache_ttl=0.4),
        faults=_each(["markers lost"]) | _each(["lease over"], 2),
        most_faults=3,
    ),
    Scenario(
        name="the handler raises after its effect",
        policy=policy(),
        behaviours=("raise",),
        deliveries=3,
        faults=_CRASHES | _each(["reply lost"]),
    ),
    Scenario(
        name="the handler raises after its effect, hold",
        policy=policy("hold"),
        behaviours=("raise",),
        deliveries=3,
        faults=_CRASHES | _NETWORK,
    ),
    Scenario(
        name="the handler retries, hold",
        policy=policy("hold"),
        copies=1,
        behaviours=("retry",),
        deliveries=3,
        faults=_CRASHES | _NETWORK,
    ),
    Scenario(
        name="the handler fails every time",
        policy=policy(max_attempts=2),
        copies=1,
        deliveries=4,
        behaviours=("raise", "raise before its effect", "raise"),
        faults=_CRASHES | _NETWORK,
    ),
    Scenario(
        name="a final failure",
        policy=policy(record_failures=(HandlerFailedError,)),
        behaviours=("raise",),
        faults=_CRASHES | _NETWORK | _OUTAGES,
    ),
    Scenario(
        name="duplicates wait",
        policy=policy(on_in_progress="wait", wait_timeout=0.1),
        faults=_each(["killed", "lease over", "reply lost"]),
    ),
    Scenario(name="the record is lost", policy=policy(), faults=_CRASHES | _each(["record lost"]), most_faults=2),
    Scenario(name="one fault, session", policy=policy(), session=True, faults=_ONE_EACH, every_reply=True),
    Scenario(name="one fault, session, hold", policy=policy("hold"), session=True, faults=_ONE_EACH),
    Scenario(
        name="a late commit",
        policy=policy(),
        copies=1,
        session=True,
        faults=_each(["command late", "forget", "lease over", "killed"]),
        most_faults=3,
    ),
    Scenario(
        name="conflicts in a session",
        policy=policy(),
        session=True,
        messages=_MESSAGES,
        faults=_each(["conflict", "reply lost", "killed"]),
        most_faults=2,
    ),
    Scenario(name="one fault, steps", policy=policy(), steps=_STEPS, faults=_ONE_EACH),
    Scenario(name="one fault, steps, hold", policy=policy("hold"), steps=_STEPS, faults=_ONE_EACH),
    Scenario(
        name="steps and pauses",
        policy=policy(),
        copies=1,
        deliveries=3,
        steps=_STEPS,
        faults=_CRASHES | _each(["lease over"], 2),
        most_faults=3,
    ),
    Scenario(name="one fault, messages", policy=policy(), messages=_MESSAGES, faults=_ONE_EACH),
    Scenario(
        name="an outcome with messages waits in the marker",
        policy=policy(),
        messages=_MESSAGES,
        faults=_each(["SQL down", "broker down", "lease over"]),
        most_faults=2,
    ),
    Scenario(
        name="one fault, local cache",
        policy=policy(),
        copies=2,
        deliveries=2,
        local_cache=True,
        faults=_ONE_EACH,
        reduced=False,
    ),
    Scenario(name="one fault, a provider is asked", policy=policy(ask_provider), faults=_ONE_EACH),
    Scenario(
        name="a provider is asked",
        policy=policy(ask_provider),
        copies=1,
        deliveries=3,
        faults=_CRASHES | _each(["reply lost", "forget"]),
        most_faults=3,
    ),
)
"""Gone through to the end: every interleaving, and every placing of the faults."""


def _many_faults(name: str, made: Policy, *behaviours: Behaviour, **done: Any) -> Scenario:
    return Scenario(
        name=f"many faults, {name}",
        policy=made,
        copies=3,
        deliveries=5,
        faults=_MANY,
        most_faults=6,
        behaviours=behaviours,
        **done,
    )


AT_RANDOM: tuple[Scenario, ...] = (
    _many_faults("rerun", policy()),
    _many_faults("hold", policy("hold")),
    _many_faults("handlers that fail", policy(), "raise", "retry", "raise before its effect"),
    _many_faults("handlers that fail, hold", policy("hold"), "retry", "raise before its effect", "raise"),
    _many_faults("duplicates wait", policy(on_in_progress="wait", wait_timeout=1.0)),
    _many_faults("few crashes", policy(max_crashes=1)),
    _many_faults("final failures", policy(record_failures=(HandlerFailedError,)), "raise"),
    _many_faults("session", policy(), "return", "raise", session=True, messages=_MESSAGES),
    _many_faults("session, hold", policy("hold"), session=True),
    _many_faults("steps", policy(), "raise", steps=_STEPS, messages=_MESSAGES),
    _many_faults("steps, hold", policy("hold"), steps=_STEPS),
    _many_faults("a provider is asked", policy(ask_provider), messages=_MESSAGES),
    _many_faults("local cache", policy(), "return", "raise", messages=_MESSAGES, local_cache=True),
    _many_faults("local cache, hold", policy("hold"), local_cache=True),
    Scenario(
        name="many late commands",
        policy=policy(),
        copies=3,
        deliveries=5,
        faults=_each(_LATE, 2) | _each(["command late", "third of a lease over"], 4),
        most_faults=8,
        behaviours=("return", "raise"),
    ),
)
"""Too large to go through: three copies, five deliveries, six faults or eight."""
