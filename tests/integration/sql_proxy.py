"""Stands between a client and its database: counts round trips on the wire, and can lose the next reply."""

from __future__ import annotations

import selectors
import socket
import threading
from typing import Self

from sqlalchemy import make_url


class Proxy:
    """Forwards connections to the server of a database URL; `url` is the same database through this proxy.

    `round_trips` counts how often a client spoke after the server had spoken. `lose_next_reply()` lets the next
    request reach the server, waits for its reply, and then cuts the connection instead of forwarding it;
    `lose_next_reply(after=2)` lets two round trips pass before.
    """

    def __init__(self, url: str) -> None:
        server = make_url(url)
        self._server = (server.host or "127.0.0.1", server.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.url = server.set(host="127.0.0.1", port=port).render_as_string(hide_password=False)
        self.round_trips = 0
        self.lost = 0
        self._loses_at = 0

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        # Closing it does not wake a thread that waits in accept().
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def lose_next_reply(self, after: int = 0) -> None:
        self._loses_at = self.round_trips + after + 1

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._forward, args=(client,), daemon=True).start()

    def _forward(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._server) as server, selectors.DefaultSelector() as ready:
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                ready.register(end, selectors.EVENT_READ)
            server_spoke = True
            asked_to_lose = False
            while True:
                for key, _ in ready.select():
                    try:
                        data = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                    except OSError:
                        return
                    if not data:
                        return
                    if key.fileobj is client:
                        self.round_trips += server_spoke
                        server_spoke = False
                        asked_to_lose = asked_to_lose or self.round_trips == self._loses_at
                        server.sendall(data)
                    elif asked_to_lose:
                        self.lost += 1
                        return
                    else:
                        server_spoke = True
                        client.sendall(data)
