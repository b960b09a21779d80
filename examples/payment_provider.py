"""A payment provider as a server on this machine: it does what it is asked once for each `Idempotency-Key`.

With an empty key it charges again each time, as any provider does. payments.py talks to it over HTTP.
"""

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any


class Provider(ThreadingHTTPServer):
    """Remembers its answer under each key, and lists every charge that it really made."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.charges: list[dict[str, Any]] = []
        self.answers: dict[str, bytes] = {}
        self.lock = Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/charges"


class Requests(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        provider, key = self.server, self.headers.get("Idempotency-Key", "")
        assert isinstance(provider, Provider)
        charge = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with provider.lock:
            if not key or key not in provider.answers:
                provider.charges.append(charge)
                provider.answers[key] = json.dumps({"id": f"ch_{len(provider.charges)}", **charge}).encode()
            answer = provider.answers[key]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name in the standard library
        """Say nothing."""


@contextmanager
def running() -> Iterator[Provider]:
    with Provider() as provider:
        Thread(target=provider.serve_forever, daemon=True).start()
        yield provider
        provider.shutdown()


def charge(url: str, amount: int, key: str) -> str:
    """Ask the provider to charge; returns the charge's id."""
    request = urllib.request.Request(url, json.dumps({"amount": amount}).encode(), {"Idempotency-Key": key})  # noqa: S310
    with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310 - it is this machine
        return str(json.load(answer)["id"])
