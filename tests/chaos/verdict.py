"""Judges a run of chaos by docs/guarantees.md: what was lost, what was done twice, what else should not have been.

An order is one key: a shop, a task and the order's number. For each order there is a class, the worst that holds:

lost        it was published, and at the end it is neither completed nor failed, in doubt or parked; or one of its
            messages never got an answer that ends it (an outcome, `InDoubtError`, `ParkedError`)
duplicated  a second effect under `pay`, a second row of a `post`; under `charge` and `ship` one that no fault explains
            (`explained.py`); another outcome of a step, or a message by another id
unexpected  something that no promise allows, such as an outcome that differs from another one: see `Rules`
in doubt    as the record says at the end
parked      as the record says at the end
recovered   completed, after a dead claim was taken over
once        completed, and nothing happened to it

The first three are broken promises, and each has a sentence in `problems`.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from idem_tasks import errors
from tests.chaos.explained import KILLS, Explained, Run, explain, may_be_in_doubt, strikes_claims, was_held_up
from tests.chaos.history import Answered, Effect, Fault, History, Kept, Published, Sent, Started, Stepped

BROKEN = ("lost", "duplicated", "unexpected")

CLASSES = (*BROKEN, "in doubt", "parked", "recovered", "once")

ENDED = frozenset({"completed", "failed", "in_doubt", "parked"})

FINAL_ERRORS = frozenset({"InDoubtError", "ParkedError"})

PUT_BACK_ERRORS = frozenset({"Ignore", "Reject"}) | {
    name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.PUT_BACK)
}
"""By which the message comes again: ours, and what they are to Celery once that was seen to."""

TOKEN = re.compile(r"\bunder (\d+)\b")
"""The fencing token in an outcome, under which the run that made it had its effect."""


@dataclass(frozen=True)
class Judged:
    """What is to be said of one order."""

    shop: str
    order: str
    task: str
    messages: int
    deliveries: int
    put_back: int
    effects: int
    sent: int
    takeovers: int
    killed: int
    """Runs whose process was killed before they answered, and whose outcome is not the recorded one."""
    state: str | None
    outcome: str | None
    explained: tuple[Explained, ...]
    problems: tuple[tuple[str, str], ...]  # which of `BROKEN`, and a sentence

    @property
    def classes(self) -> tuple[str, ...]:
        """All that hold, the worst first."""
        found = {kind for kind, _ in self.problems}
        if self.state in ("in_doubt", "parked"):
            found.add(self.state.replace("_", " "))
        elif self.state in ENDED and self.takeovers:
            found.add("recovered")
        return tuple(kind for kind in CLASSES if kind in found) or ("once",)

    @property
    def worst(self) -> str:
        return self.classes[0]


@dataclass(frozen=True)
class Verdict:
    """What is to be said of a whole run."""

    orders: tuple[Judged, ...]
    left_in_queues: dict[str, int]
    problems: tuple[str, ...]

    @property
    def good(self) -> bool:
        return not self.problems

    @property
    def shops(self) -> tuple[str, ...]:
        return tuple(sorted({judged.shop for judged in self.orders} | set(self.left_in_queues)))

    @property
    def explained(self) -> tuple[Explained, ...]:
        """All explained repeats, by the time of the repeat."""
        found = [repeat for judged in self.orders for repeat in judged.explained]
        return tuple(sorted(found, key=lambda repeat: (repeat.second.at, repeat.second.shop, repeat.second.order)))

    def totals(self, shop: str | None = None) -> dict[str, int]:
        """Count everything, in all shops or in one. An order that is lost and duplicated counts as both."""
        orders = [judged for judged in self.orders if shop in (None, judged.shop)]
        kinds = Counter(kind for judged in orders for kind in judged.classes)
        repeats = Counter(repeat.kind for judged in orders for repeat in judged.explained)
        return {
            "orders": sum(judged.messages > 0 for judged in orders),
            "messages published": sum(judged.messages for judged in orders),
            "deliveries": sum(judged.deliveries for judged in orders),
            "deliveries put back": sum(judged.put_back for judged in orders),
            "effects": sum(judged.effects for judged in orders),
            "messages sent": sum(judged.sent for judged in orders),
            "outcomes": sum(judged.outcome is not None for judged in orders),
            "takeovers": sum(judged.takeovers for judged in orders),
            "killed in mid-run": sum(judged.killed for judged in orders),
            "lost": kinds["lost"],
            "left in queues": sum(count for name, count in self.left_in_queues.items() if shop in (None, name)),
            "duplicated": kinds["duplicated"],
            "unexpected": kinds["unexpected"],
            "in doubt": kinds["in doubt"],
            "parked": kinds["parked"],
            "recovered": kinds["recovered"],
            "explained repeats": sum(repeats.values()),
            **{f"explained repeats: {kind}": repeats[kind] for kind in sorted({r.kind for r in self.explained})},
        }


def judge(history: History) -> Verdict:
    """Judge a whole run; raises `ValueError` if it does not say how long a lease was."""
    if history.lease <= 0:
        raise ValueError("without the lease nobody can tell whether a fault was long enough: History(lease=...)")
    orders = tuple(Rules(rows, history).judge() for _, rows in sorted(_by_order(history).items()))
    problems = [sentence for judged in orders for _, sentence in judged.problems]
    problems += [
        f"{count} messages of {shop} were still in its queue at the end"
        for shop, count in sorted(history.left_in_queues.items())
        if count
    ]
    return Verdict(orders, dict(history.left_in_queues), tuple(problems))


@dataclass
class Rows:
    """All that was told of one order."""

    key: tuple[str, str, str]
    published: list[Published] = field(default_factory=list)
    started: list[Started] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)
    stepped: list[Stepped] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)
    answered: list[Answered] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)


def _by_order(history: History) -> dict[tuple[str, str, str], Rows]:
    found: dict[tuple[str, str, str], Rows] = {}
    for name in ("published", "started", "effects", "stepped", "sent", "answered", "kept"):
        for row in getattr(history, name):
            key = (row.shop, row.order, row.task)
            getattr(found.setdefault(key, Rows(key)), name).append(row)
    for rows in found.values():
        timed: tuple[list[Any], ...] = (
            *(rows.published, rows.started, rows.effects),
            *(rows.stepped, rows.sent, rows.answered),
        )
        for seen in timed:
            seen.sort(key=lambda row: row.at)
    return found


class Rules:
    """The rules for one order; each yields what breaks it."""

    def __init__(self, rows: Rows, history: History) -> None:
        self._rows = rows
        self._began = history.began
        self._lease = history.lease
        shop = rows.key[0]
        self._faults: tuple[Fault, ...] = tuple(
            sorted((fault for fault in history.faults if fault.target.startswith(f"{shop} ")), key=lambda f: f.at)
        )
        self._kept = rows.kept[0] if rows.kept else None
        self._state = self._kept.state if self._kept else None
        self._outcome = self._kept.outcome if self._kept else None
        self._explained: list[Explained] = []

    def judge(self) -> Judged:
        rules = (
            self._is_not_lost,
            self._every_message_is_answered,
            self._effects_are_not_repeated,
            self._a_step_has_one_outcome,
            self._what_is_recorded_is_sent,
            self._was_published,
            self._has_one_record,
            self._outcome_is_one,
            self._outcome_has_an_effect,
            self._no_answer_comes_too_early,
            self._no_run_comes_too_late,
            self._errors_are_known,
            self._tokens_rise,
            self._effects_are_of_runs,
            self._no_lease_is_cut_short,
            self._policy_is_kept,
            self._nothing_is_parked,
            self._doubt_has_a_reason,
        )
        problems = tuple((kind, self._sentence(what)) for rule in rules for kind, what in rule())
        shop, order, task = self._rows.key
        return Judged(
            shop=shop,
            order=order,
            task=task,
            messages=len({row.message for row in self._rows.published}),
            deliveries=len(self._rows.answered),
            put_back=sum(row.error in PUT_BACK_ERRORS for row in self._rows.answered),
            effects=len(self._rows.effects),
            sent=len(self._rows.sent),
            takeovers=sum(row.taken_over for row in self._rows.started),
            killed=sum(self._was_killed(row) for row in self._rows.started),
            state=self._state,
            outcome=self._outcome,
            explained=tuple(self._explained),
            problems=problems,
        )

    def _is_not_lost(self) -> Iterator[tuple[str, str]]:
        if self._rows.published and self._state not in ENDED:
            record = "there is no record" if self._state is None else f"its record is {self._state!r}"
            yield "lost", f"was published at {self._at(self._rows.published[0].at)}, and at the end {record}"

    def _every_message_is_answered(self) -> Iterator[tuple[str, str]]:
        answers: dict[str, list[Answered]] = defaultdict(list)
        for row in self._rows.answered:
            answers[row.message].append(row)
        for message in self._rows.published:
            found = answers[message.message]
            if not any(row.outcome is not None or row.error in FINAL_ERRORS for row in found):
                last = (
                    f"last ended in {found[-1].error} at {self._at(found[-1].at)}" if found else "was never delivered"
                )
                yield "lost", f"message {message.message}, published at {self._at(message.at)}, {last}"

    def _effects_are_not_repeated(self) -> Iterator[tuple[str, str]]:
        """Go by the fencing tokens: a run that was paused may have its effect after the one that took over from it."""
        by_token = sorted(self._rows.effects, key=lambda row: (row.fencing_token, row.at))
        for first, second in pairwise(by_token):
            faults = self._why_repeated(first) if first.fencing_token < second.fencing_token else ()
            if faults and first.task in ("charge", "ship"):
                self._explained.append(Explained(first, faults, second))
                continue
            yield (
                "duplicated",
                f"had its effect {self._of(first)} and again {self._of(second)}, {_NOT_TWICE[first.task]}",
            )

    def _a_step_has_one_outcome(self) -> Iterator[tuple[str, str]]:
        """Whoever was given one, was given the one that is recorded."""
        given: dict[str, Stepped] = {}
        for row in self._rows.stepped:
            first = given.setdefault(row.step, row)
            if row.value != first.value:
                yield "duplicated", f"was given {first.value!r} and then {row.value!r} for step {row.step!r}"

    def _what_is_recorded_is_sent(self) -> Iterator[tuple[str, str]]:
        """Once at least and always by one id; and nothing else is."""
        if self._rows.key[2] in ("post", "ship") and self._state == "completed" and not self._rows.sent:
            yield "lost", "is completed, and its message was never sent"
        if self._rows.sent and self._state != "completed":
            yield "unexpected", f"had a message sent, and its record is {self._state!r}"
        if len({row.id for row in self._rows.sent}) > 1:
            yield "duplicated", f"had messages sent with {len({row.id for row in self._rows.sent})} ids"

    def _why_repeated(self, effect: Effect) -> tuple[Fault, ...]:
        started = next((row for row in self._rows.started if _is_of(effect, row)), None)
        later = [row for row in self._rows.started if row.fencing_token > effect.fencing_token]
        if started is None or not later:
            return ()
        answer = next((row for row in self._rows.answered if row.pid == started.pid and row.at >= effect.at), None)
        run = Run(
            started=started,
            effect=effect,
            answered_at=answer.at if answer else None,
            was_put_back=answer is not None and answer.error in PUT_BACK_ERRORS,
        )
        return explain(run, min(later, key=lambda row: row.fencing_token), self._faults, self._lease)

    def _was_killed(self, run: Started) -> bool:
        token = TOKEN.search(self._outcome or "")
        if token is not None and int(token[1]) == run.fencing_token:
            return False
        if any(row.pid == run.pid and row.at >= run.at for row in self._rows.answered):
            return False
        return any(fault.kind in KILLS and run.pid in fault.pids and fault.until >= run.at for fault in self._faults)

    def _was_published(self) -> Iterator[tuple[str, str]]:
        if not self._rows.published:
            told: list[Started | Effect | Answered] = [*self._rows.started, *self._rows.effects, *self._rows.answered]
            when = f"at {self._at(min(row.at for row in told))}" if told else "in the records"
            yield "unexpected", f"was never published, and was seen {when}"
            return
        messages = {row.message for row in self._rows.published}
        for row in self._rows.answered:
            if row.message not in messages:
                yield "unexpected", f"message {row.message} was never published, and answered at {self._at(row.at)}"

    def _has_one_record(self) -> Iterator[tuple[str, str]]:
        if len(self._rows.kept) > 1:
            yield "unexpected", f"has {len(self._rows.kept)} records"

    def _outcome_is_one(self) -> Iterator[tuple[str, str]]:
        """Every answer gave the recorded one, so that no two differ either."""
        if self._state == "completed" and self._outcome is None:
            yield "unexpected", "is completed, and its record has no outcome"
        for row in self._rows.answered:
            if row.outcome is None:
                continue
            if self._state != "completed":
                state = "not there" if self._state is None else repr(self._state)
                yield (
                    "unexpected",
                    f"was answered with {row.outcome!r} at {self._at(row.at)}, and its record is {state}",
                )
            elif row.outcome != self._outcome:
                recorded = f"and recorded is {self._outcome!r}"
                yield "unexpected", f"was answered with {row.outcome!r} at {self._at(row.at)}, {recorded}"

    def _outcome_has_an_effect(self) -> Iterator[tuple[str, str]]:
        if self._state != "completed":
            for row in self._rows.effects if self._rows.key[2] == "post" else ():
                yield "unexpected", f"has a row {self._of(row)}, and its record is {self._state!r}"
            return
        token = TOKEN.search(self._outcome or "")
        if not self._rows.effects:
            yield "unexpected", f"has the outcome {self._outcome!r}, and never had an effect"
        elif self._rows.key[2] == "ship":
            return  # its effect is that of a step, which an earlier run may have recorded
        elif token and int(token[1]) not in {row.fencing_token for row in self._rows.effects}:
            yield "unexpected", f"has the outcome {self._outcome!r}, and no effect under that fencing token"

    def _no_answer_comes_too_early(self) -> Iterator[tuple[str, str]]:
        for row in self._rows.answered:
            if row.outcome is not None and not any(effect.at <= row.at for effect in self._rows.effects):
                yield "unexpected", f"was answered with {row.outcome!r} at {self._at(row.at)}, before it had any effect"

    def _no_run_comes_too_late(self) -> Iterator[tuple[str, str]]:
        """Nothing is granted once there is an outcome; what was granted before is judged by `_tokens_rise`."""
        given = next((row for row in self._rows.answered if row.outcome is not None), None)
        if given is None:
            return
        before = max((row.fencing_token for row in self._rows.started if row.at <= given.at), default=0)
        for row in self._rows.started:
            if row.at > given.at and row.fencing_token >= before:
                answered = f"had been answered with its outcome at {self._at(given.at)}"
                yield "unexpected", f"began {self._of(row)}, and {answered}"

    def _errors_are_known(self) -> Iterator[tuple[str, str]]:
        for row in self._rows.answered:
            if row.error is not None and row.error not in FINAL_ERRORS | PUT_BACK_ERRORS:
                yield "unexpected", f"a delivery in process {row.pid} ended in {row.error} at {self._at(row.at)}"

    def _tokens_rise(self) -> Iterator[tuple[str, str]]:
        """From one run to the next; one that was held up before it began may begin after the one that took over."""
        for row in self._rows.started:
            if row.fencing_token < 1:
                yield "unexpected", f"began {self._of(row)}, without protection"
        latest: Started | None = None
        tokens: set[int] = set()
        for row in self._rows.started:
            if latest is None or row.fencing_token > latest.fencing_token:
                latest = row
            elif row.task == "post" and (row.pid, row.fencing_token) == (latest.pid, latest.fencing_token):
                pass  # a deadlock rolled all of it back, and it runs again under its claim
            elif row.fencing_token in tokens or not was_held_up(row, self._faults, self._lease):
                yield "unexpected", f"began {self._of(latest)} and then {self._of(row)}: its fencing tokens do not rise"
            tokens.add(row.fencing_token)
        highest = max((row.fencing_token for row in self._rows.started), default=0)
        if self._kept is not None and self._state is not None and self._kept.fencing_token < highest:
            yield "unexpected", f"ran under {highest}, and its record has the fencing token {self._kept.fencing_token}"

    def _effects_are_of_runs(self) -> Iterator[tuple[str, str]]:
        for effect in self._rows.effects:
            if not any(_is_of(effect, row) for row in self._rows.started):
                yield "unexpected", f"had its effect {self._of(effect)}, in a run that never began"

    def _no_lease_is_cut_short(self) -> Iterator[tuple[str, str]]:
        """A claim stands for a lease from its grant on; half of that is left for the way from grant to start."""
        by_token = sorted(self._rows.started, key=lambda row: row.fencing_token)
        for first, second in pairwise(by_token):
            early = second.at - first.at < self._lease / 2
            if second.taken_over and early and not was_held_up(first, self._faults, self._lease):
                yield (
                    "unexpected",
                    f"began {self._of(first)}, and was taken over {self._of(second)} while its lease lived",
                )

    def _policy_is_kept(self) -> Iterator[tuple[str, str]]:
        if self._rows.key[2] != "pay":
            if self._state == "in_doubt":
                yield "unexpected", "is in doubt, though it runs again after a crash"
            return
        for row in self._rows.started[1:]:
            yield "unexpected", f"began again {self._of(row)}, though it is held after a crash"

    def _nothing_is_parked(self) -> Iterator[tuple[str, str]]:
        """No handler here fails, and no number of crashes is too many (`max_crashes=None`)."""
        if self._state == "parked":
            yield "unexpected", "is parked, and nothing here is parked"
        for row in self._rows.answered:
            if row.error == "ParkedError":
                yield "unexpected", f"was answered with ParkedError at {self._at(row.at)}, and nothing here is parked"

    def _doubt_has_a_reason(self) -> Iterator[tuple[str, str]]:
        """A run that began, and whose process nothing had struck, was put in doubt while its lease should have lived.

        Where none began, a claim was struck before its run: nobody wrote down whose, so that anybody's will do.
        """
        doubted = next((row for row in self._rows.answered if row.error == "InDoubtError"), None)
        run = self._rows.started[0] if self._rows.started else None
        if doubted is None:
            return
        if run is None:
            since = min((row.at for row in self._rows.published), default=doubted.at)
            if not any(strikes_claims(fault, doubted.shop, since, doubted.at) for fault in self._faults):
                yield "unexpected", f"never began, and was in doubt at {self._at(doubted.at)} without a fault"
            return
        answer = next((row for row in self._rows.answered if row.pid == run.pid and row.at >= run.at), None)
        answered_at = answer.at if answer else None
        if run.at > doubted.at:
            has_reason = was_held_up(run, self._faults, self._lease)
        else:
            has_reason = may_be_in_doubt(run, answered_at, doubted.at, self._faults, self._lease)
        if not has_reason:
            yield "unexpected", f"began {self._of(run)}, and was in doubt at {self._at(doubted.at)} without a fault"

    def _sentence(self, what: str) -> str:
        shop, order, task = self._rows.key
        return f"Order {order} ({task}, {shop}) {what}"

    def _at(self, time: float) -> str:
        return f"{time - self._began:.3f} s"

    def _of(self, row: Started | Effect) -> str:
        return f"at {self._at(row.at)} (process {row.pid}, fencing token {row.fencing_token})"


_NOT_TWICE = {
    "charge": "and no fault explains it",
    "pay": "though it is held after a crash",
    "post": "though its row is in one transaction with its record",
    "ship": "and no fault explains it",
}


def _is_of(effect: Effect, started: Started) -> bool:
    return (effect.pid, effect.fencing_token) == (started.pid, started.fencing_token)
