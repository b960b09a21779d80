"""Single commands on connections that are kept at hand: half of what a client of redis-py takes for one.

Its client takes locks for its pool, and counts. Here a connection is at hand only if the last reply on it was read to
its end, and is used only if nothing has come on it since.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import Any

from redis import ConnectionPool, exceptions


class KeptConnections:
    """Connections like a pool's, which threads take turns on; as many are kept as were ever in use at once.

    `retries` is how often a command is sent again that got no reply because its connection was lost.
    """

    def __init__(self, pool: ConnectionPool, *, retries: int) -> None:
        self._like = pool
        self._retries = retries
        self._idle: deque[Any] = deque()  # whose pop and append are atomic

    def execute_command(self, *command: Any, **_: Any) -> Any:
        """Send a command and return the reply as it came, or raise what a client of redis-py does."""
        connection = self._at_hand()
        if connection is None:
            connection = self._like.connection_class(**self._like.connection_kwargs)
            connection.connect()
        retries_left = self._retries
        while True:
            try:
                connection.send_packed_command(connection.pack_command(*command))
                reply = connection.read_response()
            except exceptions.ConnectionError:
                connection.disconnect()  # and the next command connects it anew
                if not retries_left:
                    raise
                retries_left -= 1
            except exceptions.ResponseError:
                self._idle.append(connection)
                raise
            except BaseException:
                # The reply may still be to come: it would be taken for that to the next command, of another key.
                connection.disconnect()
                raise
            else:
                self._idle.append(connection)
                return reply

    def close(self) -> None:
        """Close those that are not in use."""
        while (connection := self._popped()) is not None:
            connection.disconnect()

    def _at_hand(self) -> Any:
        """Return one that has nothing to say: what nobody asked for would answer the next command."""
        connection = self._popped()
        if connection is None:
            return None
        with suppress(exceptions.ConnectionError, exceptions.TimeoutError, OSError):  # as redis-py's pool does
            if not connection.can_read():
                return connection
        connection.disconnect()
        return None

    def _popped(self) -> Any:
        try:
            return self._idle.pop()
        except IndexError:
            return None
