"""The states of a record and the ways between them, drawn by trying each verb in each state on a store.

`python -m tests.documents.states` writes the diagram and the table into the guarantees page, between the two comments
that say so. The store is the one in memory, which keeps the same contract as the others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from idem_tasks import ConflictError, MemoryStore, State
from idem_tasks.claims import EncodedOutcome
from idem_tasks.testing import Driver, ManualClock
from idem_tasks.testing.store_in_use import DECLINED, DONE, StoreInUse
from tests.documents.reading import REPOSITORY

PAGE = REPOSITORY / "docs" / "guarantees.md"
BEGIN = "<!-- drawn by tests/documents/states.py -->"
END = "<!-- drawn until here -->"

LEASE, RETENTION = 60.0, 3600.0
GONE = "gone"

Who = Literal["a delivery", "the handler", "a function", "a person", "time"]


class Way(NamedTuple):
    """A verb that made one state another, and what held besides."""

    start: str
    end: str
    who: Who
    what: str
    policy: str
    besides: str

    def __str__(self) -> str:
        told = f"{self.what} ({self.policy})" if self.policy else self.what
        return f"{told}, once {self.besides}" if self.besides else told


class Trial:
    """One record in a state, for one verb to be tried on."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.use = StoreInUse(MemoryStore(self.clock), Driver("blocking", self.clock.advance))

    def claim(self, **policy: Any) -> Any:
        return self.use.claim(**{"lease": LEASE, "max_hold": LEASE, "retention": RETENTION, **policy})

    def claimed(self, **policy: Any) -> None:
        self.lease = self.claim(**policy).lease

    def release(self, **how: bool) -> None:
        self.use.release(self.lease, **how)

    def decide(self, outcome: EncodedOutcome | None) -> None:
        self.use.decide(self.lease, self.use.request(lease=LEASE, max_hold=LEASE, retention=RETENTION), outcome)

    def state(self) -> str:
        record = self.use.get()
        return GONE if record is None else record.state.value


def _nothing(_trial: Trial) -> None:
    pass


def _running(trial: Trial) -> None:
    trial.claimed(max_attempts=1)


def _lease_over(trial: Trial) -> None:
    trial.claimed(max_attempts=1)
    trial.clock.advance(LEASE + 1)


def _finished(trial: Trial) -> None:
    trial.claimed()
    trial.use.finish(trial.lease)


def _failed(trial: Trial) -> None:
    trial.claimed()
    trial.use.finish(trial.lease, DECLINED)


def _released(trial: Trial) -> None:
    trial.claimed()
    trial.release()


def _in_doubt(trial: Trial) -> None:
    _lease_over(trial)
    trial.claim(on_crash="hold")


def _parked(trial: Trial) -> None:
    trial.claimed(max_attempts=1)
    trial.release(failed=True)


def _long_after(begin: Callable[[Trial], None]) -> Callable[[Trial], None]:
    def begun(trial: Trial) -> None:
        begin(trial)
        trial.clock.advance(RETENTION + 2 * LEASE)

    return begun


STARTS: tuple[tuple[str, Callable[[Trial], None]], ...] = (
    ("", _nothing),
    ("", _running),
    ("its lease is over", _lease_over),
    ("", _finished),
    ("", _failed),
    ("", _released),
    ("", _in_doubt),
    ("", _parked),
    ("its retention is over", _long_after(_finished)),
    ("its retention is over", _long_after(_failed)),
    ("its retention is over", _long_after(_released)),
)
"""What holds beside the state that a trial brings about, and how it does."""

VERBS: tuple[tuple[Who, str, str, Callable[[Trial], object]], ...] = (
    ("a delivery", "a delivery claims it", "", lambda trial: trial.claim()),
    ("a delivery", "a delivery claims it", '`on_crash="hold"`', lambda trial: trial.claim(on_crash="hold")),
    ("a delivery", "a delivery claims it", "`max_crashes` reached", lambda trial: trial.claim(max_crashes=0)),
    ("the handler", "the handler returns", "", lambda trial: trial.use.finish(trial.lease)),
    ("the handler", "the handler raises", "`record_failures`", lambda trial: trial.use.finish(trial.lease, DECLINED)),
    ("the handler", "the handler raises", "", lambda trial: trial.release()),
    (
        "the handler",
        "the handler raises",
        '`on_crash="hold"`',
        lambda trial: trial.use.release(trial.lease, in_doubt=True),
    ),
    (
        "the handler",
        "the handler raises",
        "`max_attempts` reached",
        lambda trial: trial.use.release(trial.lease, failed=True),
    ),
    ("a function", "a function tells its outcome", "", lambda trial: trial.decide(DONE)),
    ("a function", "a function tells its failure", "", lambda trial: trial.decide(DECLINED)),
    ("a function", "a function says to run it again", "", lambda trial: trial.decide(None)),
    ("a person", "a person gives its outcome", "", lambda trial: trial.use.resolve(DONE)),
    ("a person", "a person gives its failure", "", lambda trial: trial.use.resolve(DECLINED)),
    ("a person", "a person lets it run again", "", lambda trial: trial.use.resolve(None)),
    ("a person", "a person forgets it", "", lambda trial: trial.use.forget()),
    ("time", "purge deletes it", "", lambda trial: trial.use.purge()),
)
"""Who does what, under which policy if not the default one, and how it is tried."""


def ways() -> list[Way]:
    """Try every verb in every state, and return what changed it; a takeover too, though the state is the same."""
    found: list[Way] = []
    for besides, begin in STARTS:
        for who, what, policy, verb in VERBS:
            trial = Trial()
            begin(trial)
            if who in ("the handler", "a function") and not hasattr(trial, "lease"):
                continue
            start, before = trial.state(), trial.use.get()
            try:
                verb(trial)
            except ConflictError:
                continue
            end, after = trial.state(), trial.use.get()
            if end != start or (after is not None and before is not None and after.owner != before.owner):
                found.append(Way(start, end, who, what, policy, besides))
    return [way for way in found if not any(_says_all(other, way) for other in found)]


def _says_all(other: Way, way: Way) -> bool:
    """Tell whether another way says the same with fewer conditions."""
    if other == way or other[:4] != way[:4]:
        return False
    return other.policy in ("", way.policy) and other.besides in ("", way.besides)


def diagram(found: list[Way]) -> str:
    """Draw them in Mermaid, one arrow for each pair of states and each who."""
    labels: dict[tuple[str, str], dict[Who, None]] = defaultdict(dict)
    for way in found:
        labels[way.start, way.end][way.who] = None
    lines = ["```mermaid", "stateDiagram-v2"]
    lines += [
        f"    {_node(start)} --> {_node(end)}: {', '.join(whose)}"
        for (start, end), whose in sorted(labels.items(), key=lambda item: _order(item[0]))
    ]
    return "\n".join([*lines, "```"])


def _node(state: str) -> str:
    return "[*]" if state == GONE else state


def table(found: list[Way]) -> str:
    """Tell all of them, a row for each pair of states."""
    whens: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for way in found:
        whens[way.start, way.end][str(way)] = None
    rows = [
        f"| {_cell(start)} | {_cell(end)} | {';<br>'.join(when)} |"
        for (start, end), when in sorted(whens.items(), key=lambda item: _order(item[0]))
    ]
    return "\n".join(["| from | to | when |", "|---|---|---|", *rows])


def _cell(state: str) -> str:
    return "\N{EN DASH}" if state == GONE else f"`{state}`"


def _order(pair: tuple[str, str]) -> tuple[int, int]:
    order = [GONE, *(state.value for state in State)]
    return order.index(pair[0]), order.index(pair[1])


def drawn() -> str:
    """Return what stands between the comments."""
    found = ways()
    return f"{BEGIN}\n\n{diagram(found)}\n\n{table(found)}\n\n{END}"


def page() -> str:
    """Return the page as it should be."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + drawn() + after


if __name__ == "__main__":
    PAGE.write_text(page())
