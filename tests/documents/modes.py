"""What is known of each failure mode: how it goes wrong, what prevents it here, and what of that is not built yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from idem_tasks.cli.application import application


@dataclass(frozen=True)
class Feature:
    """Something that would prevent more, and that is not there; `is_built` finds out when that is no longer so."""

    name: str
    is_built: Callable[[], bool]


DOCTOR = Feature(
    "a `doctor` command, which compares these settings with the servers' own",
    lambda: "doctor" in {command.name for command in application.registered_commands},
)
FEATURES = (DOCTOR,)


@dataclass(frozen=True)
class Mode:
    number: int
    title: str
    """How it goes wrong."""
    remedy: str
    """What prevents it here."""
    lacks: tuple[Feature, ...] = ()

    @property
    def name(self) -> str:
        return f"F{self.number}"


def _modes(*rows: tuple[int, str, str] | tuple[int, str, str, tuple[Feature, ...]]) -> list[Mode]:
    return [Mode(*row) for row in rows]


GROUPS: dict[str, list[Mode]] = {
    "Runs twice": _modes(
        (
            1,
            "The handler takes longer than its lease",
            (
                "While it runs a heartbeat renews the lease every third of it. A process that was paused too long for"
                " that finds another fencing token in the record, and its outcome is not recorded over the other one."
            ),
        ),
        (
            2,
            "The handler hangs, or holds the GIL, and the heartbeat cannot know",
            (
                "Renewals stop after `max_hold`. `current_claim().lost` is a hint; what is recorded is decided by the"
                " fencing token."
            ),
        ),
        (
            3,
            "A renewal fails: it is forgotten, or the healthy handler is given up",
            "It is tried again until the lease would be over by the process' own clock; only then is the claim lost.",
        ),
        (
            4,
            "A late holder deletes or overwrites the marker of the next one",
            "Each script compares the owner in the marker before it changes anything.",
        ),
        (
            5,
            "The owner is a host, a process or a task id, so that an old copy takes itself for the holder",
            "Every granted claim has a random owner and a new fencing token.",
        ),
        (
            6,
            "Several workers find the same dead holder, and each takes over",
            (
                "What was found is part of the statement's condition, so that one of them changes the record and the "
                "others change nothing."
            ),
        ),
        (
            7,
            "Redis is flushed, restarted, full or failed over, and the marker is gone",
            "The marker only shields. Whoever finds none asks the record in SQL, which decides.",
        ),
        (
            8,
            "Redis evicts markers because they have a time to live",
            "The same: a marker may go at any moment.",
            (DOCTOR,),
        ),
        (
            9,
            "Redis' clock jumps, and a marker ends too early or too late",
            "Leases are those of the record, by the database's clock.",
        ),
        (
            10,
            "The counter of fencing tokens begins again, and an old token is as good as a new one",
            (
                "A token is the last one plus one, or the database's clock in microseconds if that is more: it rises "
                "also over a record that was purged, forgotten or lost."
            ),
        ),
        (
            11,
            "Somebody looks whether the key is done and claims it afterwards: two can look at once",
            "There is no such look. The claim itself tells what is there.",
        ),
        (
            12,
            "The look reads an old snapshot, or a replica that is behind",
            (
                "Statements run on a connection of their own, each committed at once, at READ COMMITTED; a server "
                "that is read-only is an error that names the primary."
            ),
        ),
        (
            13,
            "State or time is part of the primary key, so that one key has many records",
            "Scope and key are the primary key, and nothing else. A table can be partitioned by their hash.",
        ),
        (
            14,
            "The handler's rows and its outcome are in two transactions, and the process dies between them",
            (
                "With `session=` they are one transaction of the handler's session, whose last statement is the fenced "
                "finish. A commit whose reply was lost is looked for, and never sent again."
            ),
        ),
        (
            15,
            "The process dies after an outside effect and before its record",
            (
                "`current_claim().provider_key()` is the same at every attempt, so that a provider that takes such "
                "keys does it once, and `current_claim().step()` keeps the outcome of each part of a handler, so that "
                "only the one under way is repeated. For all else `on_crash` says what the next delivery does: `rerun` "
                "runs the handler again and says so in `taken_over`, `hold` leaves the record in doubt for a person, a "
                "function asks the outside world."
            ),
        ),
        (
            16,
            "The record is gone before the broker delivers its message for the last time",
            (
                "`retention` is days where brokers need hours, its length for each broker is [documented](../how-"
                "to/retention.md), and what Redis serves never outlasts it."
            ),
            (DOCTOR,),
        ),
        (
            17,
            "All was down; the purge comes before the redelivery",
            "Purging spares what ended within `grace`, an hour unless you say otherwise.",
        ),
        (
            18,
            "The handler changes its arguments, and key or fingerprint are taken from what is left",
            "Both are taken once, before the handler is called; Celery messages are put back as they came.",
        ),
        (
            19,
            "The same call has two keys: order of a dict, a float's text, a time zone, a renamed function",
            (
                "Keys and fingerprints are made of one canonical text, whose form golden tests hold fast; the scope "
                "can be named."
            ),
        ),
        (
            20,
            "A proxy or an old server ignores NX or PX",
            (
                "At its first connection each process tries whether they work, and does not use a server where they "
                "do not."
            ),
        ),
        (
            21,
            "The database did it, its reply was lost, and the second try takes its own work for somebody else's",
            "A record that carries our own owner and token is our own: granted, or recorded.",
        ),
        (
            22,
            "The same with Redis: SET NX took effect, its reply was lost",
            "What stands there comes back with the same command, and our own owner in it means that it is ours.",
        ),
        (
            23,
            "Somebody guesses by host or process who is still alive",
            "Nobody does. A claim can be taken over when its lease is over, whoever held it, and not before.",
        ),
        (
            24,
            "The broker delivers again while the first copy still runs",
            "The second copy is in progress: it is put back, or waits, and never runs.",
            (DOCTOR,),
        ),
        (
            25,
            "A process remembers by itself what was done, or tells it before it is committed",
            "No process remembers anything. The marker has an outcome only after the record has it.",
        ),
        (
            26,
            "Functions, threads or nested calls that share a store mix up their keys or settings",
            (
                "What belongs to a call is in the call's own objects; stores, key plans and fingerprints keep nothing"
                " of it."
            ),
        ),
        (
            27,
            "A connection crosses a fork, and two processes read each other's replies",
            "Connections are made in each process when they are first used; a child leaves its parent's alone.",
        ),
        (
            28,
            "An outcome that counts as false is taken for none",
            "Whether there is an outcome is never told by its truth.",
        ),
        (
            29,
            "A message without a key runs unprotected",
            "It does not run: `InvalidKeyError`.",
        ),
        (
            30,
            "A coroutine function is recorded as done before anybody awaited it",
            (
                "Coroutine functions are recognised, behind partials and wrappers too; a coroutine that comes as a "
                "surprise and generator functions are refused."
            ),
        ),
    ),
    "Loses a message": _modes(
        (
            31,
            "A duplicate is acknowledged because the key is in progress; then the one who runs dies",
            "It is put back after the rest of the lease, and never answered as if it were done.",
        ),
        (
            32,
            "What a failed handler leaves behind makes its retry a duplicate",
            "The record is released and the marker deleted before the exception leaves.",
        ),
        (
            33,
            "A crash leaves a marker or a record that never ends",
            "Whatever is not final has a lease, and each marker a time to live.",
        ),
        (
            34,
            "`self.retry` sends the key again while its own claim still stands",
            "The new message is in progress for a moment, and is put back.",
        ),
        (
            35,
            "A short hash makes a stranger's message a duplicate",
            "Keys are stored and compared whole; one that is too long keeps its head and its SHA-256.",
        ),
        (
            36,
            "Two consumers of an event, or two tenants, share a key",
            "A key is unique within its scope: the task's name, or what you make of the arguments.",
        ),
        (
            37,
            "A failure that would have passed is recorded for good",
            "Only the types in `record_failures` are recorded.",
        ),
        (
            38,
            "One member of a batch is blamed for another",
            "Each message has a claim and an outcome of its own.",
        ),
        (
            39,
            "An error of the database is told by its text, which another language or version changes",
            "By SQLSTATE and error number. A duplicate is no error at all.",
        ),
        (
            40,
            "Putting back uses up the deliveries that a queue allows, and a healthy message is dead-lettered",
            "It is published again after a delay, as a new message, and the old one acknowledged.",
        ),
        (
            41,
            "A cold shutdown strikes where the pool takes that for success",
            "Under gevent, eventlet and solo an interrupted message is rejected and comes again.",
        ),
        (
            42,
            "The message kills its process each time, so that nobody counts a failure",
            "Crashes are counted by whoever takes over; more than `max_crashes` park the record.",
        ),
        (
            43,
            "The effect has happened, and its outcome cannot be encoded or is too large",
            "The record is completed without it, and says why. Duplicates do not run.",
        ),
        (
            44,
            "The message is acknowledged before it runs",
            "A Celery worker warns of each such task as it starts, and names the setting.",
            (DOCTOR,),
        ),
        (
            45,
            "The handler has ended and SQL cannot be reached",
            (
                "The finish is tried again while the lease lives. Then the outcome is kept in the marker, the message"
                " is put back, and this process and the next delivery write the outcome to its record."
            ),
        ),
    ),
    "Gets stuck or slow": _modes(
        (
            46,
            "Somebody waits for a lock on a record until all connections are in use",
            (
                "Claims wait for a lock a short time only and are then in progress; renewals and purges pass locked "
                "records by."
            ),
        ),
        (
            47,
            "A purge deletes by the place of a row, which another row has meanwhile, or too many rows at once",
            "By primary key, of rows that it has locked, at most 1,000 in a transaction.",
        ),
        (
            48,
            "`now()` is the time at which a long transaction began, and the lease is too short",
            "Leases are counted from the statement's own time.",
        ),
        (
            49,
            "Each call waits for the timeout of a Redis that is away",
            "Timeouts are short, and after the first one a circuit breaker answers for it.",
        ),
        (
            50,
            "A worker that is told to stop keeps its keys until their leases are over",
            "An interrupted handler releases its claim, unless under `hold`.",
        ),
    ),
    "Mixes up or brings back": _modes(
        (
            51,
            "The database takes two keys for one: case, accents, trailing spaces",
            "Scope and key compare byte by byte on every database.",
        ),
        (
            52,
            "A key holds what a database refuses, or is cut and meets another one",
            "It is refused or shortened in a way that keeps it unique, before anything is sent.",
        ),
        (
            53,
            "A record was forgotten, resolved or purged, and something late answers for it still",
            (
                "Only our own marker is replaced, never an absent one, and what is late needs the record's fencing "
                "token. A person's word reaches SQL first, then the marker is deleted."
            ),
        ),
        (
            54,
            "A client outlives its event loop",
            "Each loop has clients of its own, made when they are first used and gone with it.",
        ),
        (
            55,
            "Under `hold` a handler charges, then raises, and its retry charges again",
            "The record is in doubt, unless the exception's type is in `safe_to_retry`.",
        ),
        (
            56,
            "A function hears that the effect has not happened, and the paused holder wakes up and does it",
            (
                "`RERUN` promises no more than `rerun`: the fence lets one outcome be recorded, and the other holder is"
                " announced. `HOLD` runs nothing again before a person says so."
            ),
        ),
        (
            57,
            "The outcome waits in the marker, its message is acknowledged, and nobody writes it to SQL",
            "The message is put back, and never answered from such a marker before the record has the outcome.",
        ),
        (
            58,
            "A handler that was overtaken raises, and hides that the other one succeeded",
            "Its release finds the record finished, and the call returns the recorded outcome.",
        ),
        (
            59,
            "A lost lease or an absent store is reported as the task's failure, and the message is acknowledged",
            "In Celery tasks both put the message back.",
        ),
        (
            60,
            "The copy that was put back is lost on its way, and the original is acknowledged",
            "It is published on a channel with confirms, and acknowledged after the broker's word.",
        ),
        (
            61,
            "A handler ends after its record's time, which is completed and expired at once",
            "The finish sets the end to at least `retention` from then.",
        ),
        (
            62,
            "A cancellation or time limit strikes in the finish, and the claim is released after the effect",
            "Once the handler has returned nothing releases; what struck is raised after the outcome is recorded.",
        ),
        (
            63,
            "The handler commits its session by itself, before the outcome",
            "Its commit raises, and a handler that swallows that is not recorded, and rolled back, all the same.",
        ),
        (
            64,
            "Copies that are held longer than the visibility timeout are delivered twice, and double each time",
            (
                "A delay stays below a quarter of that timeout; each copy counts how often it was put back, and from "
                "the tenth time that is logged as a warning."
            ),
        ),
        (
            65,
            "Celery reports an `async def` task as a success though nobody awaited it",
            "A worker with such a task does not start, and a call is refused.",
        ),
        (
            66,
            "Two batches lock the same keys in opposite order",
            (
                "A batch locks its keys in their order, each once, as renewals do; after a deadlock with others it is"
                " begun again."
            ),
        ),
    ),
}

MODES = {mode.number: mode for modes in GROUPS.values() for mode in modes}
LAST = 66
