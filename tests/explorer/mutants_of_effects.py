"""What is broken on purpose in sessions, steps, messages and doubts. Imports nothing of the library: see mutants.py."""

from __future__ import annotations

from tests.explorer.mutant import Mutant

_MEMORY = "idem_tasks.stores.memory"
_TASK = "idem_tasks.task"
_SESSION = "idem_tasks.session_run"
_STEPS = "idem_tasks.steps"
_OUTBOX = "idem_tasks.outbox"
_ASKING = "idem_tasks.asking"
_POLICY = "idem_tasks.policy"

MUTANTS_OF_EFFECTS = (
    # A session.
    Mutant(
        name="a commit that missed the fence is believed",
        module=_SESSION,
        before="if await transaction.commit(keep_all(call, claim, value)):",
        after="if await transaction.commit(keep_all(call, claim, value)) or True:",
        laws=("RECORDED_BEFORE_ANSWER",),
        scenario="a session and a pause",
    ),
    Mutant(
        name="the outcome is recorded beside the session",
        module=_SESSION,
        before="if claim.is_here and not await runtime.shield(",
        after="if not claim.is_here and not await runtime.shield(",
        laws=("ROWS",),
        scenario="a session",
    ),
    Mutant(
        name="under hold a deadlock runs the handler again",
        module=_SESSION,
        before="        and not call.policy.doubts\n",
        after="",
        laws=("EFFECT_ONCE",),
        scenario="a session, hold, and a conflict",
    ),
    Mutant(
        name="what an undone run published is recorded with the next",
        module=_OUTBOX,
        before="        self._messages.clear()\n        self._numbers = itertools.count()\n",
        after="",
        laws=("RECORDED_MESSAGES",),
        scenario="a session and a conflict",
    ),
    Mutant(
        name="after a conflict nobody renews",
        module=_SESSION,
        before="call.services.heartbeat.hold(claim)",
        after="call.services.heartbeat.let_go(claim.lease.owner)",
        laws=("KEPT_ALIVE",),
        scenario="a session, a conflict, and heartbeats in time",
    ),
    # Steps.
    Mutant(
        name="a recorded step runs again",
        module=_STEPS,
        before="if earlier is not None:\n                return value_of(call, earlier)",
        after="if earlier is None:\n                pass",
        laws=("STEP_ONCE",),
        scenario="steps and a pause",
    ),
    Mutant(
        name="a step whose claim is lost runs",
        module=_STEPS,
        before="""\
            case Lost():
                raise self._lost()
            case StepBegun() | None:""",
        after="""\
            case Lost() | StepBegun() | None:""",
        laws=("STEP_ONCE",),
        scenario="steps and a pause",
    ),
    Mutant(
        name="a handler goes on with what a lost step returned",
        module=_STEPS,
        before="""\
        if isinstance(answer, Lost):
            raise self._lost()
        return answer.outcome""",
        after="""\
        return answer.outcome""",
        laws=("STEP_ONCE",),
        scenario="steps and a pause",
    ),
    Mutant(
        name="a step begins without the fence",
        module=_MEMORY,
        before="if row is None or row.state is not State.RUNNING or not row.obeys(lease.owner, lease.fencing_token):",
        after="if row is None or row.state is not State.RUNNING:",
        laws=("FENCE",),
        scenario="steps and a pause",
    ),
    Mutant(
        name="a step is recorded without the fence",
        module=_MEMORY,
        before="if row is None or row.state not in _FENCED or not row.obeys(lease.owner, lease.fencing_token):",
        after="if row is None or row.state not in _FENCED:",
        laws=("FENCE",),
        scenario="steps and a pause",
    ),
    # Messages.
    Mutant(
        name="messages are sent before their outcome is recorded",
        module=_TASK,
        before="    answer = claim.ending\n    if answer is None and protected:",
        after="""\
    answer = claim.ending
    await send(call, claim.close_outgoing(), recorded=False)
    if answer is None and protected:""",
        laws=("SENT_IF_RECORDED",),
        scenario="messages",
    ),
    Mutant(
        name="an outcome is recorded without its messages",
        module=_MEMORY,
        before="self.outbox.add(outcome.messages)",
        after="pass",
        laws=("ALL_SENT",),
        scenario="messages",
    ),
    Mutant(
        name="an outcome is written through without its messages",
        module=_MEMORY,
        before="self.outbox.add(pending.outcome.messages)",
        after="pass",
        laws=("ALL_SENT",),
        scenario="messages, and SQL goes away",
    ),
    Mutant(
        name="a message that was refused is deleted",
        module=_OUTBOX,
        before="sent=batch.sent, failed=batch.failed, rest=rest",
        after="sent=batch.taken, failed=(), rest=rest",
        laws=("ALL_SENT",),
        scenario="messages, and the broker goes away",
    ),
    # Doubts.
    Mutant(
        name="nobody is asked",
        module=_POLICY,
        before='return self.on_crash != "rerun"',
        after='return self.on_crash == "hold"',
        laws=("ASKED",),
        scenario="a provider is asked",
    ),
    Mutant(
        name="what the provider says is not heard",
        module=_ASKING,
        before="answer=outcome.state.value, crashes=dead.crashes)\n    return outcome",
        after="answer=outcome.state.value, crashes=dead.crashes)\n    return None",
        laws=("ASKED",),
        scenario="a provider is asked",
    ),
    Mutant(
        name="a doubt is decided that has ended",
        module=_MEMORY,
        before="if row.state is not State.IN_DOUBT or not row.obeys(dead.owner, dead.fencing_token):",
        after="if row.state is State.PARKED:",
        laws=("ASKED", "OUTCOME_STANDS"),
        scenario="a provider is asked",
    ),
    Mutant(
        name="a doubt is decided under the dead claim's own fence",
        module=_MEMORY,
        before="""\
                row.owner = request.owner
                row.fencing_token = self._next_token(now)
                row.record_outcome""",
        after="""\
                row.record_outcome""",
        laws=("RECORDED_BEFORE_ANSWER", "ONE_OUTCOME"),
        scenario="a provider is asked",
    ),
)
