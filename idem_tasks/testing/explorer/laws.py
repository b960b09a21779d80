"""What must never happen: the promises of the protocol, checked at every step of an exploration.

`Laws` watches from outside: the record and the marker before and after every command, every effect, every answer and
every acknowledgement. It keeps the first `violation` for the world to raise: raised on the spot, the code that is
explored would take it for its handler's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from idem_tasks.claims import EncodedOutcome, Lease, OutboxMessage, Record, State
from idem_tasks.policy import Policy

ENDED = (State.COMPLETED, State.FAILED)
WAITING = (State.IN_DOUBT, State.PARKED)

_FIRST_PAUSE = 0.05
"""Seconds that a finish waits before its second try; each later pause is as long as all before, and this."""

_ROUNDING = 1e-5
"""Seconds. A record tells its times in microseconds."""


class Law(Enum):
    """What is checked, in words."""

    EFFECT_ONCE = "under hold, an outside effect happens at most once"
    EFFECT_EXPLAINED = "under rerun, an effect is repeated only when the claim that had it was taken over or released"
    TAKEOVER_TOLD = "a handler that runs after a takeover is told so"
    CLAIMED = "a handler runs only under a claim that was granted to it, once for each"
    RISING_FENCE = "every claim that is granted has a higher fencing token than all before"
    LEASE_RESPECTED = "nobody takes a claim over, or ends it, whose lease is not over"
    KEPT_ALIVE = "a claim whose heartbeat beats in time is not taken over"
    CRASHES_END = "a message that kills its worker every time is parked after max_crashes takeovers"
    FAILURES_END = "a message whose handler fails every time is parked after max_attempts failures"
    FENCE = "only the claim that was granted last is renewed, released or records an outcome"
    OUTCOME_STANDS = "a recorded outcome is not replaced, and not run again within its retention"
    RETAINED = "an outcome is kept for the whole retention from when it is recorded"
    MARKER_RETAINED = "a marker's outcome is kept no longer than its record was when its caller was told"
    FORGOTTEN = "what a person deleted is not recorded again by a finish that was sent when its lease was over"
    LATE_FINISH = "the claim that stands can record its outcome, also when it was put in doubt"
    LOST_IS_REWRITTEN = "a record that is lost is written again by a finish that was sent while its lease lived"
    LATE_FAILURE = "a handler that was superseded ends by the recorded outcome, not by its own failure"
    OUTCOME_KEPT = "an outcome that SQL would not take waits in the marker, and in the process that tries on"
    PENDING_FIRST = "whoever meets an outcome that waits in the marker brings it to the record before anything else"
    FINISH_TRIED = "a finish that cannot reach its record is tried again while its lease lives"
    OUTCOME_BROUGHT = "a process that lives brings each of its outcomes to the record in the end"
    INTERRUPTED = "a call that a soft limit or a shutdown struck ends by it, or is put back"
    NOTHING_LEFT = "a call that is over, and could reach both tiers, holds neither the record nor the marker"
    RETENTION_ENDS = "only an end whose retention is over is purged or begun afresh"
    PERSON_DECIDES = "in doubt and parked are ended by a person, or by the late finish of the claim in doubt"
    NO_RELEASE_AFTER_RETURN = "once a handler has returned, nothing releases its claim"
    RECORDED_BEFORE_ANSWER = "nobody is given an outcome that was never recorded, or was forgotten before they asked"
    ONE_OUTCOME = "all who are answered are given the same outcome"
    ACKNOWLEDGED_IS_RECORDED = "a message is acknowledged only once its outcome is recorded, in doubt or parked"
    OWN_MARKER = "a marker is taken away, renewed or replaced only by its owner, by its end, or by a person"
    ROWS = "what a handler writes in its session is committed with its outcome, once, or not at all"
    STEP_ONCE = "a step whose outcome is recorded is not begun again, and every later attempt is given that outcome"
    RECORDED_MESSAGES = "with an outcome is recorded what its own run has published, and nothing else"
    SENT_IF_RECORDED = "what a handler publishes is sent only once its outcome is recorded, in order, by one id"
    ALL_SENT = "what was published with a recorded outcome is sent in the end"
    ASKED = "where on_crash is a function, a dead claim is taken over only if that says so, and ended as it says"
    NO_MESSAGE_LOST = "every message is answered in the end"
    NOT_STUCK = "no key stays in progress once the leases are over"
    KNOWN_ENDINGS = "a call ends by a value, by the handler's own exception, or by an error that says what to do"


class Violation(AssertionError):  # noqa: N818 - a word of its own: the explorer's find
    """A law that was broken."""

    def __init__(self, law: Law, what: str) -> None:
        self.law = law
        self.what = what
        super().__init__(f"{law.value}: {what}")


@dataclass(slots=True)
class _Epoch:
    """The life of a record between two deletions, expiries or orders to run again."""

    effects: set[str] = field(default_factory=set)
    """The owners in whose handlers it happened."""
    repeatable: set[str] = field(default_factory=set)
    """The owners whose claim was taken over or released when their handler had begun: another may run after them."""
    takeovers: int = 0
    releases: int = 0
    failures: int = 0
    outcome: str | None = None
    rows: int = 0
    waited: bool = False
    closed: bool = False
    """Over for certain: whoever asks from now on must not hear its outcome."""

    def counts(self) -> tuple[Any, ...]:
        return len(self.effects), self.takeovers, self.releases, self.failures, self.outcome

    def summary(self) -> tuple[Any, ...]:
        return self.counts(), frozenset(self.effects), frozenset(self.repeatable), self.rows, self.waited, self.closed


@dataclass(frozen=True, slots=True)
class _Grant:
    fencing_token: int
    epoch: int
    took_over: bool


class Laws:
    """Watches one execution; `summary` is all it has to remember, so that equal states can be told."""

    def __init__(self, policy: Policy, *, record_may_be_lost: bool) -> None:
        self.violation: Violation | None = None
        self._policy = policy
        self._record_may_be_lost = record_may_be_lost
        self._last_token = 0
        self._epochs = [_Epoch()]
        self._granted: dict[str, _Grant] = {}
        self._ran: set[str] = set()
        self._returned: set[str] = set()
        self._failed: set[str] = set()
        self._finishes: set[str] = set()
        self._leases: dict[str, float] = {}  # owner: when its lease ends
        self._told_left: dict[str, float] = {}  # owner: what was left of its outcome's retention when it was told
        self._answered: dict[int, set[str]] = defaultdict(set)
        self._steps: dict[str, str] = {}  # name: its recorded outcome, as long as the record lives
        self._begun_steps: set[tuple[str, str]] = set()  # owner and name
        self._messages: list[str] = []  # ids of those that were recorded with an outcome, in order
        self._sent: list[str] = []
        self._provider_says: bool | None = None

    @property
    def epoch(self) -> int:
        """The number of the record's present life."""
        return len(self._epochs) - 1

    @property
    def first_open_epoch(self) -> int:
        """The oldest life whose outcome may still be heard by somebody who asks now."""
        return next(number for number, epoch in enumerate(self._epochs) if not epoch.closed)

    def summary(self) -> tuple[Any, ...]:
        """Return what later checks depend on."""
        epochs = tuple(epoch.summary() for epoch in self._epochs)
        granted = frozenset(self._granted.items())
        answered = frozenset((epoch, frozenset(given)) for epoch, given in self._answered.items())
        owners = tuple(map(frozenset, (self._ran, self._returned, self._failed, self._finishes)))
        times = frozenset(self._leases.items()), frozenset(self._told_left.items())
        steps = frozenset(self._steps.items()), frozenset(self._begun_steps)
        messages = tuple(self._messages), tuple(self._sent)
        return epochs, self._last_token, granted, owners, times, answered, steps, messages, self._provider_says

    def ending(self) -> tuple[Any, ...]:
        """Return how often what happened in each life of the record, and its outcome."""
        return tuple(epoch.counts() for epoch in self._epochs)

    def _broken(self, law: Law, what: str) -> None:
        if self.violation is None:
            self.violation = Violation(law, what)

    # The record

    def record_changed(
        self, verb: str, owner: str, before: Record | None, after: Record | None, *, now: float, kept_alive: bool
    ) -> None:
        """Check what a command of `owner` made of the record; for a person's command the owner is empty.

        `kept_alive`: the claim in `before` is renewed by a heartbeat that has always been in time.
        """
        if before is not None and (after is None or after.generation > before.generation):
            self._ended(verb, before, now)
            self._begin_epoch()
            self._steps.clear()
        if after is None:
            return
        if after.state is State.RUNNING:
            self._leases[after.owner] = after.lease_expires_at.timestamp()
        if before is not None and after.generation > before.generation:
            self._epochs[-2].closed = True
            before = None
        match verb:
            case "claim":
                self._claimed(owner, before, after, now, kept_alive=kept_alive)
            case "finish" | "write_through":
                self._finished(owner, before, after, now)
            case "decide":
                own = before if before is not None and before.owner == owner else None
                self._claimed(owner, own, after, now, kept_alive=False)
                self._finished(owner, own, after, now)
            case "release":
                self._released(owner, before, after)
            case "resolve" if before is not None and _is_held(before, now):
                self._broken(Law.LEASE_RESPECTED, f"a person ended the claim of {before.owner}")
            case "resolve" if after.state is State.RELEASED:
                self._begin_epoch()
                self._epochs[-2].closed = False
            case "resolve" if before is not None and before.state not in ENDED:
                self._epochs[-1].outcome = text_of(after)
        if after.state in WAITING:
            self._epochs[-1].waited = True

    def _ended(self, verb: str, before: Record, now: float) -> None:
        """Check that a record may be deleted, or begun afresh."""
        if _is_held(before, now):
            self._broken(Law.LEASE_RESPECTED, f"{verb} ended the claim of {before.owner}, whose lease was not over")
        over = before.expires_at.timestamp() <= now + _ROUNDING
        if verb != "forget" and (before.state in (State.RUNNING, *WAITING) or not over):
            self._broken(Law.RETENTION_ENDS, f"{verb} ended what was {before.state.value}")

    def _begin_epoch(self) -> None:
        self._epochs.append(_Epoch())

    def _claimed(self, owner: str, before: Record | None, after: Record, now: float, *, kept_alive: bool) -> None:
        if before is not None:
            if before.state in ENDED and after != before:
                self._broken(Law.OUTCOME_STANDS, f"a record that was {before.state.value} became {after.state.value}")
            if before.state in WAITING and after.state is not before.state:
                self._broken(Law.PERSON_DECIDES, f"a claim made {before.state.value} {after.state.value}")
            changed = (after.owner, after.state) != (before.owner, before.state)
            if _is_held(before, now) and before.owner != owner and changed:
                self._broken(Law.LEASE_RESPECTED, f"{owner} took over from {before.owner}, whose lease was not over")
        if after.state is State.RUNNING and after.owner == owner:
            same = before is not None and (before.owner, before.fencing_token) == (owner, after.fencing_token)
            if not same and after.fencing_token <= self._last_token:
                what = f"{owner} was granted {after.fencing_token}, and {self._last_token} was there before"
                self._broken(Law.RISING_FENCE, what)
            self._last_token = after.fencing_token
            if not same:
                took_over = before is not None and before.state is State.RUNNING
                self._granted[owner] = _Grant(after.fencing_token, self.epoch, took_over)
            if before is not None and before.state is State.RUNNING and not same:
                self._taken_over(owner, before, kept_alive=kept_alive)

    def _taken_over(self, owner: str, before: Record, *, kept_alive: bool) -> None:
        epoch, most = self._epochs[-1], self._policy.max_crashes
        epoch.takeovers += 1
        if callable(self._policy.on_crash):
            self._broken(Law.ASKED, f"{owner} took over from {before.owner}, and nobody was asked")
        self._may_be_repeated(before.owner)
        if kept_alive:
            self._broken(Law.KEPT_ALIVE, f"{owner} took over from {before.owner}")
        if most is not None and epoch.takeovers > most:
            self._broken(Law.CRASHES_END, f"{owner} is takeover number {epoch.takeovers}")

    def _may_be_repeated(self, owner: str) -> None:
        if owner in self._ran:  # one that has not begun must not begin any more
            self._epochs[-1].repeatable.add(owner)

    def _finished(self, owner: str, before: Record | None, after: Record, now: float) -> None:
        if before == after or after.state not in ENDED:
            return
        if after.expires_at.timestamp() < now + self._policy.retention - _ROUNDING:
            self._broken(Law.RETAINED, f"the outcome of {owner} expires {after.expires_at.timestamp() - now:g} s later")
        if before is None:
            self._epochs[-1].outcome = text_of(after)
            return
        if before.state in ENDED:
            if text_of(before) != text_of(after):
                self._broken(Law.OUTCOME_STANDS, f"{owner} replaced {text_of(before)} by {text_of(after)}")
            return
        if before.owner != owner:
            self._broken(Law.FENCE, f"{owner} recorded its outcome over the claim of {before.owner}")
        self._epochs[-1].outcome = text_of(after)

    def _released(self, owner: str, before: Record | None, after: Record) -> None:
        if before is None or (before.state, before.owner) == (after.state, after.owner):
            return
        if before.owner != owner:
            self._broken(Law.FENCE, f"{owner} released the claim of {before.owner}")
        if owner in self._returned:
            self._broken(Law.NO_RELEASE_AFTER_RETURN, f"{owner} had returned, and is {after.state.value}")
        if before.state in ENDED:
            self._broken(Law.OUTCOME_STANDS, f"{owner} released what was {before.state.value}")
        epoch, most = self._epochs[-1], self._policy.max_attempts
        epoch.failures += owner in self._failed
        if after.state is State.RELEASED:
            epoch.releases += 1
            self._may_be_repeated(owner)
            if most is not None and epoch.failures >= most:
                self._broken(Law.FAILURES_END, f"{owner} is failure number {epoch.failures}, and is released")

    def renewed(self, owners: Iterable[str], record: Record | None) -> None:
        """Check that nobody is told that its claim was renewed whose claim it is not."""
        for owner in owners:
            if record is None or record.owner != owner:
                self._broken(Law.FENCE, f"{owner} was renewed, and the claim is of {record and record.owner}")

    def finish_came(
        self,
        verb: str,
        owner: str,
        before: Record | None,
        after: Record | None,
        *,
        sent_at: float,
        lease_lived: bool,
    ) -> None:
        """Check what became of an outcome that reached the record, whether that changed or not.

        `lease_lived`: it was sent before the lease's end by the sender's own clock.
        """
        self._finishes.add(owner)
        stands = before is not None and before.owner == owner and before.state in (State.RUNNING, State.IN_DOUBT)
        if stands and (after is None or after.state not in ENDED):
            self._broken(Law.LATE_FINISH, f"the outcome of {owner}, whose claim stood, was refused")
        sent_late = verb == "write_through" or sent_at > self._leases.get(owner, 0.0) + _ROUNDING
        if before is None and after is not None and sent_late and not self._record_may_be_lost:
            self._broken(Law.FORGOTTEN, f"{verb} of {owner} made a record where there was none")

        if before is None and lease_lived and (after is None or after.state not in ENDED):
            self._broken(Law.LOST_IS_REWRITTEN, f"the outcome of {owner}, whose lease lived, is not recorded")

    def told(self, owner: str, record: Record | None, now: float) -> None:
        """Note what is left of a recorded outcome that the record answers with."""
        if record is not None and record.state in ENDED:
            # A finish that is sent again hears of what was recorded earlier.
            left = max(record.expires_at.timestamp() - now, self._told_left.get(owner, 0.0))
            self._told_left[owner] = left

    def record_was_lost(self) -> None:
        """The database lost its last moments; what it lost is not our doing."""
        self._begin_epoch()

    def person_is_done(self, epoch: int) -> None:
        """A person's forget or purge has ended, its marker is gone too: that life's outcome is heard no more."""
        for old in self._epochs[: epoch + 1]:
            old.closed = True

    def decided(self, owner: str, dead: Lease, before: Record | None, *, reruns: bool) -> None:
        """Check that a doubt is ended as the provider said, and only for the claim that it was asked about."""
        if reruns:
            self._granted[owner] = replace(self._granted[owner], took_over=True)
        if before is not None and before.owner == owner:
            return  # an earlier try of this decision took effect
        if before is None or before.state is not State.IN_DOUBT or before.fencing_token != dead.fencing_token:
            self._broken(Law.ASKED, f"the doubt about {dead.owner} was ended, and the record was {before}")
            return
        if reruns is self._provider_says:
            self._broken(Law.ASKED, f"it {'runs again' if reruns else 'ended'} though the provider said otherwise")
        if reruns:
            self._may_be_repeated(before.owner)

    def provider_answered(self, *, happened: bool) -> None:
        """Note what an `on_crash` function found out."""
        self._provider_says = happened

    def effect_happened(self) -> bool:
        """Tell what a provider knows: whether the effect has happened in this life of the record."""
        return bool(self._epochs[-1].effects)

    # Rows, steps and messages

    def rows_committed(self, owner: str, rows: Sequence[str], record: Record | None) -> None:
        """Check that the rows of a session were committed with the outcome of their own run, and are the first."""
        epoch = self._epochs[-1]
        epoch.rows += len(rows)
        if record is None or record.state not in ENDED or record.owner != owner:
            self._broken(Law.ROWS, f"{owner} committed its rows, and the record is {record and record.state.value}")
        if epoch.rows != 1:
            self._broken(Law.ROWS, f"with the commit of {owner} there are {epoch.rows} rows")

    def recorded_without_rows(self, owner: str) -> None:
        """An outcome was recorded apart from the session in which its handler wrote."""
        self._broken(Law.ROWS, f"the outcome of {owner} was recorded, and its rows were not committed with it")

    def step_began(self, owner: str, name: str, record: Record | None, *, begun: bool) -> None:
        """Check that a step begins under the claim that stands, and has no outcome yet."""
        if not begun:
            return
        self._begun_steps.add((owner, name))
        if record is None or record.owner != owner:
            self._broken(Law.FENCE, f"{owner} began step {name}, and the claim is of {record and record.owner}")
        if name in self._steps:
            self._broken(Law.STEP_ONCE, f"{owner} began step {name}, which was recorded")

    def step_runs(self, owner: str, name: str) -> None:
        """Check that a step runs only once it is written that it begins."""
        if (owner, name) not in self._begun_steps:
            self._broken(Law.STEP_ONCE, f"{owner} ran step {name}, which it had not begun")

    def step_recorded(self, owner: str, name: str, record: Record | None, outcome: EncodedOutcome) -> None:
        """Check that the claim that stands records a step's outcome, and that it is the first."""
        if record is None or record.owner != owner:
            self._broken(Law.FENCE, f"{owner} recorded step {name}, and the claim is of {record and record.owner}")
        text = (outcome.body or b"").decode().strip('"')
        if self._steps.setdefault(name, text) != text:
            self._broken(Law.STEP_ONCE, f"{owner} replaced the outcome of step {name}, {self._steps[name]}")

    def step_returned(self, owner: str, name: str, value: str) -> None:
        """Check what a handler is given for a step."""
        # A record that was forgotten or resolved meanwhile has other steps, or none.
        recorded = self._steps.get(name)
        if recorded is not None and value != recorded and self._granted[owner].epoch == self.epoch:
            self._broken(Law.STEP_ONCE, f"{owner} was given {value!r} for step {name}, and {recorded!r} is recorded")

    def messages_recorded(self, owner: str, messages: Sequence[OutboxMessage], published: int) -> None:
        """Check and note the messages of an outcome that was just recorded; each run publishes so many."""
        if len(messages) != published:
            self._broken(Law.RECORDED_MESSAGES, f"{owner} published {published}, and {len(messages)} are recorded")
        # A finish that is sent again when its record was forgotten brings the same ones back.
        self._messages += [message.id for message in messages if message.id not in self._messages]

    def sent(self, message: OutboxMessage) -> None:
        """Check that a message may be sent now: it is recorded, and all before it were sent."""
        if message.id not in self._messages:
            self._broken(Law.SENT_IF_RECORDED, f"message {message.number} was sent, and no outcome has it")
        elif message.id not in self._sent:
            self._sent.append(message.id)
            if self._sent != self._messages[: len(self._sent)]:
                self._broken(Law.SENT_IF_RECORDED, f"message {message.number} was sent before an earlier one")

    def all_is_sent(self) -> None:
        """Check that nothing is left over."""
        if set(self._messages) != set(self._sent):
            self._broken(Law.ALL_SENT, f"{len(self._messages)} messages were recorded, and {len(self._sent)} sent")

    # The marker

    def marker_changed(self, verb: str, owner: str, before: Any, after: Any) -> None:
        """Check what a command of `owner` made of the marker, given as (kind, owner) pairs or None."""
        vanished = before is not None and before[0] == "pending" and before != after and verb != "drop"
        if vanished and before[1] not in self._finishes:
            self._broken(Law.OUTCOME_KEPT, f"{verb} deleted the outcome of {before[1]}, which never was recorded")
        if before is None or before == after or verb in ("drop", "drop_pending"):
            return
        if before[1] != owner:
            self._broken(Law.OWN_MARKER, f"{verb} of {owner} changed the {before[0]} marker of {before[1]}")

    def published(self, owner: str, left: float) -> None:
        """Check for how many seconds a marker answers with an outcome."""
        told = self._told_left.pop(owner, left)  # what the record knows nothing of breaks another law
        if left > told + _ROUNDING:
            self._broken(Law.MARKER_RETAINED, f"{owner} published for {left:g} s what is kept for {told:g} s")

    # The handler

    def handler_began(self, owner: str, fencing_token: int, *, taken_over: bool, again: bool) -> None:
        """Check that it has a claim of its own; `taken_over` is what it is told.

        `again`: in the same call, after its transaction was undone.
        """
        grant = self._granted.get(owner)
        if grant is None or grant.fencing_token != fencing_token or (owner in self._ran and not again):
            self._broken(Law.CLAIMED, f"{owner} ran under {fencing_token}, and was granted {grant}")
        elif grant.took_over and not taken_over:
            self._broken(Law.TAKEOVER_TOLD, f"{owner} took over, and does not know")
        self._ran.add(owner)

    def effect(self, owner: str) -> None:
        """Check that the outside effect may happen now."""
        epoch = self._epochs[self._granted[owner].epoch]  # a late effect belongs to the life in which it was claimed
        if owner in epoch.effects:
            law = Law.EFFECT_ONCE if self._policy.doubts else Law.EFFECT_EXPLAINED
            self._broken(law, f"it happened twice in {owner}, under one claim")
        epoch.effects.add(owner)
        if len(epoch.effects) == 1 or self._record_may_be_lost:
            return
        if self._policy.on_crash == "hold":
            self._broken(Law.EFFECT_ONCE, f"it happened in {owner}, and had happened before")
        final = epoch.effects - epoch.repeatable
        if len(final) > 1:
            what = f"it happened in {sorted(epoch.effects)}, and might be repeated after {sorted(epoch.repeatable)}"
            self._broken(Law.EFFECT_EXPLAINED, what)

    def handler_failed(self, owner: str) -> None:
        """Note that its release counts as a failure."""
        self._failed.add(owner)

    def handler_returned(self, owner: str) -> None:
        """Note that nothing may release its claim from now on."""
        self._returned.add(owner)

    def call_is_over(
        self,
        owner: str,
        *,
        reached: bool,
        record: Record | None,
        marker: tuple[str, str] | None,
    ) -> None:
        """Check that a call that `reached` the tiers whenever it asked them has left nothing behind."""
        if not reached:
            return
        if record is not None and record.state is State.RUNNING and record.owner == owner:
            self._broken(Law.NOTHING_LEFT, f"{owner} is over, and its claim still runs")
        if marker == ("running", owner):
            self._broken(Law.NOTHING_LEFT, f"{owner} is over, and its marker still says that it runs")

    def is_kept(self, owner: str, *, in_marker: bool, tried_again: bool) -> None:
        """Check that an outcome which never reached the record is not given up when its call is over."""
        if owner in self._returned and owner not in self._finishes and not (in_marker and tried_again):
            where = "its process does not try on" if in_marker else "it is not in the marker"
            self._broken(Law.OUTCOME_KEPT, f"the outcome of {owner} is not recorded, and {where}")

    def met_pending(self, owner: str, asks: str) -> None:
        """Check what a call does next that has just heard of an outcome which waits in the marker."""
        # Whoever has asked a provider claims again first, and meets it there.
        if asks != "write_through" and not (asks == "take" and callable(self._policy.on_crash)):
            self._broken(Law.PENDING_FIRST, f"{owner} met a pending outcome, and went on with: {asks}")

    def gives_up(self, owner: str, *, tried_for: float, left: float) -> None:
        """Check that a finish is given up only when its next try, after as long a pause again, would be too late."""
        if left > tried_for + _FIRST_PAUSE + _ROUNDING:
            self._broken(
                Law.FINISH_TRIED, f"{owner} gave up after {tried_for:g} s, and {left:g} s of its lease are left"
            )

    def process_is_left(self, owner: str) -> None:
        """Check that nothing is left to do in the end for a process that lives."""
        if owner in self._returned and owner not in self._finishes:
            self._broken(Law.OUTCOME_BROUGHT, f"the outcome of {owner} never came to the record")

    def interrupted(self, owner: str, what: str, ended_by: str) -> None:
        """An interruption was swallowed."""
        self._broken(Law.INTERRUPTED, f"{owner} was struck by {what}, and ended by {ended_by}")

    def failed(self, owner: str, *, superseded: bool) -> None:
        """Check that a handler's own failure may go on; `superseded`: its release heard a recorded outcome."""
        if superseded:
            self._broken(Law.LATE_FAILURE, f"{owner} was told the recorded outcome, and failed")

    # The answer and the message

    def answered(self, owner: str, outcome: str, *, first_epoch: int) -> None:
        """Check the outcome given to a delivery that asked when `first_epoch` was the oldest that could answer."""
        epochs = [n for n in range(first_epoch, len(self._epochs)) if self._epochs[n].outcome == outcome]
        if not epochs:
            known = [epoch.outcome for epoch in self._epochs]
            self._broken(Law.RECORDED_BEFORE_ANSWER, f"{owner} was given {outcome}; recorded was {known}")
            return
        self._answered[epochs[-1]].add(outcome)
        if len(self._answered[epochs[-1]]) > 1:
            self._broken(Law.ONE_OUTCOME, f"callers were given {sorted(self._answered[epochs[-1]])}")

    def unknown_ending(self, owner: str, error: BaseException) -> None:
        """A call ended by an error that says nothing to a consumer."""
        self._broken(Law.KNOWN_ENDINGS, f"{owner} ended by {error!r}")

    def acknowledged_without_outcome(self, owner: str, why: str, *, first_epoch: int) -> None:
        """Check that a message which ended in doubt or parked is found by a person."""
        if not any(epoch.waited for epoch in self._epochs[first_epoch:]):
            self._broken(Law.ACKNOWLEDGED_IS_RECORDED, f"{owner} was acknowledged with {why}")


def _is_held(record: Record, now: float) -> bool:
    return record.state is State.RUNNING and now < record.lease_expires_at.timestamp() - _ROUNDING


def text_of(record: Record) -> str:
    """Return a recorded outcome as the handler returned it."""
    return record.error_message or "failed" if record.outcome is None else record.outcome.decode().strip('"')
