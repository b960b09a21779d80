"""A consumer of its own: acknowledge after the call returned, put back what has to come again."""

import time
from collections import deque
from dataclasses import dataclass, field

from idem_tasks import Idempotency, InProgressError, LeaseLostError, MemoryStore, StoreError

PUT_BACK = (InProgressError, LeaseLostError, StoreError)


@dataclass
class Broker:
    """Keeps a message until it is acknowledged, as brokers do."""

    messages: deque[dict[str, str]]
    dead: list[dict[str, str]] = field(default_factory=list)

    def put_back(self) -> None:
        self.messages.rotate(-1)
        time.sleep(0.05)  # never at once: it would spin

    def dead_letter(self) -> None:
        self.dead.append(self.messages.popleft())

    def acknowledge(self) -> None:
        self.messages.popleft()


idem = Idempotency(store=MemoryStore())
shipped: list[str] = []


def ship(message: dict[str, str]) -> str:
    shipped.append(message["order"])
    return f"parcel for {message['order']}"


def consume(broker: Broker) -> None:
    while broker.messages:
        message = broker.messages[0]
        try:
            idem.run(ship, message, scope="shipping", key=message["order"])
        except PUT_BACK:
            broker.put_back()
        except Exception:  # noqa: BLE001 - the handler's own, or a message that can never be handled
            broker.dead_letter()
        else:
            broker.acknowledge()


broker = Broker(deque([{"order": "A-1"}, {"order": "A-2"}, {"order": "A-1"}, {"order": ""}]))
consume(broker)
assert shipped == ["A-1", "A-2"]
assert broker.dead == [{"order": ""}]  # no key: an error, never an unprotected run
print(f"shipped {shipped}, dead letters {broker.dead}")
