"""kombu's Redis transport, but for one place where it loses messages by itself.

kombu pops a message (BRPOP) and notes it among the unacknowledged ones afterwards, with another command: whoever is
killed or cut off in between has lost it, and no consumer could know. Such a loss would look like one of ours. Here
both are one script, and what blocks is a BLMOVE that leaves the queue as it is.
"""

# mypy: disable-error-code="assignment"
from __future__ import annotations

from queue import Empty
from time import monotonic, time
from typing import Any

from kombu.transport import redis
from kombu.utils.json import loads

TAKE = """
local message = redis.call('RPOP', KEYS[1])
if not message then
  return false
end
local properties = cjson.decode(message).properties
local info = properties.delivery_info
local restored_to = ',' .. cjson.encode(info.exchange) .. ',' .. cjson.encode(info.routing_key)
redis.call('HSET', KEYS[2], properties.delivery_tag, '[' .. message .. restored_to .. ']')
redis.call('ZADD', KEYS[3], ARGV[1], properties.delivery_tag)
return message
"""


class Channel(redis.Channel):
    """Takes a message and notes it as unacknowledged in one step; for one queue, of one priority."""

    def _brpop_start(self, timeout: float | None = None) -> None:
        [queue] = self.active_queues
        self._in_poll = self.client.connection
        self._brpop_sent_at = monotonic()
        seconds = timeout or getattr(self, "brpop_timeout", 1)  # it is an option since kombu 5.6
        self.client.connection.send_command("BLMOVE", queue, queue, "RIGHT", "RIGHT", seconds)

    def _brpop_read(self, **options: Any) -> bool:
        try:
            waiting = self.client.parse_response(self.client.connection, "BLMOVE", **options)
            [queue] = self.active_queues or [None]
            message = self._taken(queue) if waiting and queue else None
        except self.connection_errors:
            self.client.connection.disconnect()
            raise
        finally:
            self._in_poll = None
        if message is None:
            raise Empty
        self.connection._deliver(loads(message.decode()), queue)
        return True

    def _taken(self, queue: str) -> bytes | None:
        """None when another worker was faster."""
        with self.conn_or_acquire() as client:
            taken = client.eval(TAKE, 3, queue, self.unacked_key, self.unacked_index_key, time())
        return None if taken is None else bytes(taken)


class Transport(redis.Transport):
    """`redis://`, as long as kombu is told of it."""

    Channel = Channel
