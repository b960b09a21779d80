"""At most once: what may have happened is not done again, until a person has looked."""

from idem_tasks import Idempotency, InDoubtError, MemoryStore, State, idempotent_task

idem = Idempotency(store=MemoryStore())
provider: list[str] = []


class ProviderRefusedConnectionError(Exception):
    """Proves that nothing happened: the request was never sent."""


@idempotent_task(
    key="{order_id}", scope="charge", on_crash="hold", safe_to_retry=ProviderRefusedConnectionError, idempotency=idem
)
def charge(order_id: str) -> str:
    if order_id == "A-2" and not provider:
        raise ProviderRefusedConnectionError
    provider.append(order_id)  # the provider charges ..
    raise TimeoutError  # .. and its answer does not arrive


def deliver(order_id: str) -> str:
    try:
        return charge(order_id)
    except Exception as error:  # noqa: BLE001 - shown below
        return type(error).__name__


# Safe to retry: released, and the next delivery runs.
assert deliver("A-2") == "ProviderRefusedConnectionError"
assert [record.key for record in idem.records(state=State.RELEASED)] == ["A-2"]

# Not known: in doubt, and no delivery runs any more.
assert deliver("A-1") == "TimeoutError"
assert deliver("A-1") == deliver("A-1") == InDoubtError.__name__
assert provider == ["A-1"]

# A person looks at the provider's side, finds the charge, and says so.
[record] = idem.records(state="in_doubt")
print(f"in doubt: {record.scope} {record.key}, {record.error_type}, held by {record.holder}")
idem.resolve(record.scope, record.key, outcome="receipt 17")
assert deliver("A-1") == "receipt 17"
assert provider == ["A-1"]
