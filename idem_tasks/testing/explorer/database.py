"""The user's own database, where the records are too: rows that a handler writes are committed with its outcome.

As in SQL a transaction has three round trips after its handler's own: it begins by seeing its record under its claim,
writes the outcome, which locks that row, and commits. Whoever else wants the row waits until the transaction has ended.
A commit whose sender is gone may still be on its way, and holds the lock until it arrives or the database gives it up.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from idem_tasks.claims import EncodedOutcome, Finished, Lease, Lost, Recorded, State
from idem_tasks.errors import StoreUnavailableError
from idem_tasks.stores.memory import MemoryStore

_OBEYING = (State.RUNNING, State.IN_DOUBT)


class DeadlockError(Exception):
    """What a database answers whose other transactions stood in the way: this one is undone."""


class Database:
    """Transactions on the records of a `MemoryStore`, each under a lease."""

    def __init__(self, record: MemoryStore) -> None:
        self._record = record
        self.locked_by: str | None = None
        """The owner whose transaction has written its outcome, and has not ended."""
        self.commit_is_late = False
        """Whether its commit is on its way, though nobody waits for it any more."""

    async def see_record(self, lease: Lease) -> bool:
        """Tell whether the record is there under this lease."""
        return await self._stands(lease)

    async def write_outcome(self, lease: Lease, _outcome: EncodedOutcome) -> bool:
        """Lock the record for this outcome; False if the fence missed."""
        if not await self._stands(lease):
            return False
        self.locked_by = lease.owner
        return True

    async def commit_rows(self, lease: Lease, outcome: EncodedOutcome, _rows: tuple[str, ...]) -> None:
        """Commit the outcome and the rows."""
        self.unlock(lease.owner)
        await self._record.finish(lease, outcome)

    async def look_after(self, lease: Lease) -> Recorded | Finished | Lost | None:
        """Tell how a transaction under this lease ended; None: it left nothing, and the lease stands."""
        if await self._stands(lease):
            return None
        # A record that has ended changes nothing here, and tells whose outcome it is.
        return await self._record.finish(lease, EncodedOutcome())

    async def _stands(self, lease: Lease) -> bool:
        record = await self._record.get(lease.scope, lease.key)
        return (
            record is not None
            and record.state in _OBEYING
            and (record.owner, record.fencing_token) == (lease.owner, lease.fencing_token)
        )

    def unlock(self, owner: str) -> None:
        """End this owner's transaction: what is not committed is undone."""
        if self.locked_by == owner:
            self.locked_by, self.commit_is_late = None, False


class SimulatedTransaction:
    """A session whose rows are in a list, with the verbs of `stores.base.Transaction`."""

    def __init__(self, database: Database, stepped: Any, lease: Lease) -> None:
        """`stepped` are the verbs of the `database`, stopping at every round trip."""
        self.session: list[str] = []
        self.commit_begun = False
        self.may_be_committed = False
        self.is_cut_off = False
        self._database = database
        self._stepped = stepped
        self._lease = lease

    async def begin(self) -> Finished | Lost | None:
        if await self._ask("see_record"):
            return None
        answer = await self.look()
        return answer if isinstance(answer, Finished) else Lost()

    async def commit(self, outcome: EncodedOutcome) -> bool:
        self.commit_begun = True
        if not await self._ask("write_outcome", outcome):
            return False
        self.may_be_committed = True
        await self._ask("commit_rows", outcome, tuple(self.session))
        return True

    async def _ask(self, verb: str, *args: Any) -> Any:
        try:
            return await getattr(self._stepped, verb)(self._lease, *args)
        except StoreUnavailableError:
            self.is_cut_off = True
            raise

    async def roll_back(self, *, throw_away: bool) -> None:
        if not self._database.commit_is_late:
            self._database.unlock(self._lease.owner)

    async def look(self) -> Recorded | Finished | Lost | None:
        answer: Recorded | Finished | Lost | None = await self._stepped.look_after(self._lease)
        return answer

    async def close(self) -> None:
        pass

    def is_conflict(self, error: BaseException) -> bool:
        return isinstance(error, DeadlockError)

    def check_steps(self) -> None:
        pass

    def untouched(self) -> AbstractContextManager[None]:
        return nullcontext()
