"""A session of the user's in which a handler's writes and the mark of its partition are committed together.

Whoever has the row of the mark locked is the only one at work in that partition. A worker that was paused, and whose
partition is another's since, finds the mark beyond its message, or moved under it, and commits nothing.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection

from idem_tasks.errors import ConfigurationError
from idem_tasks.stores.base import MarkPlace
from idem_tasks.stores.sql_claims import longest_idle
from idem_tasks.stores.sql_sessions import GuardedTransaction
from idem_tasks.stores.sql_statements import Statements
from idem_tasks.stores.sql_watermarks import parameters


class MarkedTransaction(GuardedTransaction):
    """A session in which the handler's writes and the mark of its partition are committed together."""

    def __init__(self, *args: Any, place: MarkPlace, max_hold: float, **kwargs: Any) -> None:
        """`max_hold` is how long, in seconds, it may keep the row locked without a statement (PostgreSQL only)."""
        super().__init__(*args, **kwargs)
        self._place = place
        self._max_hold = max_hold
        self.mark = 0
        """The offset of the first message whose effects are not committed, once it has begun."""

    async def begin(self) -> None:
        """Begin, and lock the mark; raises `RowLockedError` while another transaction has it."""
        await super().begin()
        seen, bound_to = await self._do(self._begin)
        if not seen:
            raise ConfigurationError(
                f"session= is bound to {bound_to}, which has no table {self._table.fullname}: the marks have to be in "
                "the database of the handler's effects; make it by: idem-tasks init-db --database-url URL"
            )

    def _see(self, sql: Statements, connection: Connection) -> bool:
        statements, values = sql.watermarks, parameters(self._place)
        if sql.kind == "postgresql":
            values |= longest_idle(self._max_hold)
        # SQLite begins by writing, which takes the write lock at once: see Statements.begin.
        row = None if sql.kind == "sqlite" else connection.execute(statements.lock, values).one_or_none()
        if row is None:
            connection.execute(statements.insert, parameters(self._place))
            row = connection.execute(statements.lock, values).one()
        self.mark = row.next_offset
        return True

    async def advance(self, offset: int) -> bool:
        """Move the mark behind the message at this offset, as the last thing, and commit.

        False, and nothing is committed, where somebody else has moved it since: the row was not locked any more.
        """
        values = parameters(self._place) | {"seen_offset": offset, "new_offset": offset + 1}
        return all(
            await self.finish(lambda sql, connection: [connection.execute(sql.watermarks.move, values).rowcount == 1])
        )
