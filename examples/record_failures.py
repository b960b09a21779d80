"""Failures: a passing one is tried again, a final one is the outcome, and too many are parked."""

from idem_tasks import Idempotency, MemoryStore, ParkedError, idempotent_task

idem = Idempotency(store=MemoryStore())
asked: list[str] = []


class CardDeclinedError(Exception):
    """Stays so, however often one asks."""


@idempotent_task(key="{order_id}", record_failures=CardDeclinedError, max_attempts=3, idempotency=idem)
def charge(order_id: str, card: str) -> str:
    asked.append(order_id)
    match card:
        case "declined":
            raise CardDeclinedError("insufficient funds")
        case "broken":
            raise ConnectionError
        case "busy" if len(asked) == 1:
            raise ConnectionError
    return "charged"


def deliver(order_id: str, card: str) -> str:
    try:
        return charge(order_id, card)
    except Exception as error:  # noqa: BLE001 - shown below
        return type(error).__name__


# A passing failure: the next delivery runs again.
assert [deliver("A-1", "busy"), deliver("A-1", "busy")] == ["ConnectionError", "charged"]

# A final one: the provider is asked once, and every delivery gets the same failure.
asked.clear()
assert [deliver("A-2", "declined") for _ in range(3)] == ["CardDeclinedError"] * 3
assert asked == ["A-2"]

# One that does not end: after max_attempts it waits for a person.
asked.clear()
found = [deliver("A-3", "broken") for _ in range(5)]
assert found == ["ConnectionError"] * 3 + [ParkedError.__name__] * 2
assert asked == ["A-3"] * 3
print("tried again, final, parked:", *(record.state.value for record in idem.records()))
