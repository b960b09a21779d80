"""The proxy does to connections what a bad network does."""

import socket
import socketserver
import threading
from collections.abc import Iterator

import pytest

from tests.chaos.proxy import Proxies, Proxy
from tests.services.waiting import wait_until


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(1024):
            self.request.sendall(data)


class EchoServer(socketserver.ThreadingTCPServer):
    daemon_threads = True


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """In front of a server that says what it hears."""
    proxies = Proxies()
    with EchoServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield proxies.to(server.server_address[1])
        proxies.close()
        server.shutdown()


@pytest.fixture
def client(proxy: Proxy) -> Iterator[socket.socket]:
    with connected(proxy) as client:
        assert echo(client, b"first") == b"first"
        yield client


def connected(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=5)


def echo(client: socket.socket, data: bytes) -> bytes:
    client.sendall(data)
    return client.recv(1024)


def hung_up(client: socket.socket) -> bool:
    try:
        return client.recv(1024) == b""
    except ConnectionError:
        return True


def test_a_cut_hangs_up_on_everybody(proxy: Proxy, client: socket.socket) -> None:
    """Every connection is cut, and a new one works."""
    assert proxy.cut() == 1
    assert hung_up(client)
    with connected(proxy) as again:
        assert echo(again, b"second") == b"second"


def test_a_black_hole_that_swallows_never_answers(proxy: Proxy, client: socket.socket) -> None:
    """What was sent into it is lost, and its connections are cut when it ends."""
    proxy.begin_black_hole(swallow=True)
    client.sendall(b"lost")
    client.settimeout(0.2)
    with pytest.raises(TimeoutError):
        client.recv(1024)
    client.settimeout(5)
    with connected(proxy) as meanwhile:
        wait_until(lambda: proxy.connections == 2, seconds=5, what="the proxy to accept")
        proxy.end_black_hole()
        assert hung_up(client)
        assert hung_up(meanwhile)
    with connected(proxy) as again:
        assert echo(again, b"second") == b"second"


def test_a_black_hole_that_delays_answers_late(proxy: Proxy, client: socket.socket) -> None:
    """What was sent into it arrives when it ends, also over a connection made meanwhile."""
    proxy.begin_black_hole(swallow=False)
    client.sendall(b"late")
    with connected(proxy) as meanwhile:
        meanwhile.sendall(b"too")
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1024)
        client.settimeout(5)
        proxy.end_black_hole()
        assert client.recv(1024) == b"late"
        assert meanwhile.recv(1024) == b"too"


def test_a_server_that_is_away_hangs_up(proxy: Proxy) -> None:
    """A client of a server that is not there is hung up on, and does not wait."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with connected(proxy._proxies.to(port)) as client:
        assert hung_up(client)
