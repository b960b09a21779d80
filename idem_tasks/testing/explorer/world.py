"""One execution: workers, their deliveries and heartbeats, both tiers, the broker, and a clock that stands still.

All that is explored is the shipped code: `task.perform`, `TieredStore`, `Heartbeat`, the shield of `runtime.Blocking`,
and the memory tiers, which keep the contract that the Redis and SQL tiers keep. The world only decides who goes on
next, and what is lost on the way. It is given one `Action` at a time, and says in words what came of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, NamedTuple, cast

from idem_tasks.call import Call
from idem_tasks.claims import (
    ClaimRequest,
    EncodedOutcome,
    Granted,
    Lost,
    OutboxMessage,
    Record,
    Recorded,
    StepBegun,
)
from idem_tasks.errors import PUT_BACK, ConflictError, InDoubtError, ParkedError, StoreUnavailableError
from idem_tasks.events import Announcer
from idem_tasks.outbox import Relay, Senders
from idem_tasks.policy import LOCAL_CACHE_TTL
from idem_tasks.runtime import Blocking, run_sync
from idem_tasks.session_argument import SessionOfCall
from idem_tasks.stores.base import RuntimeName
from idem_tasks.stores.local_cache import LocalCache
from idem_tasks.stores.memory import MemoryStore
from idem_tasks.stores.memory_marker import MemoryMarker
from idem_tasks.task import perform
from idem_tasks.testing.clock import ManualClock
from idem_tasks.testing.explorer.database import Database, DeadlockError
from idem_tasks.testing.explorer.handlers import WORLD, handler_of
from idem_tasks.testing.explorer.late import LateCommand
from idem_tasks.testing.explorer.laws import ENDED, WAITING, Law, Laws, Violation
from idem_tasks.testing.explorer.processes import ACTORS_STEPS, Actor, KilledError, SoftLimitError, Worker
from idem_tasks.testing.explorer.scenario import (
    LEASE,
    LONGEST_WAIT,
    RETENTION,
    T0,
    Fault,
    HandlerFailedError,
    RetryError,
    Scenario,
)
from idem_tasks.testing.explorer.words import record_summary, summary_of, words, words_of
from idem_tasks.testing.stepped import Step

SCOPE, KEY, FINGERPRINT = "shop.charge", "A-1", "f" * 64
_LONGEST_SEND = 70.0
"""Seconds after which no message is leased any more, nor waits after a failure."""
_AT_A_COMMAND: tuple[Fault, ...] = ("command lost", "command late", "conflict")
_AT_A_REPLY: tuple[Fault, ...] = ("reply lost", "sent again")
_NOT_IN: dict[str, tuple[Fault, ...]] = {
    "outbox": ("sent again", "conflict"),
    "session": ("sent again",),  # whose connection is lost with a reply, and all that it had not committed
    "record": ("conflict",),
    "marker": ("conflict",),
}
_SERVERS = {"record": "SQL", "outbox": "SQL", "session": "SQL", "marker": "Redis"}
"""Where the commands of each tier go."""
_AT_ANY_STEP: tuple[Fault, ...] = ("soft limit", "shutdown")
_OF_THE_WORLD: tuple[Fault, ...] = (
    "lease over",
    "third of a lease over",
    "retention over",
    "markers lost",
    "record lost",
    "SQL down",
    "Redis down",
    "broker down",
    "forget",
    "resolve with an outcome",
    "resolve with a rerun",
    "purge",
)
_TIME_PASSES: tuple[Fault, ...] = ("third of a lease over", "lease over", "retention over")


class Action(NamedTuple):
    """What the world is told to do next; `who` is the actor, worker or late command that it is done to."""

    what: str
    who: str = ""


class World:
    """One execution of a scenario."""

    def __init__(self, scenario: Scenario, clock: ManualClock, *, tells: bool = True) -> None:
        """`tells`: every step is logged in words; else only the rest, for executions that nobody reads."""
        clock.set(T0)
        self.tells = tells
        self.scenario = scenario
        self.clock = clock
        self.record = MemoryStore(clock)
        self.marker = MemoryMarker(clock)
        self.laws = Laws(scenario.policy, record_may_be_lost="record lost" in scenario.faults)
        self.database = Database(self.record)
        self.watched_record = _Watched(self.record, self._record_command)
        self.watched_marker = _Watched(self.marker, self._marker_command)
        self.watched_outbox = _Watched(self.record.outbox, self._outbox_command)
        self.watched_database = _Watched(self.database, self._session_command)
        self.local_cache = LocalCache(1, LOCAL_CACHE_TTL, clock) if scenario.local_cache else None
        self.workers: dict[str, Worker] = {}
        self.actors: dict[str, Actor] = {}
        self.ready = scenario.copies
        self.begun = 0
        self.runs = 0
        self.down: set[str] = set()
        self.left: Counter[Fault] = Counter({fault: count for fault, count in scenario.faults.items() if count})
        self.faults_left = scenario.most_faults
        self.log: list[str] = [] if tells else [""]
        self._last_seen: Record | None = None
        self._people = 0
        self._decided: dict[str, int] = {}
        self._going = ""
        self._sent_at = 0.0
        self._lease_lived = False
        self._on_their_way: dict[str, LateCommand] = {}
        self._unfinished: list[Fault] = []
        self._in_session = False

    # What can happen now

    def actions(self) -> list[Action]:
        """Return all that can happen next, in a fixed order: first what goes well, then the faults.

        Two kinds of steps are taken at once, because their order makes no difference to anybody (partial-order
        reduction): the first of an actor, which could as well have begun later unless time passes, and, when no fault
        is left to come between, those that touch neither tier.
        """
        for actor in self.actors.values() if self.scenario.reduced else ():
            if actor.is_new and not self._somebody_sleeps and not self._waits_for_lock(actor):
                return [Action("go", actor.name), *(self._before_it_begins(actor) if self.faults_left else ())]
            if not self.faults_left and self._is_private(actor):
                return [Action("go", actor.name)]
        goes = [Action("go", name) for name, actor in self.actors.items() if not self._waits_for_lock(actor)]
        if self.ready and self.begun < self.scenario.deliveries:
            goes.append(Action("deliver"))
        goes += [Action("beat", worker.name) for worker in self.workers.values() if self._may_beat(worker)]
        for name, late in self._on_their_way.items():
            if late.step.tier != "record" or self.database.locked_by is None:
                goes.append(Action("arrives", name))
        if self.database.commit_is_late:
            goes.append(Action("rolled back"))
        goes += [Action(f"{server} up") for server in sorted(self.down)]
        return goes + (list(self._faults()) if self.faults_left else [])

    @property
    def _somebody_sleeps(self) -> bool:
        return any(actor.step is not None and actor.step.tier == "clock" for actor in self.actors.values())

    def _before_it_begins(self, actor: Actor) -> Iterator[Action]:
        """Yield what can go wrong at an actor's first step, and what makes it late: it has read the clock already."""
        yield from self._faults_at(actor)
        for fault in _TIME_PASSES:
            if self.left[fault] and self._can_happen(fault):
                yield Action(fault)

    def _may_beat(self, worker: Worker) -> bool:
        beating = f"{worker.name}'s heartbeat" in self.actors
        return not worker.dead and not beating and worker.heartbeat.is_due(self.clock())

    def _is_private(self, actor: Actor) -> bool:
        """Tell whether an actor's next step is seen by nobody but its own process, whose heartbeat is at rest."""
        assert actor.step is not None
        beating = f"{actor.worker.name}'s heartbeat" in self.actors or self._may_beat(actor.worker)
        return actor.step.tier in ("broker", "handler") and not beating

    def _waits_for_lock(self, actor: Actor) -> bool:
        """Tell whether an actor's command waits until a transaction has ended that has written its outcome."""
        step, holder = actor.step, self.database.locked_by
        if holder is None or step is None or step.when != "before":
            return False
        if step.tier == "session":
            wants_row = step.verb in ("write_outcome", "look_after")
            return wants_row and (step.args[0].owner != holder or self.database.commit_is_late)
        return step.tier == "record"

    @property
    def is_quiet(self) -> bool:
        """Whether nothing goes on any more, but for faults."""
        return (
            not self.actors
            and not self.database.commit_is_late
            and not (self.ready and self.begun < self.scenario.deliveries)
        )

    def _faults_at(self, actor: Actor) -> Iterator[Action]:
        """Yield what can go wrong at an actor's next step."""
        step, left = actor.step, self.left
        assert step is not None
        if step.tier in _SERVERS and not self._waits_for_lock(actor):
            at_once = _AT_A_COMMAND if self.scenario.every_reply else (*_AT_A_COMMAND, *_AT_A_REPLY)
            for fault in at_once if step.when == "before" else _AT_A_REPLY:
                # Of a transaction only the commit can still take effect when its connection is gone.
                too_late = fault == "command late" and step.tier == "session" and step.verb != "commit_rows"
                writes = step.verb in ("write_outcome", "commit_rows") or fault != "conflict"
                if left[fault] and writes and fault not in _NOT_IN[step.tier] and not too_late:
                    yield Action(fault, actor.name)
        if actor.holds_message and step.tier != "broker":
            for fault in _AT_ANY_STEP:
                if left[fault]:
                    yield Action(fault, actor.name)

    def _faults(self) -> Iterator[Action]:
        left = self.left
        for actor in self.actors.values():
            yield from self._faults_at(actor)
            if actor.holds_message and left["delivered again"]:
                yield Action("delivered again", actor.name)
        if left["killed"]:
            for worker in self.workers.values():
                if not worker.dead and (worker.heartbeat.is_needed or self._actors_of(worker)):
                    yield Action("killed", worker.name)
        for fault in _OF_THE_WORLD:
            if left[fault] and self._can_happen(fault):
                yield Action(fault)

    def _can_happen(self, fault: Fault) -> bool:
        match fault:
            case "markers lost":
                return bool(self.marker._markers)  # noqa: SLF001 - simulated by it
            case "record lost":
                return bool(self.record._rows)  # noqa: SLF001 - simulated by it
            case "third of a lease over" if self.scenario.beats_in_time:
                beating = any(name.endswith("heartbeat") for name in self.actors)
                return not beating and not any(w.heartbeat.is_due(self.clock()) for w in self.workers.values())
            case "broker down" if not self.scenario.messages:
                return False
            case "SQL down" | "Redis down" | "broker down":
                return fault.split()[0] not in self.down
            case "purge":
                return self._last_seen is not None and self._last_seen.expires_at.timestamp() < self.clock()
            case "resolve with an outcome" | "resolve with a rerun":
                return self._last_seen is not None and self._last_seen.state not in ENDED
            case _:
                return True

    def _actors_of(self, worker: Worker) -> list[Actor]:
        return [actor for actor in self.actors.values() if actor.worker is worker]

    # Let it happen

    def act(self, action: Action) -> None:
        """Do it, and log in words what came of it. Raises `Violation`."""
        what, who = action
        if what in self.left:
            self.left[what] -= 1  # type: ignore[index] # it is a fault
            self.faults_left -= 1
        match what:
            case "go":
                self._go_on(self.actors[who])
            case "deliver":
                self._deliver()
            case "beat":
                self.log.append(f"{who}'s heartbeat begins")
                worker = self.workers[who]
                worker.has_beaten = True
                self._begin(f"{who}'s heartbeat", worker, worker.heartbeat.beat())
            case "rolled back":
                self._roll_back()
            case "SQL up" | "Redis up" | "broker up":
                self.down.discard(what.split()[0])
                self.log.append(f"{what.split()[0]} can be reached again")
            case "arrives":
                self._arrive(self._on_their_way.pop(who))
            case "killed":
                self._kill(who)
            case _ if who:
                self._strike(what, self.actors[who])
            case _:
                self._happen(cast(Fault, what))
        if self.laws.violation is not None:
            raise self.laws.violation

    def _go_on(self, actor: Actor, *, again: bool = False) -> None:
        step = actor.step
        assert step is not None
        if self.tells:
            self.log.append(f"{actor.name}: {words(step)}")
        if step.tier == "clock":
            self.clock.advance(step.answer)
        server = _SERVERS.get(step.tier)
        if server in self.down and step.when == "before":
            self.log[-1] += f" - {server} cannot be reached"
            actor.resume(self, StoreUnavailableError(f"{server} is down"))
        else:
            actor.resume(self, again)

    def _strike(self, fault: str, actor: Actor) -> None:
        step = actor.step
        assert step is not None
        match fault:
            case "command lost":
                self.log.append(f"{actor.name}: {words(step)} - the command is LOST")
                actor.resume(self, StoreUnavailableError("the command was lost"))
            case "command late":
                self.log.append(f"{actor.name}: {words(step)} - the command is LATE")
                name = f"{actor.name}'s {step.verb}"
                while name in self._on_their_way:
                    name += " too"
                self._on_their_way[name] = LateCommand(name, actor.name, actor.sent_at, step)
                self.database.commit_is_late |= step.verb == "commit_rows"
                actor.resume(self, StoreUnavailableError("the command is late"))
            case "conflict":
                self.log.append(f"{actor.name}: {words(step)} - a DEADLOCK, and all is undone")
                actor.resume(self, DeadlockError())
            case "reply lost" | "sent again" if step.when == "before":
                what = "the reply is LOST" if fault == "reply lost" else "the client SENDS AGAIN"
                self.log.append(f"{actor.name}: {words(step)} - {what}")
                actor.worker.reply = fault
                actor.resume(self, reply=False)
            case "reply lost":
                self.log.append(f"{actor.name}: {words(step)} - the reply is LOST")
                actor.resume(self, StoreUnavailableError("the reply was lost"))
            case "sent again":
                self.log.append(f"{actor.name}: {words(step)} - the reply is lost, and the client SENDS AGAIN")
                actor.resume(self, reply=True)
            case "soft limit":
                self.log.append(f"{actor.name}: a SOFT LIMIT strikes at: {words(step)}")
                actor.resume(self, SoftLimitError())
            case "shutdown":
                self.log.append(f"{actor.name}: a SHUTDOWN strikes at: {words(step)}")
                actor.resume(self, SystemExit())
            case "delivered again":
                self.log.append(f"the broker DELIVERS AGAIN what {actor.name} still has")
                self.ready += 1

    def _happen(self, fault: Fault) -> None:
        self.log.append(f"*** {fault}")
        match fault:
            case "lease over":
                self.clock.advance(LEASE + 0.001)
                self.log[-1] = "*** more than a lease passes, nobody does anything: all leases are over"
            case "third of a lease over":
                self.clock.advance(LEASE / 3 + 0.001)
            case "retention over":
                self.clock.advance(RETENTION + 600 + LEASE)
            case "markers lost":
                self.marker._markers.clear()  # noqa: SLF001 - simulated by it
            case "record lost":
                self.record._rows.clear()  # noqa: SLF001 - simulated by it
                self._last_seen = None
                self.laws.record_was_lost()
            case "SQL down" | "Redis down" | "broker down":
                self.down.add(fault.split()[0])
            case _:
                self._people += 1
                name = f"person {self._people}"
                self._begin(name, self._worker(name), self._person(fault, name))

    def _arrive(self, late: LateCommand) -> None:
        """Let a late command take effect, whatever became of its sender; nobody hears its answer."""
        step = late.step
        self.going_on(late.sender, late.sent_at, lease_lived=False)  # whoever gave it up has tried again meanwhile
        tiers = {
            "record": self.watched_record,
            "marker": self.watched_marker,
            "outbox": self.watched_outbox,
            "session": self.watched_database,
        }
        command = getattr(tiers[step.tier], step.verb)
        try:
            answer = words_of(run_sync(command(*step.args, **step.kwargs)))
        except ConflictError as refused:
            answer = type(refused).__name__
        self.log.append(f"{late.name} ARRIVES late -> {answer}")

    def _roll_back(self) -> None:
        """Let the database give up a commit that never came."""
        self.log.append("the database ROLLS BACK a transaction whose commit never came")
        for name in [name for name, late in self._on_their_way.items() if late.step.verb == "commit_rows"]:
            del self._on_their_way[name]
        assert self.database.locked_by is not None
        self.database.unlock(self.database.locked_by)

    def _kill(self, who: str) -> None:
        worker = self.workers[who]
        self.log.append(f"{worker.name} is KILLED")
        worker.dead = True
        for actor in self._actors_of(worker):
            if actor.holds_message:
                self.ready += 1
                self.log[-1] += ": the broker has its message again"
            actor.resume(self, KilledError())
            if not self.database.commit_is_late:
                self.database.unlock(actor.name)  # with its connection

    def _worker(self, name: str) -> Worker:
        return self.workers.setdefault(name, Worker(self, name))

    def _begin(self, name: str, worker: Worker, coroutine: Coroutine[Any, Any, None]) -> Actor:
        actor = self.actors[name] = Actor(name, worker, coroutine)
        actor.first_epoch = self.laws.first_open_epoch
        actor.resume(self, None)
        return actor

    # A delivery

    def _deliver(self) -> None:
        self.ready -= 1
        self.begun += 1
        number = self.begun
        name = f"delivery {number}"
        self.log.append(f"{name} begins")
        worker = self._worker(f"worker {number}")
        worker.delivery = name
        actor = self.actors[name] = Actor(name, worker, self._delivery(name, worker))
        actor.first_epoch = self.laws.first_open_epoch
        actor.holds_message = True
        actor.resume(self, None)

    async def _delivery(self, name: str, worker: Worker) -> None:
        """What a consumer does with a message: it acknowledges what returned, and publishes again what must come."""
        actor = self.actors[name]
        first_epoch = actor.first_epoch
        request = ClaimRequest(SCOPE, KEY, FINGERPRINT, name, self.scenario.policy)
        session = SessionOfCall(cast(Any, None), None, is_missing=True) if self.scenario.session else None
        call = Call(request, worker.services, lambda: str, session=session)
        WORLD.set(self)
        try:
            ended_by: BaseException | None = None
            try:
                outcome = await perform(call, handler_of(self, actor), (), {})
            except BaseException as error:
                ended_by = error
                raise
            finally:
                if not worker.dead:
                    self._call_is_over(actor, ended_by)
        except PUT_BACK as error:
            await worker.reach(Step("broker", f"{type(error).__name__}: publish the message again", "before"))
            self.ready += 1
        except (InDoubtError, ParkedError) as error:
            self.laws.acknowledged_without_outcome(name, type(error).__name__, first_epoch=first_epoch)
        except RetryError:
            pass  # it published the message itself
        except SystemExit:
            self.ready += 1  # the worker goes, and the broker has its message again
            actor.holds_message = False
            worker.dead = True
            return
        except self.scenario.policy.record_failures as error:
            self.laws.answered(name, str(error), first_epoch=first_epoch)
            self.log.append(f"{name} is given the failure {error!r}")
        except (HandlerFailedError, DeadlockError, SoftLimitError) as error:
            self.laws.failed(name, superseded=actor.superseded and isinstance(error, HandlerFailedError))
            await worker.reach(Step("broker", "the handler failed: deliver again, by the broker's own rules", "before"))
            self.ready += 1
            actor.holds_message = False
            return
        except KilledError:
            raise
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is a find
            self.laws.unknown_ending(name, error)
        else:
            self.laws.answered(name, outcome, first_epoch=first_epoch)
            self.log.append(f"{name} is given the outcome {outcome!r}")
        await worker.reach(Step("broker", "acknowledge", "before"))
        actor.holds_message = False

    def _call_is_over(self, actor: Actor, ended_by: BaseException | None) -> None:
        """Let the laws see how a call ended, and what it leaves behind."""
        # A handler that a soft limit ended may hear that somebody else's outcome is recorded.
        may_end_by: tuple[type[BaseException], ...] = (SystemExit, SoftLimitError, *PUT_BACK)
        if callable(self.scenario.policy.on_crash):
            may_end_by = (*may_end_by, InDoubtError)  # it struck the question, and a person finds the record
        heard_another = ended_by is None and actor.superseded
        match actor.struck:
            case SystemExit() if not isinstance(ended_by, SystemExit):
                self.laws.interrupted(actor.name, "a shutdown", repr(ended_by))
            case SoftLimitError() if not isinstance(ended_by, may_end_by) and not heard_another:
                self.laws.interrupted(actor.name, "a soft limit", repr(ended_by))
        name, held, marker = actor.name, actor.worker.heartbeat, self._marker_now()
        # A renewal that was under way may put its marker back when the call has taken it away already.
        renewed = marker == ("running", name) and actor.worker.has_beaten
        shielded = marker is not None and marker[1] != name
        self.laws.call_is_over(
            name,
            # Whoever is struck while it claims finds out by another claim; somebody else's marker keeps it from that.
            reached=not actor.outages and not (actor.struck and shielded),
            record=self._last_seen,
            marker=None if renewed else marker,
        )
        elsewhere = "marker" in actor.outages or shielded
        self.laws.is_kept(
            name,
            in_marker=marker == ("pending", name) or elsewhere,
            tried_again=name in held._pending,  # noqa: SLF001 - no other way to see what it will try
        )

    # A person

    async def _person(self, what: Fault, name: str) -> None:
        store = self._worker(name).store
        self._unfinished.append(what)
        try:
            match what:
                case "forget":
                    await store.forget(SCOPE, KEY)
                case "purge":
                    await store.purge(limit=10, grace=0.0)
                case "resolve with an outcome":
                    await store.resolve(SCOPE, KEY, EncodedOutcome(body=b'"what a person says"', codec="json"))
                case "resolve with a rerun":
                    await store.resolve(SCOPE, KEY, None)
        except ConflictError as refused:
            self.log.append(f"{name}: refused, {type(refused).__name__}")
        except StoreUnavailableError:
            self.log.append(f"{name}: is told that it is unfinished")
            return
        self._unfinished.remove(what)
        if name in self._decided:
            self.laws.person_is_done(self._decided[name])

    # What the laws see

    async def _record_command(self, verb: str, effect: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        answer = await effect(*args, **kwargs)
        # Not read earlier: in a protocol that was broken on purpose, others come between two statements of a command.
        before, epoch = self._last_seen, self.laws.epoch
        after = self._last_seen = run_sync(self.record.get(SCOPE, KEY))
        match verb:
            case "claim" | "finish" | "release" | "begin_step" | "finish_step":
                owner = args[0].owner
            case "decide":
                owner = args[1].owner
            case "write_through":
                owner = args[2].owner
            case "renew":
                owners = [lease.owner for lease in args[0]]
                owner = before.owner if before is not None and before.owner in owners else owners[0]
            case _:
                owner = ""
        if verb == "renew":
            self.laws.renewed(answer, before)
        if verb in ("finish", "write_through"):
            lived = verb == "finish" and self._lease_lived
            self.laws.finish_came(verb, owner, before, after, sent_at=self._sent_at, lease_lived=lived)
        if verb in ("claim", "finish", "release", "decide"):
            self.laws.told(owner, after, self.clock())
        if verb == "begin_step":
            self.laws.step_began(owner, args[2], before, begun=isinstance(answer, StepBegun))
        if verb == "finish_step" and isinstance(answer, Recorded):
            self.laws.step_recorded(owner, args[2], before, args[3])
        if before != after:
            kept_alive = before is not None and self.scenario.beats_in_time and self._was_running(before)
            self.laws.record_changed(verb, owner, before, after, now=self.clock(), kept_alive=kept_alive)
            if self.laws.epoch > epoch:
                self._decided.setdefault(self._going, epoch)
            if verb in ("finish", "write_through") and after is not None and after.state in ENDED:
                outcome = args[1] if verb == "finish" else args[2].outcome
                self.laws.messages_recorded(owner, outcome.messages, len(self.scenario.messages))
                if self.scenario.session and not self._in_session:
                    self.laws.recorded_without_rows(owner)
        if verb == "decide" and not isinstance(answer, Lost):
            self.laws.decided(owner, args[0], before, reruns=isinstance(answer, Granted))
        if verb == "forget":  # also what is gone already: the marker may have outlived it
            self._decided[self._going] = self.laws.epoch - 1
        return answer

    async def _session_command(self, verb: str, effect: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if verb != "commit_rows":
            return await effect(*args, **kwargs)
        self._in_session = True
        answer = await self._record_command("finish", effect, args, kwargs)
        self._in_session = False
        self.laws.rows_committed(args[0].owner, args[2], self._last_seen)
        return answer

    async def _outbox_command(self, _verb: str, effect: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return await effect(*args, **kwargs)

    def post(self, message: OutboxMessage) -> None:
        """Send a message of an explored handler, as its sender."""
        if "broker" in self.down:
            self.log.append(f"message {message.number} is refused: the broker cannot be reached")
            raise ConnectionRefusedError
        self.log.append(f"message {message.number} is sent")
        self.laws.sent(message)

    def _was_running(self, record: Record) -> bool:
        """Tell whether the record's handler had not returned when its lease ended."""
        actor = self.actors.get(record.owner)
        if actor is None or actor.step is None:
            return False
        return actor.step.tier == "handler" or actor.ran_until >= record.lease_expires_at.timestamp()

    async def _marker_command(self, verb: str, effect: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        before = self._marker_now()
        answer = await effect(*args, **kwargs)
        after = self._marker_now()
        match verb:
            case "take" | "keep" | "publish":
                owner = args[0].owner
            case "give_back":
                owner = args[2]
            case "renew_markers":
                owner = next((lease.owner for lease in args[0] if after and lease.owner == after[1]), "")
            case _:
                owner = ""
        self.laws.marker_changed(verb, owner, before, after)
        if verb == "publish" and after != before and after is not None:
            self.laws.published(owner, self.marker._markers[SCOPE, KEY].expires_at - self.clock())  # noqa: SLF001
        return answer

    def _marker_now(self) -> tuple[str, str] | None:
        standing = self.marker._standing((SCOPE, KEY), self.clock())  # noqa: SLF001 - simulated by it
        if standing is None:
            return None
        kind = type(standing).__name__.strip("_").lower()
        lease = getattr(standing, "lease", None)
        return kind, getattr(standing, "owner", "") if lease is None else lease.owner

    def going_on(self, name: str, sent_at: float, *, lease_lived: bool) -> None:
        """Note whose command comes next, when it was sent, and whether its sender's lease lived then."""
        self._going, self._sent_at, self._lease_lived = name, sent_at, lease_lived

    def was_told(self, answer: Any) -> None:
        """Let two states differ in which whoever goes on now was told something else."""
        actor = self.actor_at_hand
        actor.trail = hash((actor.trail, summary_of(answer)))

    @property
    def actor_at_hand(self) -> Actor:
        """Whose command it is now."""
        return self.actors[self._going]

    # The end

    def close(self) -> None:
        """End all that waits: a coroutine that is only forgotten would run on into its `finally`."""
        for worker in self.workers.values():
            worker.dead = True
        for actor in list(self.actors.values()):
            actor.resume(self, KilledError())

    def settle(self) -> None:
        """Let everything be reachable, all leases run out and all messages be answered, and one more copy come.

        Raises `Violation` when a message is not answered, or a key stays in progress.
        """
        self.down.clear()
        self.log.append("--- from here on nothing goes wrong any more")
        if self.database.commit_is_late:
            self._roll_back()
        self._run_down()
        for what in self._unfinished[:]:  # a person who is told so, or is cut off, does it again once no lease lives
            self.clock.advance(LEASE + 0.001)
            self._happen(what)
            self._run_down()
        self.ready += 1
        for _ in range(12):
            if not self.ready:
                break
            for _ in range(3):  # with the heartbeats that are due meanwhile
                self.clock.advance(LEASE / 3 + 0.001)
                self._run_down()
            before = self.ready
            for _ in range(before):
                self.act(Action("deliver"))
                self._run_down()
        else:
            raise Violation(Law.NOT_STUCK, f"{self.ready} copies are still put back after 12 leases")
        self._bring_what_is_pending()
        self._relay()
        record = self._last_seen
        if "record lost" in self.scenario.faults:
            return  # and with it an outcome that all were given
        if record is None or record.state not in (*ENDED, *WAITING):
            state = "is gone" if record is None else f"is {record.state.value}"
            raise Violation(Law.NO_MESSAGE_LOST, f"all copies were acknowledged, and the record {state}")

    def _bring_what_is_pending(self) -> None:
        living = [worker for worker in self.workers.values() if not worker.dead]
        if any(worker.heartbeat.is_needed for worker in living):
            self.clock.advance(LONGEST_WAIT)
            self._run_down()
        for worker in living:
            if worker.delivery is not None and not worker.retention_is_over:
                self.laws.process_is_left(worker.delivery)
        if self.laws.violation is not None:
            raise self.laws.violation

    def _relay(self) -> None:
        """Let a relay send what is left over: what waits after a failure too, and what a crash left leased."""
        if not self.scenario.messages:
            return
        relay = Relay(self.record, Senders({"mail": self.post}), Announcer(()), Blocking())
        for _ in range(2):
            self.clock.advance(_LONGEST_SEND)
            run_sync(relay.run(100, lambda: False))
        self.laws.all_is_sent()
        if self.laws.violation is not None:
            raise self.laws.violation

    def _run_down(self) -> None:
        for _ in range(ACTORS_STEPS):
            if self.actors:
                self.act(Action("go", next(name for name, a in self.actors.items() if not self._waits_for_lock(a))))
                continue
            due = [w for w in self.workers.values() if not w.dead and w.heartbeat.is_due(self.clock())]
            if not due:
                return
            self.act(Action("beat", due[0].name))
        raise Violation(Law.KNOWN_ENDINGS, "something went round in a circle")

    def ending(self) -> tuple[Any, ...]:
        """Return what became of it: the record, its effects, its outcomes; not how, nor which delivery it was."""
        record, marker = self._last_seen, self._marker_now()
        state = None if record is None else (record.state, record.crashes, record.failures, record.attempts)
        numbers: dict[str, int] = {}
        lives = [
            (*counts, None if outcome is None else numbers.setdefault(outcome.rpartition(" ")[2], len(numbers)))
            for *counts, outcome in self.laws.ending()
        ]
        if marker is not None:
            marker = (marker[0], str(numbers.get(marker[1].rpartition(" ")[2])))
        return state, marker, self.runs, self.ready, tuple(lives)

    def _outbox_summary(self) -> tuple[Any, ...]:
        waiting = self.record.outbox._keys.get((SCOPE, KEY), ())  # noqa: SLF001 - simulated by it
        return tuple((each.message.id, each.due_at, each.owner is None) for each in waiting)

    def cache_summary(self) -> tuple[Any, ...]:
        """Return all that the cache's next answers depend on, and whether it keeps what is on its way."""
        if self.local_cache is None:
            return ()
        kept = tuple(self.local_cache._kept.values())  # noqa: SLF001 - no other way to see what it will answer
        return kept, self.local_cache.question().drops

    def key(self) -> int:
        """Return a hash of all that the rest of this execution depends on."""
        standing = self.marker._markers.get((SCOPE, KEY))  # noqa: SLF001 - simulated by it
        return hash(
            (
                None if self._last_seen is None else record_summary(self._last_seen),
                standing,
                tuple(actor.summary() for _, actor in sorted(self.actors.items())),
                tuple(
                    (w.name, w.dead, w.has_beaten, w.retention_is_over, w.heartbeat.summary())
                    for w in self.workers.values()
                ),
                (self.ready, self.begun, self.runs, frozenset(self.down), self.clock(), self._people),
                (tuple(self._unfinished), frozenset(self._decided.items())),
                frozenset(late.summary() for late in self._on_their_way.values()),
                (self.faults_left, frozenset(self.left.items())),
                (self.database.locked_by, self.database.commit_is_late, self._outbox_summary()),
                self.laws.summary(),
                self.cache_summary(),
            )
        )


class _Watched:
    """A tier of which the laws see every command, before and after it takes effect."""

    def __init__(self, tier: Any, watch: Callable[..., Any]) -> None:
        self.runtimes: frozenset[RuntimeName] = getattr(
            tier, "runtimes", frozenset()
        )  # what belongs to a tier has none
        self._tier = tier
        self._watch = watch

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        effect = getattr(self._tier, verb)

        async def watched(*args: Any, **kwargs: Any) -> Any:
            return await self._watch(verb, effect, args, kwargs)

        self.__dict__[verb] = watched
        return watched
