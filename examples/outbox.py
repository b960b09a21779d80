"""An outbox: messages are kept with the outcome, and sent once that is recorded, though the network is down."""

import time

from idem_tasks import Idempotency, OutboxMessage, RelayReport, SQLStore, current_claim

sent: list[OutboxMessage] = []
network_is_down = False


def send_mail(message: OutboxMessage) -> None:
    if network_is_down:
        raise ConnectionError
    sent.append(message)


idem = Idempotency(store=SQLStore("sqlite:///outbox.db"), senders={"mail": send_mail}, observers=[])


def charge(order_id: str, card: str) -> str:
    claim = current_claim()
    claim.publish_message({"order": order_id, "text": "thank you"}, to="mail")
    claim.publish_message({"order": order_id, "text": "it is on its way"}, to="mail")
    if card == "declined":
        raise ValueError(card)
    return "charged"


def deliver(order_id: str, card: str = "good") -> str:
    return idem.run(charge, order_id, card, scope="charge", key=order_id)


# Sent after the outcome is recorded, and not again for a duplicate.
assert [deliver("A-1"), deliver("A-1")] == ["charged", "charged"]
assert [message.body["text"] for message in sent] == ["thank you", "it is on its way"]

# A handler that raises sends nothing.
sent.clear()
try:
    deliver("A-2", "declined")
except ValueError:
    assert sent == []

# The network is down: the call succeeds, and a relay sends later, in order.
network_is_down = True
assert deliver("A-3") == "charged"
network_is_down = False
time.sleep(1.1)  # a message that failed is tried again after 1, 2, 4 .. 60 seconds
assert idem.relay() == RelayReport(sent=2, failed=0, left=0)
assert [message.number for message in sent] == [0, 1]
print("sent by the relay:", *(message.body["text"] for message in sent), sep="\n  ")
