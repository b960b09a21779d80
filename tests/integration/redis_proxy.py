"""A proxy in front of a Redis that changes, refuses or swallows commands, as old, strange and far away servers do."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

Command = list[bytes]
Rule = Callable[[Command], Command | bytes | None]
"""Returns the command to send on, or a reply to give at once, or None: send it on, and hang up before the reply."""


@contextmanager
def proxy(port: int, rule: Rule) -> Iterator[str]:
    """Return the URL of a proxy to the Redis on this port, as long as the context lasts."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            with socket.create_connection(("127.0.0.1", port)) as upstream, upstream.makefile("rb") as replies:
                while command := read_command(cast("BinaryIO", self.rfile)):
                    changed = rule(command)
                    if isinstance(changed, bytes):
                        self.wfile.write(changed)
                        continue
                    upstream.sendall(written(command if changed is None else changed))
                    reply = read_reply(replies)
                    if changed is None:
                        return
                    self.wfile.write(reply)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        request_queue_size = 128

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"redis://127.0.0.1:{server.server_address[1]}/0"
        server.shutdown()
        thread.join()


def read_command(stream: BinaryIO) -> Command:
    """Read an array of strings; empty at the end of the stream."""
    try:
        head = stream.readline()
        return [stream.read(int(stream.readline()[1:]) + 2)[:-2] for _ in range(int(head[1:] or 0))]
    except ConnectionError:
        return []


def written(command: Command) -> bytes:
    return b"*%d\r\n" % len(command) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in command)


def read_reply(stream: BinaryIO) -> bytes:
    """Read one whole reply of RESP2."""
    head = stream.readline()
    length = int(head[1:]) if head[:1] in (b"$", b"*") else -1
    if head[:1] == b"$" and length >= 0:
        return head + stream.read(length + 2)
    return head + b"".join(read_reply(stream) for _ in range(length))
