"""The protocol, broken on purpose in one place each; the explorer must find out what goes wrong then.

Each mutant is a change of the shipped text, made by an import hook in a process of its own (mutant_run.py), and never
written to a file. To see what one of them breaks, or all: `python -m tests.explorer.mutants [NAME]`.

This module imports nothing of the library: it is read before the hook is in place.
"""

from __future__ import annotations

import sys

from tests.explorer.mutant import Mutant
from tests.explorer.mutants_of_effects import MUTANTS_OF_EFFECTS

_MEMORY = "idem_tasks.stores.memory"
_MARKER = "idem_tasks.stores.memory_marker"
_TIERED = "idem_tasks.stores.tiered"
_CACHED = "idem_tasks.stores.cached"
_LOCAL_CACHE = "idem_tasks.stores.local_cache"
_TASK = "idem_tasks.task"
_RUNTIME = "idem_tasks.runtime"
_HEARTBEAT = "idem_tasks.heartbeat"
_ERRORS = "idem_tasks.errors"

_SUSPENDED = """
            class Between:
                def __await__(self):
                    from idem_tasks.testing.stepped import Step

                    yield Step("database", "the record is between two statements of its claim", "before")

            await Between()
"""
"""What a command looks like that is two: anything can happen here. Without the lock, as between two transactions."""

MUTANTS = (
    Mutant(
        name="finish without the fence",
        module=_MEMORY,
        before="""\
            if row.obeys(lease.owner, lease.fencing_token):
                if row.state in _FENCED:
                    row.record_outcome""",
        after="""\
            if row.state in _FENCED or row.obeys(lease.owner, lease.fencing_token):
                if row.state in _FENCED:
                    row.record_outcome""",
        laws=("FENCE",),
        scenario="a pause",
    ),
    Mutant(
        name="release without the fence",
        module=_MEMORY,
        before="""\
            if not row.obeys(lease.owner, lease.fencing_token):
                return Lost()
            if row.state in _FENCED:""",
        after="""\
            if row.state in _FENCED:""",
        laws=("FENCE",),
        scenario="a pause, and the handler raises",
    ),
    Mutant(
        name="write-through without the fence",
        module=_MEMORY,
        before="if row is None or not row.obeys(pending.owner, pending.fencing_token):",
        after="if row is None:",
        laws=("FENCE", "RECORDED_BEFORE_ANSWER"),
        scenario="SQL goes away, and leases end",
        seed=1,
    ),
    Mutant(
        name="a marker is given back by anybody",
        module=_MARKER,
        before="""\
                case _Running(holder) if holder == owner:
                    del""",
        after="""\
                case _Running():
                    del""",
        laws=("OWN_MARKER",),
        scenario="a pause",
    ),
    Mutant(
        name="a marker is renewed by anybody",
        module=_MARKER,
        before="""\
                    case _Running(owner, _, take) if owner == lease.owner:
                        pass
                    case _:
                        continue""",
        after="""\
                    case _Running(owner, _, take):
                        pass
                    case _:
                        continue""",
        laws=("OWN_MARKER",),
        scenario="heartbeats and lost markers",
        seed=1,
    ),
    Mutant(
        name="an outcome is kept over another's marker",
        module=_MARKER,
        before="""\
                case _:
                    return False
            self._markers[lease.scope, lease.key] = _Pending""",
        after="""\
                case _:
                    pass
            self._markers[lease.scope, lease.key] = _Pending""",
        laws=("OWN_MARKER",),
        scenario="SQL goes away",
    ),
    Mutant(
        name="look-up before claim",
        module=_MEMORY,
        before="""\
            if row is None:
                self._sweep(now)
                row = self._rows""",
        after="""\
            seen = row
        if seen is None:"""
        + _SUSPENDED
        + """\
        with self._lock:
            if seen is None:
                row = self._rows""",
        laws=("EFFECT_EXPLAINED", "OUTCOME_STANDS"),
        scenario="nothing goes wrong but the markers are lost",
    ),
    Mutant(
        name="takeover in two statements",
        module=_MEMORY,
        before="""\
                case State.RUNNING:  # pragma: no branch - there is no other state
                    return self._take_over(row, request, now)
""",
        after="""\
                case State.RUNNING:
                    pass
        if True:"""
        + _SUSPENDED
        + """\
        with self._lock:
            return self._take_over(row, request, now)
""",
        laws=("LEASE_RESPECTED", "ONE_OUTCOME", "OUTCOME_STANDS"),
        scenario="two take over from one",
        seed=1,
    ),
    Mutant(
        name="in progress is not put back",
        module=_ERRORS,
        before="PUT_BACK = (InProgressError, LeaseLostError, StoreError)",
        after="PUT_BACK = (LeaseLostError, StoreError)",
        laws=("KNOWN_ENDINGS",),
        scenario="nothing goes wrong",
    ),
    Mutant(
        name="a lost lease is not put back",
        module=_ERRORS,
        before="PUT_BACK = (InProgressError, LeaseLostError, StoreError)",
        after="PUT_BACK = (InProgressError, StoreError)",
        laws=("KNOWN_ENDINGS",),
        scenario="a pause",
    ),
    Mutant(
        name="a store that is away is not put back",
        module=_ERRORS,
        before="PUT_BACK = (InProgressError, LeaseLostError, StoreError)",
        after="PUT_BACK = (InProgressError, LeaseLostError)",
        laws=("KNOWN_ENDINGS",),
        scenario="SQL goes away",
    ),
    Mutant(
        name="in progress is taken for finished",
        module=_TASK,
        before="raise InProgressError(scope=scope, key=key, retry_after=max(retry_after, 0.0))",
        after="return Finished(EncodedOutcome(), call.request.fingerprint, 1.0)",
        laws=("KNOWN_ENDINGS",),
        scenario="nothing goes wrong",
    ),
    Mutant(
        name="the fencing token is a counter in the row",
        module=_MEMORY,
        before="""\
        row.fencing_token = self._next_token(now)
        row.owner = request.owner""",
        after="""\
        row.fencing_token += 1
        row.owner = request.owner""",
        laws=("RISING_FENCE",),
        scenario="forgotten",
    ),
    Mutant(
        name="our own marker is as good as a claim",
        module=_TIERED,
        before="""\
            case MarkerTaken():  # pragma: no branch - there is no other answer
                return await self._claim_record(replace(request, marked=True))""",
        after="""\
            case MarkerTaken():
                return Granted(Lease(request, fencing_token=1))""",
        laws=("CLAIMED",),
        scenario="nothing goes wrong",
    ),
    Mutant(
        name="while SQL is away the marker decides",
        module=_TIERED,
        before="""\
            answer = await self._record.claim(request)
        except IdemTasksError:
            await self._give_back(request.scope, request.key, request.owner)
            raise""",
        after="""\
            answer = await self._record.claim(request)
        except IdemTasksError:
            return Granted(Lease(request, fencing_token=1))""",
        laws=("CLAIMED",),
        scenario="SQL goes away",
    ),
    Mutant(
        name="published before it is recorded",
        module=_TIERED,
        before="""\
        answer = await self._record.finish(lease, outcome, may_insert=may_insert)
""",
        after="""\
        early = Finished(outcome, lease.request.fingerprint, lease.policy.retention)
        await self._publish(lease.request, early)
        answer = await self._record.finish(lease, outcome, may_insert=may_insert)
""",
        laws=("RECORDED_BEFORE_ANSWER",),
        scenario="nothing goes wrong",
    ),
    Mutant(
        name="published over nothing",
        module=_MARKER,
        before="""\
            match self._standing(place, now):
                case _Running(owner, _, take) if""",
        after="""\
            match self._standing(place, now):
                case None:
                    self._markers[place] = _Finished(finished, now, now + ttl)
                case _Running(owner, _, take) if""",
        laws=("RECORDED_BEFORE_ANSWER",),
        scenario="forgotten",
    ),
    Mutant(
        name="a pending outcome is replayed before SQL has it",
        module=_TIERED,
        before="""\
        written = await self._record.write_through(
            request.scope, request.key, pending, retention=request.policy.retention
        )
""",
        after="""\
        written = True
""",
        laws=("PENDING_FIRST", "RECORDED_BEFORE_ANSWER"),
        scenario="SQL goes away",
        seed=1,
    ),
    Mutant(
        name="a pending outcome is acknowledged",
        module=_TASK,
        before="""\
    call.announce(EventName.OUTCOME_PENDING, kept_in_marker=kept, error=str(refused))
""",
        after="""\
    call.announce(EventName.OUTCOME_PENDING, kept_in_marker=kept, error=str(refused))
    if kept:
        return Recorded()
""",
        laws=("RECORDED_BEFORE_ANSWER",),
        scenario="SQL goes away",
        seed=1,
    ),
    Mutant(
        name="under hold an exception releases",
        module=_TASK,
        before="""in_doubt=call.policy.doubts and not proves_no_effect(call, error),""",
        after="in_doubt=False,",
        laws=("EFFECT_ONCE",),
        scenario="hold, and the handler raises",
    ),
    Mutant(
        name="hold runs again after a crash",
        module=_MEMORY,
        before="""if request.policy.doubts:""",
        after="""if request.policy.doubts and row.crashes > 1:""",
        laws=("EFFECT_ONCE",),
        scenario="hold and a crash",
    ),
    Mutant(
        name="who was superseded returns its own outcome",
        module=_TASK,
        before="if isinstance(answer, Recorded) or answer is None or call.policy.shadow:",
        after="if isinstance(answer, Recorded | Finished) or answer is None or call.policy.shadow:",
        laws=("RECORDED_BEFORE_ANSWER",),
        scenario="a pause",
    ),
    Mutant(
        name="who lost its lease returns its outcome",
        module=_TASK,
        before="""\
        return outcome_of_another(call, answer)
    raise lease_lost(claim)
""",
        after="""\
        return outcome_of_another(call, answer)
    return value
""",
        laws=("RECORDED_BEFORE_ANSWER",),
        scenario="a pause",
    ),
    Mutant(
        name="what was returned can still be released",
        module=_TASK,
        before="""\
            value = await run(call, claim, handler, args, kwargs)
        except BaseException as raised:""",
        after="""\
            value = await run(call, claim, handler, args, kwargs)
            return await record(call, claim, value)
        except BaseException as raised:""",
        laws=("NO_RELEASE_AFTER_RETURN",),
        scenario="SQL goes away",
        seed=1,
    ),
    Mutant(
        name="forget deletes the marker first",
        module=_TIERED,
        before="""\
        done = await self._record.forget(scope, key, expect_token=expect_token, actor=actor, reason=reason)
        await self._drop([(scope, key)])
""",
        after="""\
        await self._drop([(scope, key)])
        done = await self._record.forget(scope, key, expect_token=expect_token, actor=actor, reason=reason)
""",
        laws=("RECORDED_BEFORE_ANSWER",),
        scenario="forgotten",
    ),
    Mutant(
        name="forget leaves the marker",
        module=_TIERED,
        before="""\
        done = await self._record.forget(scope, key, expect_token=expect_token, actor=actor, reason=reason)
        await self._drop([(scope, key)])
""",
        after="""\
        done = await self._record.forget(scope, key, expect_token=expect_token, actor=actor, reason=reason)
""",
        laws=("RECORDED_BEFORE_ANSWER",),
        scenario="forgotten",
    ),
    Mutant(
        name="forget leaves the marker of a record that is gone",
        module=_TIERED,
        before="""\
        done = await self._record.forget(scope, key, expect_token=expect_token, actor=actor, reason=reason)
        await self._drop([(scope, key)])
""",
        after="""\
        done = await self._record.forget(scope, key, expect_token=expect_token, actor=actor, reason=reason)
        if done:
            await self._drop([(scope, key)])
""",
        laws=("RECORDED_BEFORE_ANSWER",),
        scenario="forgotten while a command is late",
    ),
    Mutant(
        name="what has ended is claimed again",
        module=_MEMORY,
        before="""\
                case State.COMPLETED | State.FAILED:
                    return row.as_finished(now)""",
        after="""\
                case State.COMPLETED | State.FAILED:
                    return self._grant(row, request, now)""",
        laws=("OUTCOME_STANDS",),
        scenario="nothing goes wrong but the markers are lost",
    ),
    Mutant(
        name="a lease is not waited for",
        module=_MEMORY,
        before="""\
                case State.RUNNING if row.is_held(now):""",
        after="""\
                case State.RUNNING if row.is_held(now + request.policy.lease):""",
        laws=("LEASE_RESPECTED",),
        scenario="nothing goes wrong but the markers are lost",
    ),
    Mutant(
        name="a lease never ends",
        module=_MEMORY,
        before="return self.state is State.RUNNING and now < self.lease_expires_at",
        after="return self.state is State.RUNNING",
        laws=("NOT_STUCK",),
        scenario="a crash",
    ),
    Mutant(
        name="a marker never ends",
        module=_MARKER,
        before="return None if marker is None or marker.expires_at <= now else marker",
        after="return marker",
        laws=("NOT_STUCK",),
        scenario="a crash",
    ),
    Mutant(
        name="in doubt is said, and not recorded",
        module=_MEMORY,
        before="""\
            row.state = State.IN_DOUBT
            row.attention = "in_doubt"
            return InDoubt(new=True, dead=row.lease_to(replace(request, owner=row.owner)))""",
        after="""\
            return InDoubt(new=True)""",
        laws=("ACKNOWLEDGED_IS_RECORDED",),
        scenario="hold and a crash",
    ),
    Mutant(
        name="a person's outcome keeps the claim it ends",
        module=_MEMORY,
        before="""\
            row.owner = new_owner()
            row.fencing_token = self._next_token(now)
""",
        after="",
        laws=("RECORDED_BEFORE_ANSWER",),
        scenario="hold, and a person resolves",
    ),
    Mutant(
        name="a late failure hides the recorded outcome",
        module=_TASK,
        before="return answer if isinstance(answer, Finished) else None",
        after="return None",
        laws=("LATE_FAILURE",),
        scenario="a pause, and the handler raises",
    ),
    Mutant(
        name="retention is not counted from the end",
        module=_MEMORY,
        before="self.expires_at = max(self.expires_at, now + retention)",
        after="self.expires_at = max(self.expires_at, retention)",
        laws=("RETAINED",),
        scenario="retention ends",
    ),
    Mutant(
        name="whatever expires is begun afresh",
        module=_MEMORY,
        before="return self.state in _PURGEABLE and self.expires_at <= now",
        after="return self.expires_at <= now",
        laws=("RETENTION_ENDS",),
        scenario="retention ends",
    ),
    Mutant(
        name="a claim that is sent again finds itself in progress",
        module=_MEMORY,
        before="case State.RUNNING if row.owner == request.owner:",
        after="case State.RUNNING if row.owner == request.owner and not row.is_held(now):",
        laws=("NOTHING_LEFT",),
        scenario="commands are sent again",
    ),
    Mutant(
        name="a marker that is taken again is somebody else's",
        module=_MARKER,
        before="return MarkerTaken() if owner == request.owner else MarkerRunning(expires_at - now)",
        after="return MarkerRunning(expires_at - now)",
        laws=("NOTHING_LEFT",),
        scenario="commands are sent again",
    ),
    Mutant(
        name="in doubt takes no late outcome",
        module=_MEMORY,
        before="_FENCED = (State.RUNNING, State.IN_DOUBT)",
        after="_FENCED = (State.RUNNING,)",
        laws=("LATE_FINISH",),
        scenario="hold and a pause",
    ),
    Mutant(
        name="in doubt takes anybody's outcome",
        module=_MEMORY,
        before="""\
            if row.obeys(lease.owner, lease.fencing_token):
                if row.state in _FENCED:
                    row.record_outcome""",
        after="""\
            if row.obeys(lease.owner, lease.fencing_token) or row.state is State.IN_DOUBT:
                if row.state in _FENCED:
                    row.record_outcome""",
        laws=("FENCE",),
        scenario="hold, and a person lets it run again",
    ),
    Mutant(
        name="in doubt is claimed",
        module=_MEMORY,
        before="""\
                case State.IN_DOUBT:
                    return InDoubt()""",
        after="""\
                case State.IN_DOUBT:
                    return self._grant(row, request, now)""",
        laws=("PERSON_DECIDES",),
        scenario="hold, and the handler raises",
    ),
    Mutant(
        name="parked is claimed",
        module=_MEMORY,
        before="return Parked(row.crashes, row.failures)\n",
        after="return self._grant(row, request, now)\n",
        laws=("PERSON_DECIDES",),
        scenario="a crash is too many",
    ),
    Mutant(
        name="a crash is not counted",
        module=_MEMORY,
        before="""\
        row.crashes += 1
        row.updated_at = now""",
        after="""\
        row.updated_at = now""",
        laws=("CRASHES_END",),
        scenario="a crash is too many",
    ),
    Mutant(
        name="released is never claimed again",
        module=_MEMORY,
        before="""\
                case State.RELEASED:
                    return self._grant(row, request, now)""",
        after="""\
                case State.RELEASED:
                    return InProgress(request.policy.lease)""",
        laws=("NOT_STUCK",),
        scenario="the handler raises",
    ),
    Mutant(
        name="a person forgets what runs",
        module=_MEMORY,
        before="""\
            self._refuse_if_held(row, now)
            refuse_if_moved(scope, key, row.state, row.fencing_token, expect_token)
            del self""",
        after="""\
            del self""",
        laws=("LEASE_RESPECTED",),
        scenario="forgotten",
    ),
    Mutant(
        name="a person resolves what runs",
        module=_MEMORY,
        before="""\
            self._refuse_if_held(row, now)
            refuse_if_moved(scope, key, row.state, row.fencing_token, expect_token)
            if row.state""",
        after="""\
            if row.state""",
        laws=("LEASE_RESPECTED",),
        scenario="hold, and a person lets it run again",
    ),
    Mutant(
        name="the deadline counts from the answer",
        module=_TASK,
        before="""\
    asked_at = deadline_clock()
    try:
        answer = await ask_store()
""",
        after="""\
    try:
        answer = await ask_store()
        asked_at = deadline_clock()
""",
        laws=("FORGOTTEN",),
        scenario="forgotten while answers are late",
    ),
    Mutant(
        name="a late finish always inserts",
        module=_TASK,
        before="answer = await store.finish(claim.lease, outcome, may_insert=not claim.lost)",
        after="answer = await store.finish(claim.lease, outcome, may_insert=True)",
        laws=("FORGOTTEN",),
        scenario="forgotten while answers are late",
    ),
    Mutant(
        name="a pending outcome inserts",
        module=_HEARTBEAT,
        before="answer = await self._store.finish(lease, pending.outcome, may_insert=False)",
        after="answer = await self._store.finish(lease, pending.outcome, may_insert=True)",
        laws=("FORGOTTEN",),
        scenario="forgotten while an outcome is pending",
        seed=1,
    ),
    Mutant(
        name="write-through inserts",
        module=_MEMORY,
        before="            if row is None or not row.obeys(pending.owner, pending.fencing_token):",
        after="""\
            if row is None:
                row = self._rows[scope, key] = _vanished(pending.raw.lease, self._clock())
            if not row.obeys(pending.owner, pending.fencing_token):""",
        laws=("FORGOTTEN",),
        scenario="forgotten while an outcome is pending",
        seed=1,
    ),
    Mutant(
        name="a pending outcome is not kept in the marker",
        module=_TASK,
        before="kept = await store.keep_pending(claim.lease, outcome)",
        after="kept = False",
        laws=("OUTCOME_KEPT",),
        scenario="SQL goes away",
    ),
    Mutant(
        name="a pending outcome is not tried again",
        module=_TASK,
        before="    call.services.heartbeat.keep_trying(claim.lease, outcome)\n",
        after="",
        laws=("OUTCOME_KEPT",),
        scenario="SQL goes away",
    ),
    Mutant(
        name="a pending outcome is passed by",
        module=_TIERED,
        before="return await self._claim_behind_pending(request, seen)",
        after="return await self._claim_record(request)",
        laws=("PENDING_FIRST",),
        scenario="SQL goes away",
        seed=1,
    ),
    Mutant(
        name="a pending outcome is dropped",
        module=_TIERED,
        before="return await self._claim_behind_pending(request, seen)",
        after="""\
await self._marker.drop_pending(request.scope, request.key, seen)
                return await self._claim_record(request)""",
        laws=("PENDING_FIRST", "OUTCOME_KEPT"),
        scenario="SQL goes away",
        seed=1,
    ),
    Mutant(
        name="a pending outcome is dropped while SQL is away",
        module=_TIERED,
        before="""\
        written = await self._record.write_through(
            request.scope, request.key, pending, retention=request.policy.retention
        )
""",
        after="""\
        try:
            written = await self._record.write_through(
                request.scope, request.key, pending, retention=request.policy.retention
            )
        except StoreError:
            await self._marker.drop_pending(request.scope, request.key, pending)
            raise
""",
        laws=("OUTCOME_KEPT",),
        scenario="SQL goes away",
        seed=1,
    ),
    Mutant(
        name="a process tries nothing again",
        module=_HEARTBEAT,
        before="self._pending[lease.owner] = _Pending(lease, outcome, now + lease.policy.retention, now + 1.0)",
        after="pass",
        laws=("OUTCOME_KEPT",),
        scenario="SQL goes away",
    ),
    Mutant(
        name="a process waits for ever with what it has to try again",
        module=_HEARTBEAT,
        before="self._pending[lease.owner] = _Pending(lease, outcome, now + lease.policy.retention, now + 1.0)",
        after="self._pending[lease.owner] = _Pending(lease, outcome, now + lease.policy.retention, math.inf)",
        laws=("OUTCOME_BROUGHT",),
        scenario="SQL goes away, and leases end",
        seed=1,
    ),
    Mutant(
        name="a finish is tried once",
        module=_TASK,
        before="while refused is None or (not call.policy.shadow and deadline_clock() + pause < claim.deadline):",
        after="while refused is None:",
        laws=("FINISH_TRIED",),
        scenario="SQL goes away",
    ),
    Mutant(
        name="what strikes in the shield is swallowed",
        module=_RUNTIME,
        before="""\
                if struck is not None:
                    raise struck
                return value""",
        after="                return value",
        laws=("INTERRUPTED",),
        scenario="struck",
    ),
    Mutant(
        name="a takeover is not told",
        module=_MEMORY,
        before="""\
            return InDoubt(new=True, dead=row.lease_to(replace(request, owner=row.owner)))
        return self._grant(row, request, now, taken_over=True)""",
        after="""\
            return InDoubt(new=True)
        return self._grant(row, request, now)""",
        laws=("TAKEOVER_TOLD",),
        scenario="a crash",
    ),
    Mutant(
        name="a failure too many is released",
        module=_MEMORY,
        before="return limit is not None and count >= limit",
        after="return limit is not None and count > limit",
        laws=("FAILURES_END",),
        scenario="the handler fails every time",
    ),
    Mutant(
        name="failures never park",
        module=_MEMORY,
        before="elif release.parked or (release.failed and _reached(lease.policy.max_attempts, row.failures)):",
        after="elif release.parked:",
        laws=("FAILURES_END",),
        scenario="the handler fails every time",
    ),
    Mutant(
        name="a lost record is not written again",
        module=_TASK,
        before="answer = await store.finish(claim.lease, outcome, may_insert=not claim.lost)",
        after="answer = await store.finish(claim.lease, outcome, may_insert=False)",
        laws=("LOST_IS_REWRITTEN",),
        scenario="the record is lost",
    ),
    Mutant(
        name="a marker outlives its record",
        module=_TIERED,
        before="ttl = min(request.policy.cache_ttl, finished.expires_in)",
        after="ttl = request.policy.cache_ttl",
        laws=("MARKER_RETAINED",),
        scenario="little retention is left",
    ),
    Mutant(
        name="what was given back runs all the same",
        module=_TASK,
        before="raise too_late(call)",
        after="return take_up(call, lease, asked_at)",
        laws=("EFFECT_EXPLAINED",),
        scenario="a pause",
    ),
    Mutant(
        name="the finish is not shielded",
        module=_TASK,
        before="await call.services.runtime.shield(lambda: finish(call, claim, keep_all(call, claim, value), away))",
        after="await finish(call, claim, keep_all(call, claim, value), away)",
        laws=("NOTHING_LEFT",),
        scenario="struck",
    ),
    Mutant(
        name="an interrupted claim is not withdrawn",
        module=_TASK,
        before="if call.services.runtime.can_wait(after=interruption):",
        after="if isinstance(interruption, GeneratorExit):",
        laws=("NOTHING_LEFT",),
        scenario="struck",
    ),
    Mutant(
        name="a shutdown does not release",
        module=_TASK,
        before="if not claim.protected or claim.ending is not None or not runtime.can_wait(after=raised):",
        after="if not claim.protected or not isinstance(raised, Exception):",
        laws=("NOTHING_LEFT",),
        scenario="struck",
    ),
    Mutant(
        name="a failure does not release",
        module=_TASK,
        before="answer = await runtime.shield(lambda: let_go(call, claim, error, away))",
        after="return None",
        laws=("NOTHING_LEFT",),
        scenario="the handler raises",
    ),
    Mutant(
        name="what was let go is renewed on",
        module=_HEARTBEAT,
        before="self._held.pop(owner, None)",
        after="""\
if owner in self._held and deadline_clock() > self._held[owner].deadline:
            del self._held[owner]""",
        laws=("NOT_STUCK",),
        scenario="the handler raises, and a command is lost",
    ),
    Mutant(
        name="a record is renewed by anybody",
        module=_MEMORY,
        before="if row and row.state is State.RUNNING and row.obeys(lease.owner, lease.fencing_token):",
        after="if row and row.state is State.RUNNING:",
        laws=("FENCE",),
        scenario="a renewal is late",
        seed=2,
    ),
    Mutant(
        name="nothing is renewed",
        module=_HEARTBEAT,
        before="self._held[claim.lease.request.owner] = claim",
        after="pass",
        laws=("KEPT_ALIVE",),
        scenario="heartbeats in time",
    ),
    Mutant(
        name="a marker that a renewal put back becomes an outcome",
        module=_MARKER,
        before="take = None",
        after="take = lease.request.take",
        laws=("RECORDED_BEFORE_ANSWER",),
        scenario="forgotten while a renewal is late",
    ),
    Mutant(
        name="any running marker of this owner becomes an outcome",
        module=_MARKER,
        before="if owner == request.owner and take is not None and take == request.take:",
        after="if owner == request.owner:",
        laws=("RECORDED_BEFORE_ANSWER",),
        scenario="forgotten while a command is late",
    ),
    Mutant(
        name="a take that nobody heard of becomes an outcome",
        module=_TIERED,
        before="return await self._claim_record(replace(request, take=None, marked=False))",
        after="return await self._claim_record(request)",
        laws=("RECORDED_BEFORE_ANSWER",),
        scenario="forgotten while a command is late",
    ),
    Mutant(
        name="an outcome is kept before it is recorded",
        module=_CACHED,
        before="""\
        try:
            answer = await self._store.finish(lease, outcome, may_insert=may_insert)""",
        after="""\
        self._keep_own(lease, outcome, Recorded(), question)
        try:
            answer = await self._store.finish(lease, outcome, may_insert=may_insert)""",
        laws=("RECORDED_BEFORE_ANSWER", "ONE_OUTCOME"),
        scenario="a local cache, and a pause",
    ),
    Mutant(
        name="a superseded outcome is kept",
        module=_CACHED,
        before="        if isinstance(answer, Recorded):\n            if self._cache.doubts",
        after="        if True:\n            if self._cache.doubts",
        laws=("RECORDED_BEFORE_ANSWER", "ONE_OUTCOME"),
        scenario="a local cache, and a pause",
    ),
    Mutant(
        name="what a person forgets is kept",
        module=_LOCAL_CACHE,
        before="self._kept.pop(place, None)",
        after="pass",
        laws=("RECORDED_BEFORE_ANSWER",),
        scenario="a local cache, and a person forgets",
    ),
    Mutant(
        name="what was on its way while a person forgot it is kept",
        module=_LOCAL_CACHE,
        before="if question.drops != self._drops:",
        after="if False:",
        laws=("RECORDED_BEFORE_ANSWER",),
        scenario="a local cache, and a person forgets",
    ),
    Mutant(
        name="an outcome is kept for longer than its retention",
        module=_LOCAL_CACHE,
        before="lasts = min(self._ttl, request.policy.cache_ttl, finished.expires_in)",
        after="lasts = self._ttl",
        laws=("RECORDED_BEFORE_ANSWER",),
        scenario="a local cache, and little retention is left",
    ),
    *MUTANTS_OF_EFFECTS,
)


def main(names: list[str]) -> int:
    """Explore these mutants, or all, and print what they break."""
    from tests.explorer.mutant_run import run

    caught = 0
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    for mutant in chosen:
        report = run(mutant.name)
        caught += report.law is not None
        sys.stdout.write(f"=== {mutant.name}\n{report}\n\n")
    sys.stdout.write(f"{caught} of {len(chosen)} mutants caught\n")
    return 0 if chosen and caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
