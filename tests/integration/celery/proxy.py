"""A TCP proxy that swallows what a client sends, and cuts its connection, when the test says so."""

import select
import socket
import threading
from contextlib import suppress


class Proxy:
    """Listens on `port` and passes everything on to a server, but for `swallow` chunks that hold `marked`."""

    def __init__(self, server: tuple[str, int], marked: bytes) -> None:
        self.server = server
        self.marked = marked
        self.swallow = 0  # how many more of them to swallow
        self.swallowed = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._open: list[socket.socket] = []
        self._threads[0].start()

    def close(self) -> None:
        for one in [self._listener, *self._open]:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(timeout=5)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(client,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self.server) as server:
            self._open += [client, server]
            with suppress(OSError):
                while True:
                    readable, _, _ = select.select([client, server], [], [])
                    if not all(self._pass_on(one, server if one is client else client, client) for one in readable):
                        return

    def _pass_on(self, source: socket.socket, target: socket.socket, client: socket.socket) -> bool:
        chunk = source.recv(65536)
        if source is client and self.swallow > 0 and self.marked in chunk:
            self.swallow -= 1
            self.swallowed += 1
            return False
        target.sendall(chunk)
        return bool(chunk)
