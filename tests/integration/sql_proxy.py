"""Stands between a client and its database: counts round trips on the wire, can lose a reply, and can go away."""

from __future__ import annotations

import contextlib
import math
import selectors
import socket
import threading
from collections.abc import Callable
from typing import Self

from sqlalchemy import make_url

_GOODBYES = frozenset({b"X\x00\x00\x00\x04", b"\x01\x00\x00\x00\x01"})
"""What a client of PostgreSQL, and one of MySQL, says before it hangs up. It waits for no answer, and it may come here
long after its maker went on."""


class Proxy:
    """Forwards connections to the server of a database URL; `url` is the same database through this proxy.

    `round_trips` counts how often a client spoke after the server had spoken, but for its goodbyes.

    `lose_next_reply()` lets the next request reach the server, waits for its reply, and then cuts the connection
    instead of forwarding it; `lose_next_reply(after=2)` lets two round trips pass before.

    `go_away()` cuts all connections, and then hangs up on new ones, or (`silently`) leaves them without a word, until
    `come_back()`; `go_away(turns=3)` lets the fourth in. `go_away_with_next_reply()` goes once the next reply is lost.
    """

    def __init__(self, url: str) -> None:
        server = make_url(url)
        self._server = (server.host or "127.0.0.1", server.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.url = server.set(host="127.0.0.1", port=port).render_as_string(hide_password=False)
        self.round_trips = 0
        self.lost = 0
        self.turned_away = 0
        self._loses_at = 0
        self._goes_with_reply: tuple[float, bool] | None = None
        self._turns_left: float = 0
        self._silently = False
        self._clients: set[socket.socket] = set()

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        # Closing it does not wake a thread that waits in accept().
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        self._cut()

    def lose_next_reply(self, after: int = 0) -> None:
        self._loses_at = self.round_trips + after + 1

    def go_away(self, *, turns: float = math.inf, silently: bool = False) -> None:
        self._turns_left, self._silently = turns, silently
        self._cut()

    def go_away_with_next_reply(self, *, turns: float = math.inf, silently: bool = False) -> None:
        self.lose_next_reply()
        self._goes_with_reply = turns, silently

    def come_back(self) -> None:
        self._turns_left = 0
        self._cut()

    def _cut(self) -> None:
        for client in list(self._clients):
            with contextlib.suppress(OSError):  # closed meanwhile
                client.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._clients.add(client)
            serve = self._forward
            if self._turns_left > 0:
                self._turns_left -= 1
                self.turned_away += 1
                serve = self._say_nothing if self._silently else self._hang_up
            threading.Thread(target=self._serve, args=(client, serve), daemon=True).start()

    def _serve(self, client: socket.socket, serve: Callable[[socket.socket], None]) -> None:
        # An OSError: one end is gone while it was spoken to.
        with client, contextlib.suppress(OSError):
            serve(client)
        self._clients.discard(client)

    def _hang_up(self, client: socket.socket) -> None:
        pass

    def _say_nothing(self, client: socket.socket) -> None:
        while client.recv(1 << 16):
            pass

    def _forward(self, client: socket.socket) -> None:
        with socket.create_connection(self._server) as server, selectors.DefaultSelector() as ready:
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                ready.register(end, selectors.EVENT_READ)
            server_spoke = True
            asked_to_lose = False
            while True:
                for key, _ in ready.select():
                    data = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                    if not data or self._turns_left > 0:
                        return
                    if key.fileobj is client:
                        if data not in _GOODBYES:
                            self.round_trips += server_spoke
                            server_spoke = False
                        asked_to_lose = asked_to_lose or self.round_trips == self._loses_at
                        server.sendall(data)
                    elif asked_to_lose:
                        self.lost += 1
                        if self._goes_with_reply is not None:
                            turns, silently = self._goes_with_reply
                            self.go_away(turns=turns, silently=silently)
                        return
                    else:
                        server_spoke = True
                        client.sendall(data)
