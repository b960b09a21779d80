"""The judge of a run of chaos: each class, each broken rule, and laws that hold for any run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, strategies as st

from tests.chaos.history import History
from tests.chaos.made import BEGAN, LEASE, OTHER_SHOP, SHOP, Made, Order
from tests.chaos.verdict import CLASSES, Judged, Verdict, judge


def only(verdict: Verdict) -> Judged:
    [judged] = verdict.orders
    return judged


def order_of(task: str = "charge") -> Order:
    order = Order(Made(), task=task)
    order.publish()
    return order


def verdict_of(order: Order) -> Verdict:
    return judge(order.made.history())


# Classes


def test_once() -> None:
    """An order with duplicates, run once and answered alike, is good and of the class `once`."""
    order = order_of()
    order.publish(0.5, "m2")
    order.answer(0.2, None, message="m2", error="Ignore")
    order.complete(0.1)
    order.answer(0.9, order.outcome(1), message="m2")
    verdict = verdict_of(order)
    assert verdict.good
    assert only(verdict).worst == "once"
    assert only(verdict).outcome == order.outcome(1)
    totals = verdict.totals()
    assert (totals["orders"], totals["messages published"], totals["deliveries"]) == (1, 2, 3)
    assert (totals["deliveries put back"], totals["effects"], totals["outcomes"]) == (1, 1, 1)


def test_an_effect_in_a_step_is_not_that_of_the_outcome() -> None:
    """A run that takes over goes on behind the step that was recorded: its outcome is of another token."""
    order = order_of("ship")
    first = order.start(1.0)
    order.effect(first, 1.1)
    order.step(first, 1.2, "picked")
    order.made.fault("child_killed", 1.3, part=f"{SHOP} worker 0", pids=(first.pid,))
    second = order.start(1.3 + LEASE, taken_over=True)
    order.step(second, 3.4, "picked")
    order.send(3.5)
    order.answer(3.6, order.outcome(2), pid=second.pid)
    order.keep(crashes=1)
    verdict = verdict_of(order)
    assert verdict.good, verdict.problems
    assert verdict.totals()["messages sent"] == 1


@pytest.mark.parametrize("taken_over_at, good", [(6.0, True), (8.0, False)])
def test_a_run_that_was_paused_is_taken_over_while_it_runs(taken_over_at: float, good: bool) -> None:
    """Awake again it renews no more, so the takeover may come long after the pause; not when it has answered."""
    order = order_of()
    first = order.start(1.0)
    order.made.fault("worker_paused", 1.1, 4.0, part=f"{SHOP} worker 0", pids=(first.pid,))
    order.effect(first, 4.1)
    order.answer(7.0, None, pid=first.pid, error="Ignore")
    order.complete(taken_over_at, taken_over=True)
    assert verdict_of(order).good is good


@pytest.mark.parametrize("task", ["charge", "ship"])
def test_a_step_that_could_not_be_recorded_runs_again(task: str) -> None:
    """SQL was away until the lease was over, and the claim was given up then: explained for a step, as no other is."""
    order = order_of(task)
    first = order.start(1.0)
    order.made.fault("black_hole", 1.5, 3.5, part=f"{SHOP} sql")
    order.effect(first, 3.3)
    order.answer(3.6, None, pid=first.pid, error="Ignore")
    order.complete(4.0)
    verdict = verdict_of(order)
    assert verdict.good is (task == "ship"), verdict.problems
    assert len(verdict.explained) == (task == "ship")


def test_a_step_with_two_outcomes() -> None:
    """A run that was given something else for a step than the one before it is found."""
    order = order_of("ship")
    run = order.complete(1.0)
    order.step(run, 1.1, "picked")
    order.step(run, 1.2, "picked again")
    assert only(verdict_of(order)).worst == "duplicated"


@pytest.mark.parametrize("task", ["post", "ship"])
def test_a_message_that_is_never_sent_is_lost(task: str) -> None:
    """The order is completed, and what it published is nowhere."""
    order = order_of(task)
    order.complete(1.0)
    order.made.sent.clear()
    verdict = verdict_of(order)
    assert only(verdict).worst == "lost"
    assert "never sent" in verdict.problems[0]


def test_a_message_that_no_outcome_has() -> None:
    """One that is sent though its run is not recorded is found; and one by two ids."""
    order = order_of("ship")
    order.complete(1.0)
    order.send(2.0)
    assert verdict_of(order).good, "at least once, by the same id"
    order.send(3.0, "id 2")
    assert only(verdict_of(order)).worst == "duplicated"
    order = order_of("pay")
    order.in_doubt(1.0)
    order.send(2.0)
    assert "a message sent, and its record is 'in_doubt'" in verdict_of(order).problems[0]


def test_recovered() -> None:
    """An order whose process was killed before its effect, and that another took over, is recovered."""
    order = order_of()
    order.killed(1.0, effect=False)
    verdict = verdict_of(order)
    assert verdict.good, verdict.problems
    assert only(verdict).classes == ("recovered",)
    assert (verdict.totals()["takeovers"], verdict.totals()["explained repeats"]) == (1, 0)


@pytest.mark.parametrize(
    "tell,kind",
    [
        (lambda order: order.killed(1.0), "child_killed"),
        (lambda order: order.killed(1.0, "worker_killed"), "worker_killed"),
        (lambda order: order.paused(1.0), "worker_paused"),
        (lambda order: order.paused(1.0, effect_before=False), "worker_paused"),
        (lambda order: order.cut_off(1.0), "sql_restarted and markers_flushed"),
        (lambda order: order.cut_off(1.0, "black_hole", 2.5), "sql_restarted and black_hole"),
        (lambda order: order.unrenewed(1.0), "black_hole"),
    ],
    ids=["child killed", "worker killed", "paused after", "paused before", "marker lost", "not kept", "not renewed"],
)
def test_explained_repeat(tell: Callable[[Order], None], kind: str) -> None:
    """A charge repeated in a documented window is good, and kept with its faults; without any one of them it is not."""
    order = order_of()
    tell(order)
    history = order.made.history()
    verdict = judge(history)
    assert verdict.good, verdict.problems
    assert only(verdict).worst == "recovered"
    [repeat] = verdict.explained
    assert repeat.kind == kind
    assert repeat.faults == history.faults
    assert verdict.totals()[f"explained repeats: {kind}"] == 1
    for fault in history.faults:
        rest = tuple(other for other in history.faults if other is not fault)
        assert only(judge(replace(history, faults=rest))).worst == "duplicated"


def test_in_doubt() -> None:
    """A payment in doubt is good, and somebody has to look."""
    order = order_of("pay")
    order.in_doubt(1.0)
    verdict = verdict_of(order)
    assert verdict.good, verdict.problems
    assert only(verdict).classes == ("in doubt",)
    assert (verdict.totals()["in doubt"], verdict.totals()["killed in mid-run"]) == (1, 1)


def posted(*, taken_over: bool) -> Order:
    """A sale whose first process was killed before its commit, or not: only the last one's row is there."""
    order = order_of("post")
    if taken_over:
        run = order.start(1.0)
        order.made.fault("child_killed", 1.3, part="worker 0", pids=(run.pid,))
    order.complete(1.3 + LEASE, taken_over=taken_over)
    return order


@pytest.mark.parametrize("taken_over", [False, True])
def test_a_row_for_each_sale(taken_over: bool) -> None:
    """A sale has one row whatever happened to those who tried; a second row is duplicated whatever explains it."""
    order = posted(taken_over=taken_over)
    assert verdict_of(order).good, verdict_of(order).problems
    order.effect(order.made.started[0], 1.1)
    if not taken_over:
        assert "again" in verdict_of(order).problems[0]
        return
    assert only(verdict_of(order)).worst == "duplicated"
    assert "in one transaction with its record" in verdict_of(order).problems[0]


def test_a_row_without_a_record() -> None:
    """A row of a sale that is not recorded as completed is found: one was committed without the other."""
    order = order_of("post")
    run = order.start(1.0)
    order.effect(run, 1.1)
    order.keep("running")
    assert any("has a row" in problem for problem in verdict_of(order).problems)


def test_a_record_without_a_row() -> None:
    """A sale that is recorded, and whose row is not there, is found."""
    order = posted(taken_over=False)
    order.made.effects.clear()
    assert any("never had an effect" in problem for problem in verdict_of(order).problems)


def test_a_sale_that_a_deadlock_rolled_back() -> None:
    """It runs again in the same process and under the same token: nothing of the first run is left."""
    order = posted(taken_over=False)
    first = order.made.started[0]
    order.made.started.insert(0, replace(first, at=first.at - 0.1))
    assert verdict_of(order).good, verdict_of(order).problems
    order.made.started[0] = replace(first, at=first.at - 0.1, pid=first.pid + 1)
    assert "its fencing tokens do not rise" in verdict_of(order).problems[0]


def test_parked() -> None:
    """A parked charge is found: no handler here fails, and no number of crashes is too many."""
    order = order_of()
    order.answer(9.0, None, error="ParkedError")
    order.keep("parked", 1)
    verdict = verdict_of(order)
    assert only(verdict).classes == ("unexpected", "parked")
    assert sum("nothing here is parked" in problem for problem in verdict.problems) == 2


def test_told_that_a_completed_one_is_parked() -> None:
    """A duplicate that was told of a parked charge is found, though that charge is completed."""
    order = order_of()
    order.complete(1.0)
    order.publish(4.0, "m2")
    order.answer(5.0, None, error="ParkedError", message="m2")
    [problem] = verdict_of(order).problems
    assert "was answered with ParkedError at 5.000 s" in problem


def test_paused_payment() -> None:
    """A payment that was put in doubt, and whose process woke up and finished, is completed and good."""
    order = order_of("pay")
    run = order.start(1.0)
    order.made.fault("worker_paused", 1.1, 4.0, part="worker 0", pids=(run.pid,))
    order.publish(2.0, "m2")
    order.answer(3.2, None, message="m2", error="InDoubtError")
    order.effect(run, 4.1)
    order.answer(4.2, order.outcome(1), pid=run.pid)
    order.keep()
    verdict = verdict_of(order)
    assert verdict.good, verdict.problems
    assert only(verdict).worst == "once"


def test_paused_before_it_began() -> None:
    """A charge paused between its claim and its handler begins after the one that took over, and is explained."""
    order = order_of()
    order.complete(3.0, taken_over=True)
    order.made.started[0] = replace(order.made.started[0], fencing_token=2)
    order.made.effects[0] = replace(order.made.effects[0], fencing_token=2)
    order.made.kept[0] = replace(order.made.kept[0], outcome=order.outcome(2), fencing_token=2)
    order.made.answered[0] = replace(order.made.answered[0], outcome=order.outcome(2))
    late = order.start(3.6, token=1)
    order.effect(late, 3.7)
    order.answer(3.8, order.outcome(2), pid=late.pid)
    order.made.fault("worker_paused", 0.5, 3.55, part="worker 0", pids=(late.pid,))
    assert verdict_of(order).good, verdict_of(order).problems
    order.made.faults.clear()
    assert {kind for kind, _ in only(verdict_of(order)).problems} == {"duplicated", "unexpected"}


def test_answer_of_a_claim_came_late() -> None:
    """A charge whose claim was answered late, and that was taken over soon after it began, had its whole lease."""
    order = order_of()
    lease_cut_short(order)
    order.made.fault("black_hole", 0.0, 0.9, part="sql")
    assert verdict_of(order).good, verdict_of(order).problems


def test_given_up() -> None:
    """A charge whose first run was given up before its effect runs again at once, and is good."""
    order = order_of()
    run = order.start(1.0)
    order.answer(1.1, None, pid=run.pid, error="Reject")
    order.complete(1.2)
    verdict = verdict_of(order)
    assert verdict.good, verdict.problems
    assert only(verdict).worst == "once"


def test_same_number_elsewhere() -> None:
    """The same order number in another shop, or for another task, is another order."""
    made = Made()
    for task, shop in (("charge", SHOP), ("pay", SHOP), ("charge", OTHER_SHOP)):
        order = Order(made, "1", task, shop)
        order.publish()
        order.complete(1.0)
    verdict = judge(made.history())
    assert verdict.good
    assert verdict.totals()["orders"] == 3
    assert verdict.totals(OTHER_SHOP)["orders"] == 1
    assert verdict.shops == (SHOP, OTHER_SHOP)


def test_nothing() -> None:
    """A run in which nothing happened is good."""
    assert judge(Made().history()).good


def test_lease_is_asked_for() -> None:
    """A history that does not say how long a lease was is not judged."""
    with pytest.raises(ValueError, match="lease"):
        judge(Made().history(lease=0.0))


# Broken rules


def no_record(order: Order) -> None:
    order.complete(1.0)
    order.made.kept.clear()


def no_state(order: Order) -> None:
    order.complete(1.0)
    order.made.kept.clear()
    order.keep(None)


def still_running(order: Order) -> None:
    order.start(1.0)
    order.answer(2.0, None, error="InDoubtError")
    order.keep("running")


def released(order: Order) -> None:
    order.answer(2.0, None, error="InDoubtError")
    order.keep("released", 1)


def message_never_delivered(order: Order) -> None:
    order.complete(1.0)
    order.publish(1.0, "m2")


def message_put_back_for_ever(order: Order) -> None:
    order.complete(1.0)
    order.publish(1.0, "m2")
    order.answer(1.1, None, message="m2", error="Ignore")


def second_run_without_fault(order: Order) -> None:
    order.killed(1.0)
    order.made.faults.clear()


def other_process_killed(order: Order) -> None:
    order.killed(1.0)
    order.made.faults[0] = replace(order.made.faults[0], pids=(99,))


def killed_before_it_began(order: Order) -> None:
    order.killed(1.0)
    order.made.faults[0] = replace(order.made.faults[0], at=BEGAN + 0.1, until=BEGAN + 0.1)


def killed_after_the_repeat(order: Order) -> None:
    order.killed(1.0)
    order.made.faults[0] = replace(order.made.faults[0], at=BEGAN + 9.0, until=BEGAN + 9.0)


def killed_after_it_answered(order: Order) -> None:
    order.killed(1.0)
    order.answer(1.25, None, pid=order.made.started[0].pid, error="Ignore")


def claim_was_not_taken_over(order: Order) -> None:
    order.killed(1.0)
    order.made.started[1] = replace(order.made.started[1], taken_over=False)


def paused_too_short(order: Order) -> None:
    order.paused(1.0)
    fault = order.made.faults[0]
    order.made.faults[0] = replace(fault, until=fault.at + LEASE / 2 - 0.1)


def paused_too_short_and_taken_over_soon(order: Order) -> None:
    run = order.start(1.0)
    order.effect(run, 1.05)
    order.made.fault("worker_paused", 1.1, 1.1 + LEASE / 2 - 0.2, part="worker 0", pids=(run.pid,))
    order.complete(1.2 + LEASE / 2, taken_over=True)


def paused_just_before_the_repeat(order: Order) -> None:
    run = order.start(1.0)
    order.effect(run, 1.05)
    order.made.fault("worker_paused", 3.5, 7.0, part="worker 0", pids=(run.pid,))
    order.complete(3.6, taken_over=True)


def paused_long_before(order: Order) -> None:
    order.paused(9.0)
    fault = order.made.faults[0]
    order.made.faults[0] = replace(fault, at=fault.at - 7, until=fault.until - 7)


def paused_after_it_answered(order: Order) -> None:
    order.paused(1.0)
    order.answer(1.07, None, pid=order.made.started[0].pid, error="Ignore")


def paused_long_ago_and_awake(order: Order) -> None:
    order.complete(1.0)
    order.made.kept.clear()
    order.made.answered.clear()
    order.made.fault("worker_paused", 1.1, 4.0, part="worker 0", pids=(order.made.started[0].pid,))
    order.complete(8.0, taken_over=True)


def sql_away_and_marker_there(order: Order) -> None:
    order.cut_off(1.0)
    del order.made.faults[1]


def sql_black_hole_and_marker_there(order: Order) -> None:
    sql_away_and_marker_there(order)
    order.made.faults[0] = replace(order.made.faults[0], kind="black_hole")


def sql_away_after_it_was_put_back(order: Order) -> None:
    order.cut_off(1.0)
    order.made.answered[0] = replace(order.made.answered[0], at=BEGAN + 1.25)
    order.made.faults[0] = replace(order.made.faults[0], at=BEGAN + 1.3)


def sql_away_and_not_put_back(order: Order) -> None:
    order.cut_off(1.0)
    order.made.answered[0] = replace(order.made.answered[0], error="KeyError")


def marker_away_after_it_was_kept(order: Order) -> None:
    order.cut_off(1.0)
    flushed = order.made.faults[1]
    order.made.faults[1] = replace(flushed, kind="black_hole", at=BEGAN + 3.2, until=BEGAN + 3.9)


def marker_away_before_sql(order: Order) -> None:
    order.cut_off(1.0)
    order.made.faults[1] = replace(order.made.faults[1], kind="black_hole", at=BEGAN + 0.2, until=BEGAN + 1.0)


def marker_lost_before_it_was_kept(order: Order) -> None:
    order.cut_off(1.0)
    flushed = order.made.faults[1]
    order.made.faults[1] = replace(flushed, at=BEGAN + 1.3, until=BEGAN + 1.3)


def marker_lost_after_the_repeat(order: Order) -> None:
    order.cut_off(1.0)
    order.made.faults[1] = replace(order.made.faults[1], at=BEGAN + 9.0, until=BEGAN + 9.0)


def marker_lost_and_sql_back_soon(order: Order) -> None:
    order.cut_off(1.0)
    order.made.faults[0] = replace(order.made.faults[0], until=BEGAN + 1.1 + LEASE / 2 - 0.1)


def sql_cut_for_a_moment(order: Order) -> None:
    order.cut_off(1.0)
    fault = order.made.faults[0]
    order.made.faults[0] = replace(fault, kind="connections_cut", until=fault.at)


def sql_of_the_other_shop(order: Order) -> None:
    order.cut_off(1.0)
    order.made.faults[0] = replace(order.made.faults[0], target=f"{OTHER_SHOP} sql")


def markers_of_the_other_shop(order: Order) -> None:
    order.cut_off(1.0)
    order.made.faults[1] = replace(order.made.faults[1], target=f"{OTHER_SHOP} markers")


def broker_away(order: Order) -> None:
    order.unrenewed(1.0)
    order.made.faults[0] = replace(order.made.faults[0], target=f"{SHOP} broker")


def taken_over_while_sql_was_away(order: Order) -> None:
    order.unrenewed(1.0)
    order.made.faults[0] = replace(order.made.faults[0], until=BEGAN + 8.0)


def sql_back_long_ago(order: Order) -> None:
    order.cut_off(1.0)
    made = order.made
    made.started[-1] = replace(made.started[-1], at=made.started[-1].at + 40.0)
    made.effects[-1] = replace(made.effects[-1], at=made.effects[-1].at + 40.0)
    made.answered[-1] = replace(made.answered[-1], at=made.answered[-1].at + 40.0)


def effect_twice_in_one_run(order: Order) -> None:
    run = order.complete(1.0)
    order.effect(run, 1.3)
    order.made.fault("child_killed", 1.5, part="worker 0", pids=(run.pid,))


def effect_twice_before_it_was_killed(order: Order) -> None:
    order.killed(1.0)
    order.effect(order.made.started[0], 1.25)


def never_published(order: Order) -> None:
    order.complete(1.0)
    order.made.published.clear()


def record_of_nothing(order: Order) -> None:
    order.made.published.clear()
    order.keep("in_doubt" if order.key["task"] == "pay" else "parked", 1)


def unknown_message(order: Order) -> None:
    order.complete(1.0)
    order.answer(1.9, order.outcome(1), message="m9")


def two_records(order: Order) -> None:
    order.complete(1.0)
    order.keep()


def completed_without_outcome(order: Order) -> None:
    order.complete(1.0)
    order.made.answered.clear()
    order.answer(1.9, None, error="ParkedError")
    order.made.kept[0] = replace(order.made.kept[0], outcome=None)


def other_outcome_recorded(order: Order) -> None:
    order.complete(1.0)
    order.made.kept[0] = replace(order.made.kept[0], outcome=f"{order.outcome(1)}ef")


def two_outcomes_answered(order: Order) -> None:
    order.complete(1.0)
    order.answer(1.9, f"{order.outcome(1)}ef")


def answered_and_not_completed(order: Order) -> None:
    order.complete(1.0)
    order.made.kept.clear()
    order.keep("failed")


def outcome_without_effect(order: Order) -> None:
    order.complete(1.0)
    order.made.effects.clear()


def outcome_of_another_run(order: Order) -> None:
    order.complete(1.0)
    order.made.kept[0] = replace(order.made.kept[0], outcome=order.outcome(5), fencing_token=5)
    order.made.answered[0] = replace(order.made.answered[0], outcome=order.outcome(5))


def answered_too_early(order: Order) -> None:
    order.complete(1.0)
    order.answer(1.1, order.outcome(1))


def began_after_the_answer(order: Order) -> None:
    order.complete(1.0)
    order.made.kept.clear()
    order.start(5.0, taken_over=True)
    order.keep(token=1)
    order.made.kept[0] = replace(order.made.kept[0], fencing_token=2)


def began_after_the_answer_and_a_pause(order: Order) -> None:
    began_after_the_answer(order)
    order.made.fault("worker_paused", 2.0, 4.9, part="worker 0", pids=(order.made.started[1].pid,))


def strange_error(order: Order) -> None:
    order.complete(1.0)
    order.answer(1.9, None, error="KeyError")


def same_token_twice(order: Order) -> None:
    order.complete(1.0)
    order.start(1.05, token=1)


def token_falls(order: Order) -> None:
    order.start(1.0, token=2)
    order.complete(5.0, taken_over=True)
    rows = order.made
    rows.started[1] = replace(rows.started[1], fencing_token=1)
    rows.effects[0] = replace(rows.effects[0], fencing_token=1)
    rows.answered[0] = replace(rows.answered[0], outcome=order.outcome(1))
    rows.kept[0] = replace(rows.kept[0], outcome=order.outcome(1))


def tokens_fall_after_one_held_up(order: Order) -> None:
    late, last = order.start(1.0, token=1), order.start(1.1, token=2)
    order.complete(0.5, taken_over=True)
    order.made.fault("worker_paused", 0.0, 0.9, part="worker 0", pids=(late.pid,))
    assert last.fencing_token == 2


def token_twice_after_one_held_up(order: Order) -> None:
    late = order.start(5.0, token=1)
    order.made.started.append(replace(late, at=late.at + 0.1))
    order.complete(4.0, taken_over=True)
    order.made.fault("worker_paused", 0.0, 4.9, part="worker 0", pids=(late.pid,))


def record_under_an_older_token(order: Order) -> None:
    order.killed(1.0, effect=False)
    order.made.kept[0] = replace(order.made.kept[0], fencing_token=1)


def without_protection(order: Order) -> None:
    order.token = -1
    order.complete(1.0)


def effect_of_no_run(order: Order) -> None:
    order.complete(1.0)
    order.made.started[0] = replace(order.made.started[0], pid=1)


def lease_cut_short(order: Order) -> None:
    order.start(1.0)
    order.made.fault("child_killed", 1.1, part="worker 0", pids=(order.made.started[0].pid,))
    order.complete(1.0 + LEASE / 2 - 0.1, taken_over=True)


def lease_cut_short_and_another_paused(order: Order) -> None:
    lease_cut_short(order)
    order.made.fault("worker_paused", 0.5, 0.9, part="worker 0", pids=(99,))


def charge_in_doubt(order: Order) -> None:
    order.in_doubt(1.0)


def payment_ran_again(order: Order) -> None:
    order.killed(1.0, effect=False)


def payment_had_two_effects(order: Order) -> None:
    order.killed(1.0)


def doubted_without_fault(order: Order) -> None:
    order.in_doubt(1.0)
    order.made.faults.clear()


def doubted_though_another_was_killed(order: Order) -> None:
    order.in_doubt(1.0)
    order.made.faults[0] = replace(order.made.faults[0], pids=(99,))


def doubted_before_it_was_killed(order: Order) -> None:
    order.in_doubt(1.0)
    order.made.faults[0] = replace(order.made.faults[0], at=BEGAN + 5.0, until=BEGAN + 5.0)


def doubted_though_it_answered(order: Order) -> None:
    order.in_doubt(1.0)
    order.answer(1.25, None, pid=order.made.started[0].pid, error="Ignore")


def doubted_after_a_short_pause(order: Order) -> None:
    order.in_doubt(1.0)
    order.made.faults.clear()
    order.made.fault("worker_paused", 1.3, 2.2, part="worker 0", pids=(order.made.started[0].pid,))


def doubted_and_sql_away_elsewhere(order: Order) -> None:
    order.in_doubt(1.0)
    order.made.faults.clear()
    order.made.fault("sql_restarted", 1.3, 3.5, part=f"{OTHER_SHOP} sql")


def doubted_before_it_began(order: Order) -> None:
    order.in_doubt(1.0)
    order.made.faults.clear()
    order.made.started[0] = replace(order.made.started[0], at=BEGAN + 6.0)


DOUBTED = [
    doubted_without_fault,
    doubted_though_another_was_killed,
    doubted_before_it_was_killed,
    doubted_though_it_answered,
    doubted_after_a_short_pause,
    doubted_and_sql_away_elsewhere,
    doubted_before_it_began,
]

BROKEN_CHARGES: dict[str, list[Callable[[Order], None]]] = {
    "lost": [
        no_record,
        no_state,
        still_running,
        released,
        message_never_delivered,
        message_put_back_for_ever,
    ],
    "duplicated": [
        second_run_without_fault,
        other_process_killed,
        killed_before_it_began,
        killed_after_the_repeat,
        killed_after_it_answered,
        claim_was_not_taken_over,
        paused_too_short,
        paused_too_short_and_taken_over_soon,
        paused_just_before_the_repeat,
        paused_long_before,
        paused_after_it_answered,
        paused_long_ago_and_awake,
        sql_away_and_marker_there,
        sql_black_hole_and_marker_there,
        sql_away_after_it_was_put_back,
        sql_away_and_not_put_back,
        marker_away_after_it_was_kept,
        marker_away_before_sql,
        marker_lost_before_it_was_kept,
        marker_lost_after_the_repeat,
        marker_lost_and_sql_back_soon,
        sql_cut_for_a_moment,
        sql_of_the_other_shop,
        markers_of_the_other_shop,
        broker_away,
        taken_over_while_sql_was_away,
        sql_back_long_ago,
        effect_twice_in_one_run,
        effect_twice_before_it_was_killed,
    ],
    "unexpected": [
        never_published,
        record_of_nothing,
        unknown_message,
        two_records,
        completed_without_outcome,
        other_outcome_recorded,
        two_outcomes_answered,
        answered_and_not_completed,
        outcome_without_effect,
        outcome_of_another_run,
        answered_too_early,
        began_after_the_answer,
        began_after_the_answer_and_a_pause,
        strange_error,
        same_token_twice,
        token_falls,
        tokens_fall_after_one_held_up,
        token_twice_after_one_held_up,
        record_under_an_older_token,
        without_protection,
        effect_of_no_run,
        lease_cut_short,
        lease_cut_short_and_another_paused,
        charge_in_doubt,
    ],
}


@pytest.mark.parametrize(
    "kind,tell",
    [(kind, tell) for kind, tells in BROKEN_CHARGES.items() for tell in tells],
    ids=lambda of: getattr(of, "__name__", of),
)
def test_broken(kind: str, tell: Callable[[Order], None]) -> None:
    """Each broken promise is found, is of its class, and has a sentence that names the order and a time."""
    order = order_of()
    tell(order)
    verdict = verdict_of(order)
    assert not verdict.good
    assert kind in only(verdict).classes
    assert verdict.totals()[kind] == 1
    assert all(problem.startswith(f"Order 1 (charge, {SHOP}) ") for problem in verdict.problems)


@pytest.mark.parametrize("tell", [payment_ran_again, payment_had_two_effects])
def test_broken_payment(tell: Callable[[Order], None]) -> None:
    """A payment that ran again is found, whatever fault there was."""
    order = order_of("pay")
    tell(order)
    expected = "duplicated" if tell is payment_had_two_effects else "unexpected"
    assert only(verdict_of(order)).worst == expected


@pytest.mark.parametrize("tell", DOUBTED)
def test_doubt_without_reason(tell: Callable[[Order], None]) -> None:
    """A payment that was put in doubt though no fault struck its run is found."""
    order = order_of("pay")
    tell(order)
    assert sum("without a fault" in problem for problem in verdict_of(order).problems) == 1


@pytest.mark.parametrize("kind", ["sql_restarted", "black_hole"])
def test_doubt_without_sql(kind: str) -> None:
    """A payment may be put in doubt when SQL was away for longer than its lease."""
    order = order_of("pay")
    order.in_doubt(1.0)
    order.made.faults.clear()
    order.made.fault(kind, 1.3, 3.5, part="sql")
    assert verdict_of(order).good, verdict_of(order).problems


def test_doubt_before_it_began() -> None:
    """A payment paused between its claim and its handler may be in doubt before it begins."""
    order = order_of("pay")
    run = order.start(4.0)
    order.made.fault("worker_paused", 0.5, 3.9, part="worker 0", pids=(run.pid,))
    order.answer(3.0, None, error="InDoubtError")
    order.effect(run, 4.1)
    order.answer(4.2, order.outcome(1), pid=run.pid)
    order.keep()
    assert verdict_of(order).good, verdict_of(order).problems


@pytest.mark.parametrize(
    "kind,part", [("child_killed", "worker 1"), ("worker_paused", "worker 0"), ("connections_cut", "sql")]
)
def test_doubt_of_nobody(kind: str, part: str) -> None:
    """A payment whose claim was struck before any run began may be in doubt."""
    order = order_of("pay")
    order.made.fault(kind, 0.5, part=part, pids=(99,))
    order.answer(3.0, None, error="InDoubtError")
    order.keep("in_doubt", 1)
    assert verdict_of(order).good, verdict_of(order).problems


@pytest.mark.parametrize(
    "kind,at,part",
    [
        ("markers_flushed", 0.5, "markers"),
        ("connections_cut", 0.5, "broker"),
        ("child_killed", -1.0, "worker 1"),
        ("child_killed", 3.5, "worker 1"),
        ("child_killed", 0.5, f"{OTHER_SHOP} worker 1"),
    ],
)
def test_doubt_of_nobody_without_reason(kind: str, at: float, part: str) -> None:
    """Where no run began, a payment is in doubt only after something that could strike a claim, in its shop."""
    order = order_of("pay")
    order.made.fault(kind, at, part=part, pids=(99,))
    order.answer(3.0, None, error="InDoubtError")
    order.keep("in_doubt", 1)
    [problem] = verdict_of(order).problems
    assert "never began, and was in doubt at 3.000 s without a fault" in problem


def test_problem_tells_what_happened() -> None:
    """A problem names the order, the processes and the times."""
    order = order_of()
    second_run_without_fault(order)
    first, second = order.made.started
    [problem] = verdict_of(order).problems
    assert problem == (
        f"Order 1 (charge, {SHOP}) had its effect at 1.200 s (process {first.pid}, fencing token 1)"
        f" and again at 3.500 s (process {second.pid}, fencing token 2), and no fault explains it"
    )


@pytest.mark.parametrize(
    "tell", [same_token_twice, token_falls, tokens_fall_after_one_held_up, token_twice_after_one_held_up]
)
def test_tokens_that_do_not_rise(tell: Callable[[Order], None]) -> None:
    """A fencing token that falls or comes twice is told as such, also behind a run that was held up."""
    order = order_of()
    tell(order)
    assert sum("fencing tokens do not rise" in problem for problem in verdict_of(order).problems) == 1


def test_answer_before_the_run() -> None:
    """A process that put a duplicate back, then ran the charge and was killed, explains the repeat all the same."""
    order = order_of()
    order.killed(1.0)
    order.publish(0.4, "m2")
    order.answer(0.5, None, pid=order.made.started[0].pid, message="m2", error="Ignore")
    order.answer(5.0, order.outcome(2), message="m2")
    assert verdict_of(order).good, verdict_of(order).problems


def test_left_in_queue() -> None:
    """A message that is still in a queue is a broken promise, though no order is known to be lost by it."""
    order = order_of()
    order.complete(1.0)
    order.made.left[SHOP] = 2
    verdict = verdict_of(order)
    assert verdict.problems == (f"2 messages of {SHOP} were still in its queue at the end",)
    assert (verdict.totals()["left in queues"], verdict.totals(OTHER_SHOP)["left in queues"]) == (2, 0)


# Laws


def void(_: object) -> None:
    """Let go of what a call returns."""


SURVIVED: dict[str, tuple[Callable[[Order, float], None], ...]] = {
    "charge": (
        lambda order, at: void(order.complete(at)),
        lambda order, at: order.killed(at),
        lambda order, at: order.killed(at, effect=False),
        lambda order, at: order.paused(at),
        lambda order, at: order.paused(at, effect_before=False),
        lambda order, at: order.cut_off(at),
        lambda order, at: order.unrenewed(at),
    ),
    "pay": (
        lambda order, at: void(order.complete(at)),
        lambda order, at: order.in_doubt(at),
    ),
}


@st.composite
def kept_promises(draw: st.DrawFn) -> History:
    """A run in which orders suffered what the documents allow."""
    made = Made()
    for number in range(draw(st.integers(1, 6))):
        task = draw(st.sampled_from(sorted(SURVIVED)))
        order = Order(made, str(number), task, draw(st.sampled_from([SHOP, OTHER_SHOP])))
        order.publish()
        # Far enough from each other that no fault explains what befell another order.
        draw(st.sampled_from(SURVIVED[task]))(order, 1.0 + 100.0 * number)
        for late in range(draw(st.integers(0, 2))):
            order.publish(90.0, f"late {late}")
            [kept] = [row for row in made.kept if (row.shop, row.order) == (order.key["shop"], str(number))]
            error = None if kept.outcome else "InDoubtError"
            order.answer(100.0 * number + 95.0, kept.outcome, message=f"late {late}", error=error)
    return made.history()


@given(kept_promises())
def test_kept_promises(history: History) -> None:
    """Whatever orders suffer of what the documents allow, the run is good, and every order is of one good class."""
    verdict = judge(history)
    assert verdict.good, verdict.problems
    totals = verdict.totals()
    assert totals["orders"] == len({(row.shop, row.order) for row in history.published})
    assert totals["effects"] == len(history.effects)
    assert totals["orders"] == sum(judged.worst in CLASSES[3:] for judged in verdict.orders)
    assert sum(verdict.totals(shop)["effects"] for shop in verdict.shops) == totals["effects"]


@given(kept_promises(), st.randoms(use_true_random=False))
def test_order_of_rows(history: History, chance: object) -> None:
    """The verdict does not depend on the order in which rows are told."""
    shuffled: dict[str, Any] = {}
    for name in ("published", "started", "effects", "answered", "faults", "kept"):
        rows = list(getattr(history, name))
        chance.shuffle(rows)  # type: ignore[attr-defined]
        shuffled[name] = tuple(rows)
    assert judge(replace(history, **shuffled)) == judge(history)


@given(kept_promises(), st.data())
def test_second_payment(history: History, data: st.DataObject) -> None:
    """A second effect of a payment is always found."""
    payments = [row for row in history.effects if row.task == "pay"]
    assume(payments)
    paid = data.draw(st.sampled_from(payments))
    later = data.draw(st.floats(0.0, 50.0))
    token = paid.fencing_token + data.draw(st.integers(0, 3))
    again = replace(paid, at=paid.at + later, fencing_token=token, pid=data.draw(st.sampled_from([paid.pid, 7])))
    verdict = judge(replace(history, effects=(*history.effects, again)))
    assert verdict.totals()["duplicated"] == 1


@given(kept_promises())
def test_no_faults(history: History) -> None:
    """Without the faults every explained repeat is a broken promise."""
    explained = judge(history).totals()["explained repeats"]
    verdict = judge(replace(history, faults=()))
    assert verdict.totals()["duplicated"] == explained
    assert verdict.totals()["explained repeats"] == 0


@given(kept_promises(), st.data())
def test_lost_record(history: History, data: st.DataObject) -> None:
    """A record that is gone is always found."""
    gone = data.draw(st.sampled_from(history.kept))
    kept = tuple(row for row in history.kept if row is not gone)
    assert judge(replace(history, kept=kept)).totals()["lost"] == 1


@given(kept_promises(), st.data())
def test_lost_message(history: History, data: st.DataObject) -> None:
    """A message without an answer is always found."""
    message = data.draw(st.sampled_from(history.published)).message
    answered = tuple(row for row in history.answered if row.message != message)
    assert judge(replace(history, answered=answered)).totals()["lost"] == 1


@given(kept_promises(), st.data())
def test_other_answer(history: History, data: st.DataObject) -> None:
    """A delivery that is answered with another outcome is always found."""
    outcomes = [row for row in history.answered if row.outcome is not None]
    assume(outcomes)
    other = data.draw(st.sampled_from(outcomes))
    answered = tuple(replace(row, outcome=f"{row.outcome}!") if row is other else row for row in history.answered)
    assert judge(replace(history, answered=answered)).totals()["unexpected"] == 1
