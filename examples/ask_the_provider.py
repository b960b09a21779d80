"""A worker dies after it charged: the next delivery asks the provider over HTTP, and charges nobody twice."""

import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer

from idem_tasks import RERUN, DeadClaim, Idempotency, MemoryStore, Outcome, idempotent_task

charges: list[str] = []


class Provider(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        charges.append(self.path)
        self.do_GET()

    def do_GET(self) -> None:
        self.send_response(200 if self.path in charges else 404)
        self.end_headers()
        self.wfile.write(f"receipt for {self.path}".encode())


server = HTTPServer(("127.0.0.1", 0), Provider)
threading.Thread(target=server.serve_forever, daemon=True).start()


def request(method: str, order_id: str) -> str:
    url = f"http://127.0.0.1:{server.server_port}/{order_id}"
    with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=5) as reply:
        return str(reply.read().decode())


def did_it_happen(claim: DeadClaim) -> object:
    try:
        return Outcome(request("GET", claim.key))  # it did: this is what the handler would have returned
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return RERUN  # it did not
        raise  # not known: the record stays in doubt, for a person


idem = Idempotency(store=MemoryStore())


@idempotent_task(key="{order_id}", scope="charge", on_crash=did_it_happen, idempotency=idem)
def charge(order_id: str) -> str:
    return request("POST", order_id)


# Two workers that are not heard of again: one of them after it had charged.
for order_id in ("A-1", "A-2"):
    idem.claim(scope="charge", key=order_id, lease=0.5, max_hold=0.5).__enter__()
request("POST", "A-1")
time.sleep(1.2)
assert charge("A-1") == "receipt for /A-1"
assert charge("A-2") == "receipt for /A-2"
assert charges == ["/A-1", "/A-2"]
