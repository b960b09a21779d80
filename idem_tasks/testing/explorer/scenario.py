"""What is explored: how many deliveries of one message, under which policy, with which faults at most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from idem_tasks.policy import OnCrash, Policy, PolicyFields

T0 = 1_700_000_000.0
"""When every execution begins, in seconds since the epoch."""

LEASE = 0.3
"""Seconds. A finish that cannot reach its record tries again for that long, which is two or three times."""

RETENTION = 1000.0
"""Seconds that an outcome is kept."""

LONGEST_WAIT = 31.0
"""Seconds in which a process tries once at least to record what is pending."""

Behaviour = Literal["return", "raise", "raise before its effect", "retry"]
"""How one run of the handler goes. `raise` comes after its effect; `retry` publishes the message again before it, as
Celery's `self.retry()` does, and raises."""

Fault = Literal[
    "command lost",
    "command late",
    "conflict",
    "reply lost",
    "sent again",
    "killed",
    "lease over",
    "third of a lease over",
    "retention over",
    "markers lost",
    "record lost",
    "SQL down",
    "Redis down",
    "broker down",
    "soft limit",
    "shutdown",
    "delivered again",
    "forget",
    "resolve with an outcome",
    "resolve with a rerun",
    "purge",
]
"""What can go wrong, or what a person can do, at any step:

`command lost` never reaches the tier; after `command late` the caller sees an outage too, but the command is on its
way, and takes effect at any later moment, or never; `conflict` is a deadlock that undoes a transaction of the user's;
`reply lost` took effect, and the caller sees an outage; `sent again` took effect, its reply was lost, and the client
sent the command once more. `killed` ends a worker's process. `lease over` lets more than a lease pass while nobody does
anything: a pause of all; `third of a lease over` is the time after which heartbeats are due. `markers lost` is a flush,
an eviction or a failover of Redis; `record lost` takes the last moments of a database that failed over. While the
broker is down no message is sent. A soft limit and a shutdown strike a delivery where it is.
"""


class HandlerFailedError(Exception):
    """What an explored handler raises."""


class RetryError(Exception):
    """What an explored handler raises once it has published its message again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One message that was published `copies` times, and everything that may happen to it.

    At most `deliveries` of it begin, and at most `most_faults` faults happen, of each kind at most as many as `faults`
    says. `behaviours` are those of the handler's runs, in order; it returns from all later ones. With `session` it
    writes a row in the transaction of its outcome, and has an outside effect only where a crash leaves doubt. `steps`
    are the names of its steps: the effect is that of the first. `messages` are those that it publishes.
    With `local_cache` all workers are threads of one process, which keeps what it has recorded or replayed.
    `every_reply` stops also between an effect and its reply; without it both are one step. `beats_in_time` lets no
    time pass while a heartbeat is due. `reduced` leaves out orders of steps that make no difference to anybody.
    """

    name: str
    policy: Policy
    copies: int = 2
    deliveries: int = 2
    faults: Mapping[Fault, int] = field(default_factory=dict)
    most_faults: int = 1
    behaviours: tuple[Behaviour, ...] = ()
    session: bool = False
    steps: tuple[str, ...] = ()
    messages: tuple[str, ...] = ()
    local_cache: bool = False
    every_reply: bool = False
    beats_in_time: bool = False
    reduced: bool = True


def policy(on_crash: OnCrash = "rerun", **fields: Any) -> Policy:
    """Return a policy with short times for explored handlers."""
    times: PolicyFields = {"lease": LEASE, "max_hold": 600.0, "retention": RETENTION, "cache_ttl": RETENTION}
    safe = (RetryError,) if on_crash == "hold" else ()
    return Policy(on_crash=on_crash, max_crashes=None, safe_to_retry=safe).replace(**times).replace(**fields)
