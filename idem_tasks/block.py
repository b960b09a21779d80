"""A claim around a block of code, for where no function can be decorated: `with idem.claim(...) as claim:`."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Token
from types import TracebackType
from typing import Any, Self

from idem_tasks.call import Call
from idem_tasks.claims import Claim, Finished, enter, leave
from idem_tasks.errors import ConfigurationError
from idem_tasks.replay import outcome_of_another, replay
from idem_tasks.runtime import run_sync
from idem_tasks.task import give_up, open_claim, record


class _Block:
    """What both kinds of block share: the steps of `task.perform`, with the caller's code where the handler is."""

    def __init__(self, make_call: Callable[[], Call]) -> None:
        """`make_call` is asked when the block is entered: an asyncio call belongs to the loop that runs then."""
        self.replayed = False
        """Whether the key was finished before: then `outcome` is there and the effect must not be repeated."""
        self._make_call = make_call
        self._call: Call | None = None
        self._claim: Claim | None = None
        self._outcome: Any = None
        self._has_outcome = False
        self._ended = False
        self._outside: Token[Any] | None = None

    @property
    def outcome(self) -> Any:
        """The recorded value; raises `ConfigurationError` before `complete` has recorded one."""
        if not self._has_outcome:
            raise ConfigurationError("there is no outcome before complete(value) has recorded one")
        return self._outcome

    @property
    def claim(self) -> Claim:
        """The granted claim: fencing token, attempt and so on; raises `ConfigurationError` when replayed."""
        if self._claim is None:
            raise ConfigurationError("nothing is claimed: this is a replay, or the block was not entered")
        return self._claim

    async def _open(self) -> None:
        if self._call is not None:
            raise ConfigurationError("a claim is entered once; ask for another one")
        self._call = call = self._make_call()
        opened = await open_claim(call)
        if isinstance(opened, Finished):
            self._keep(replay(call, opened))
            self._ended = self.replayed = True
        else:
            self._outside = enter(opened)
            self._claim = opened

    async def _complete(self, value: Any) -> Any:
        claim, call = self.claim, self._call
        assert call is not None
        if self._ended:
            raise ConfigurationError("this claim has its outcome already")
        self._ended = True
        return self._keep(await record(call, claim, value))

    async def _close(self, error: BaseException | None) -> bool:
        """End the block; returns whether its exception is answered by somebody else's recorded outcome (F58)."""
        call = self._call
        assert call is not None
        if self._ended:
            return False
        if error is None:
            await self._complete(None)
            return False
        self._ended = True
        recorded = await give_up(call, self.claim, error)
        if recorded is None:
            return False
        self._keep(outcome_of_another(call, recorded))
        return True

    def _keep(self, outcome: Any) -> Any:
        self._outcome, self._has_outcome = outcome, True
        return outcome

    def _leave(self) -> None:
        """Renew the claim no more, whatever struck, and make the one around this block current again."""
        if self._call is not None:
            self._call.services.heartbeat.let_go(self._call.request.owner)
        outside, self._outside = self._outside, None
        if outside is not None:
            leave(outside)


class ClaimBlock(_Block):
    """A `with` block under a claim."""

    def complete(self, value: Any = None) -> Any:
        """Record the block's outcome now, and return it; raises as a decorated handler's end does."""
        return run_sync(self._complete(value))

    def __enter__(self) -> Self:
        try:
            run_sync(self._open())
        except BaseException:  # whatever it was: there is no exit after a failed entry
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        try:
            return run_sync(self._close(error))
        finally:
            self._leave()


class AsyncClaimBlock(_Block):
    """An `async with` block under a claim."""

    async def complete(self, value: Any = None) -> Any:
        """Record the block's outcome now, and return it; raises as a decorated handler's end does."""
        return await self._complete(value)

    async def __aenter__(self) -> Self:
        try:
            await self._open()
        except BaseException:  # whatever it was: there is no exit after a failed entry
            self._leave()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        try:
            return await self._close(error)
        finally:
            self._leave()
