"""A batch that is delivered twice, and in which one message fails: each message keeps an outcome of its own."""

from dataclasses import dataclass

from idem_tasks import BatchError, Idempotency, MemoryStore, current_claims, idempotent_batch

idem = Idempotency(store=MemoryStore())


@dataclass
class Parcel:
    order: str
    label: str


class Carrier:
    """Takes many parcels in one request, and refuses some of them."""

    def __init__(self) -> None:
        self.requests: list[list[str]] = []
        self.refused = {"A-2"}

    def ship(self, orders: list[str], keys: list[str]) -> dict[str, str]:
        self.requests.append(orders)
        return {order: key[-4:] for order, key in zip(orders, keys, strict=True) if order not in self.refused}


carrier = Carrier()


@idempotent_batch(key="{message[order]}", scope="shipping", idempotency=idem)
def ship(messages: list[dict[str, str]]) -> dict[str, Parcel | Exception]:
    """Ask the carrier once for all that are new; what it does not take fails alone."""
    keys = [claim.provider_key("ship") for claim in current_claims()]
    labels = carrier.ship([message["order"] for message in messages], keys)
    return {
        message["order"]: Parcel(message["order"], labels[message["order"]])
        if message["order"] in labels
        else ValueError("refused")
        for message in messages
    }


batch = [{"order": "A-1"}, {"order": "A-2"}, {"order": "A-3"}, {"order": "A-1"}]
results: list[object] = []
try:
    ship(batch)
except BatchError as error:
    print(error)
    results = error.results
assert [type(result).__name__ for result in results] == ["Parcel", "ValueError", "Parcel", "Parcel"]

carrier.refused.clear()
parcels = ship(batch)  # delivered again: only the one that failed runs
assert [parcel.order for parcel in parcels if isinstance(parcel, Parcel)] == ["A-1", "A-2", "A-3", "A-1"]
assert carrier.requests == [["A-1", "A-2", "A-3"], ["A-2"]]
print(f"asked the carrier for {carrier.requests}")
