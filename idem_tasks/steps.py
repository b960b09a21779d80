"""The steps of a handler: each runs under its claim, and its outcome is recorded once.

begin    the outcome of an earlier attempt is returned, or it is written that the step begins
run      the step; a crash from here on runs it again, which is what provider keys are for
finish   its outcome is written, if the claim still stands, and answers every later attempt
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from idem_tasks.call import Call
from idem_tasks.claims import (
    Claim,
    EncodedOutcome,
    Lost,
    Recorded,
    Release,
    Released,
    StepBegun,
    StepFinished,
    StepsDiffer,
    step_name,
)
from idem_tasks.errors import (
    ConfigurationError,
    LeaseLostError,
    StepsChangedError,
    StoreConfigurationError,
    StoreError,
    StoreUnavailableError,
)
from idem_tasks.events import EventName
from idem_tasks.outcomes import return_type_of
from idem_tasks.replay import DOUBTFUL_SIZE, keep, type_name, value_of
from idem_tasks.runtime import FIRST_PAUSE, LONGEST_PAUSE, deadline_clock
from idem_tasks.stores.base import journal_of

A = TypeVar("A")


class Steps:
    """The steps that one run of a handler begins, one after another, counted from 1."""

    __slots__ = ("_call", "_turns", "begun")

    def __init__(self, call: Call) -> None:
        self.begun: list[str] = []
        """Their names, in the order in which they began."""
        self._call = call
        self._turns: dict[str, tuple[str, object]] = {}

    @property
    def running(self) -> str | None:
        """The name of the one that runs now."""
        turn = self._turns.get("step")
        return None if turn is None else turn[0]

    def take(
        self, claim: Claim, name: str, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Return the step's value; to an asyncio handler, what it awaits for that."""
        return self._call.services.runtime.drive(self._take(claim, name, fn, args, kwargs))

    async def _take(
        self, claim: Claim, name: str, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        call = replace(self._call, return_type=return_type_of(fn), step=name)
        invoke = call.services.runtime.invoke
        if not claim.protected or call.policy.shadow:
            return await invoke(fn, args, kwargs)
        journal_of(call.services.store)
        if claim.transaction is not None:
            claim.transaction.check_steps()
        if claim.written is not None:
            raise ConfigurationError(f"step {name!r} comes after finish_in, which ends the handler")
        call.services.codec.check(call.return_type())
        with self._turn(step_name(name)):
            self.begun.append(name)
            step = Step(call, claim, name, tuple(self.begun))
            earlier = await step.begin()
            if earlier is not None:
                return value_of(call, earlier)
            with nullcontext() if claim.transaction is None else claim.transaction.untouched():
                value = await invoke(fn, args, kwargs)
            # From here on nothing may strike between the effect and its record, as at the end of a handler.
            first = await call.services.runtime.shield(lambda: step.finish(keep(call, value)))
            return value if first is None else value_of(call, first)

    @contextmanager
    def _turn(self, name: str) -> Iterator[None]:
        """Refuse two at once: which of them is the first would be another one each time."""
        turn = (name, object())
        try:
            if self._turns.setdefault("step", turn) is not turn:
                raise ConfigurationError(
                    f"step {name!r} was begun while step {self.running!r} runs: steps run one after another, "
                    "not within each other, nor in several threads or tasks of one handler"
                )
            yield
        finally:
            # Not a lock: one that an interruption took and never gave back would refuse every later step.
            if self._turns.get("step") is turn:  # pragma: no branch - what is refused leaves by its exception
                del self._turns["step"]


@dataclass(frozen=True, slots=True)
class Step:
    """One step on its way."""

    call: Call
    claim: Claim
    name: str
    begun: tuple[str, ...]
    """The names of all steps begun so far; this one is the last."""

    async def begin(self) -> EncodedOutcome | None:
        """Write that it begins, or return the outcome that it has.

        Raises `StepsChangedError` if an earlier attempt did something else here, and `LeaseLostError`.
        """
        journal = journal_of(self.call.services.store)
        answer = await self._written(lambda: journal.begin_step(self.claim.lease, len(self.begun), self.name))
        match answer:
            case StepFinished(outcome):
                return outcome
            case StepsDiffer(earlier):
                raise await self._park(earlier)
            case Lost():
                raise self._lost()
            case StepBegun() | None:  # pragma: no branch - there is no other answer
                return None

    async def finish(self, outcome: EncodedOutcome) -> EncodedOutcome | None:
        """Write its outcome; returns another one that was there before. Raises `LeaseLostError`."""
        journal = journal_of(self.call.services.store)

        async def write() -> Recorded | StepFinished | Lost:
            return await journal.finish_step(self.claim.lease, len(self.begun), self.name, outcome)

        try:
            answer = await self._written(write, ran=True)
        except StoreUnavailableError as refused:
            if outcome.body is None or len(outcome.body) <= DOUBTFUL_SIZE:
                raise
            # Larger than MariaDB's max_allowed_packet, say: kept without it, or it would run again for ever (F43).
            first = await self.finish(replace(outcome, body=None, codec=None, not_kept="too_large"))
            self.call.announce(EventName.OUTCOME_NOT_KEPT, reason=f"{len(outcome.body)} bytes were refused ({refused})")
            return first
        if isinstance(answer, Lost):
            raise self._lost()
        return answer.outcome if isinstance(answer, StepFinished) else None

    async def _written(self, write: Callable[[], Awaitable[A]], *, ran: bool = False) -> A | None:
        """Write; while the store is away, try again as long as the lease lives. Then `StoreUnavailableError`.

        None where the policy says that a handler runs without its store.
        """
        until, pause = self.claim.deadline, FIRST_PAUSE
        while True:
            try:
                return await write()
            except StoreError as error:
                if isinstance(error, StoreConfigurationError) and not ran:
                    raise
                refused = error
            if deadline_clock() + pause >= until:
                break
            await self.call.services.runtime.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE)
        if self.call.policy.on_store_unavailable == "run" and isinstance(refused, StoreUnavailableError):
            self.call.announce(EventName.UNPROTECTED_RUN, error=str(refused))
            return None
        what = "the outcome of step" if ran else "the beginning of step"
        raise StoreUnavailableError(
            f"{what} {self.name!r} of {self.claim.scope} {self.claim.key!r} could not be recorded while its lease "
            f"lived ({refused}); the message must be delivered again"
        ) from refused

    async def _park(self, earlier: tuple[str, ...]) -> StepsChangedError | LeaseLostError:
        """Leave the record for a person, and return what to raise."""
        lease = self.claim.lease
        error = StepsChangedError(
            scope=lease.scope,
            key=lease.key,
            crashes=lease.crashes,
            failures=lease.failures,
            earlier=earlier,
            now=self.begun,
        )
        release = Release(parked=True, error_type=type_name(type(error)), error_message=str(error))
        answer = await self._written(lambda: self.call.services.store.release(lease, release))
        if not isinstance(answer, Released):
            return self._lost()
        self.call.services.heartbeat.let_go(lease.owner)
        self.claim.ending, self.claim.parked_by = answer, error
        self.call.announce(EventName.PARKED, crashes=lease.crashes, failures=lease.failures, new=True)
        return error

    def _lost(self) -> LeaseLostError:
        claim = self.claim
        return LeaseLostError(scope=claim.scope, key=claim.key, fencing_token=claim.fencing_token)
