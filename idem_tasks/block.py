"""A claim around a block of code, for where no function can be decorated: `with idem.claim(...) as claim:`."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Token
from types import TracebackType
from typing import Any, Self

from idem_tasks.call import Call
from idem_tasks.claims import Claim, Finished, enter, leave
from idem_tasks.errors import ConfigurationError
from idem_tasks.replay import replay
from idem_tasks.runtime import run_sync
from idem_tasks.task import give_up, open_claim, record


class _Block:
    """What both kinds of block share: the steps of `task.perform`, with the caller's code where the handler is."""

    def __init__(self) -> None:
        self.replayed = False
        """Whether the key was finished before: then `outcome` is there and the effect must not be repeated."""
        self._claim: Claim | None = None
        self._outcome: Any = None
        self._ended = False
        self._entered: Token[Claim | None] | None = None

    @property
    def outcome(self) -> Any:
        """The recorded value; raises `ConfigurationError` before `complete`."""
        if not self._ended:
            raise ConfigurationError("there is no outcome before complete(value)")
        return self._outcome

    @property
    def claim(self) -> Claim:
        """The granted claim: fencing token, attempt and so on; raises `ConfigurationError` when replayed."""
        if self._claim is None:
            raise ConfigurationError("nothing is claimed: this is a replay, or the block was not entered")
        return self._claim

    async def _open(self, call: Call) -> None:
        opened = await open_claim(call)
        if isinstance(opened, Finished):
            self._outcome, self.replayed, self._ended = replay(call, opened), True, True
        else:
            self._claim = opened
            self._entered = enter(opened)

    async def _complete(self, call: Call, value: Any) -> Any:
        if self._ended:
            raise ConfigurationError("this claim has its outcome already")
        claim, self._ended = self.claim, True
        self._outcome = await record(call, claim, value)
        return self._outcome

    async def _close(self, call: Call, error: BaseException | None) -> bool:
        """End the block; returns whether its exception is answered by somebody else's recorded outcome (F58)."""
        if self._entered is not None:
            leave(self._entered)
        if self._ended:
            return False
        if error is None:
            await self._complete(call, None)
            return False
        claim, self._ended = self.claim, True
        try:
            self._outcome = await give_up(call, claim, error)
        except BaseException as raised:
            if raised is error:
                return False
            raise
        return True


class ClaimBlock(_Block):
    """A `with` block under a claim."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self._call = call

    def complete(self, value: Any = None) -> Any:
        """Record the block's outcome now, and return it; raises as a decorated handler's end does."""
        return run_sync(self._complete(self._call, value))

    def __enter__(self) -> Self:
        run_sync(self._open(self._call))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        return run_sync(self._close(self._call, error))


class AsyncClaimBlock(_Block):
    """An `async with` block under a claim."""

    def __init__(self, make_call: Callable[[], Call]) -> None:
        super().__init__()
        self._make_call = make_call

    async def complete(self, value: Any = None) -> Any:
        """Record the block's outcome now, and return it; raises as a decorated handler's end does."""
        return await self._complete(self._call, value)

    async def __aenter__(self) -> Self:
        self._call = self._make_call()  # on the event loop that it belongs to
        await self._open(self._call)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        return await self._close(self._call, error)
