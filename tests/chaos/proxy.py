"""TCP proxies that pass on, cut or swallow what clients and their server say to each other."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

SECONDS_TO_ANSWER = 10.0


class Proxies:
    """The thread in which all proxies of a run work."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxies", daemon=True)
        self._thread.start()

    def to(self, port: int) -> Proxy:
        """A proxy in front of this port of 127.0.0.1, which need not answer yet."""
        return self.run(Proxy.open(self, port))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=SECONDS_TO_ANSWER)

    def close(self) -> None:
        self.run(self._cancel_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=SECONDS_TO_ANSWER)
        self._loop.close()

    async def _cancel_all(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


class Proxy:
    """One proxy; `port` is what clients are told."""

    def __init__(self, proxies: Proxies, server_port: int, port: int) -> None:
        self.port = port
        self._proxies = proxies
        self._server_port = server_port
        self._clients: set[asyncio.StreamWriter] = set()
        self._servers: set[asyncio.StreamWriter] = set()
        self._clear = asyncio.Event()
        self._clear.set()
        self._swallows = False

    @classmethod
    async def open(cls, proxies: Proxies, server_port: int) -> Proxy:
        listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        proxy = cls(proxies, server_port, listener.getsockname()[1])
        proxy._listening = asyncio.create_task(proxy._listen(listener))
        return proxy

    _listening: asyncio.Task[None]

    @property
    def connections(self) -> int:
        return len(self._clients)

    def cut(self) -> int:
        """Cut all connections at once, with whatever is on its way; returns how many there were."""
        return self._proxies.run(self._cut())

    def begin_black_hole(self, *, swallow: bool) -> None:
        """Let nothing through, and accept connections that are never answered.

        `swallow`: what is sent meanwhile is lost, and the connections are cut at the end. Otherwise it arrives then.
        """
        self._proxies.run(self._begin(swallow))

    def end_black_hole(self) -> None:
        self._proxies.run(self._end())

    async def _cut(self) -> int:
        for writer in self._clients | self._servers:
            writer.transport.abort()
        return len(self._clients)

    async def _begin(self, swallow: bool) -> None:
        self._swallows = swallow
        self._clear.clear()

    async def _end(self) -> None:
        if self._swallows:
            await self._cut()
        self._swallows = False
        self._clear.set()

    async def _listen(self, listener: socket.socket) -> None:
        server = await asyncio.start_server(self._serve, sock=listener)
        async with server:
            await server.serve_forever()

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        self._clients.add(to_client)
        to_server: asyncio.StreamWriter | None = None
        try:
            await self._clear.wait()
            server, to_server = await asyncio.open_connection("127.0.0.1", self._server_port)
            self._servers.add(to_server)
            ways = {
                asyncio.create_task(self._pass_on(client, to_server)),
                asyncio.create_task(self._pass_on(server, to_client)),
            }
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        except (OSError, asyncio.CancelledError):  # the server is away, or the run is over: the client is hung up on
            pass
        finally:
            self._clients.discard(to_client)
            to_client.close()
            if to_server is not None:
                self._servers.discard(to_server)
                to_server.close()

    async def _pass_on(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(1 << 16):
            if self._swallows:
                continue
            await self._clear.wait()
            target.write(data)
            await target.drain()
