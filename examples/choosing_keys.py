"""Keys: what makes two calls one, whose keys they are, and what has to be the same."""

from dataclasses import dataclass
from datetime import date

from idem_tasks import (
    FingerprintMismatchError,
    Idempotency,
    InvalidKeyError,
    MemoryStore,
    idempotency_of,
    idempotent_task,
)

idem = Idempotency(store=MemoryStore())


@dataclass
class Order:
    id: str | None
    amount: int


# From a field of an argument. The scope is named, so that the function may be renamed.
@idempotent_task(key="{order.id}", scope="charge", idempotency=idem)
def charge(order: Order) -> int:
    return order.amount


assert charge(Order("A-1", 500)) == 500

# No key is an error, never an unprotected run.
try:
    charge(Order(None, 500))
    raise AssertionError
except InvalidKeyError as error:
    print(error)

# The same key with other arguments is a mistake somewhere, and refused.
try:
    charge(Order("A-1", 900))
    raise AssertionError
except FingerprintMismatchError as error:
    print(error)


# Once a day for each customer of each tenant; the request's id may differ and is not compared.
@idempotent_task(key="{customer}:{day}", scope="{tenant}/report", fingerprint=["customer", "day"], idempotency=idem)
def report(tenant: str, customer: str, day: date, request_id: str) -> str:
    return f"{tenant}: {customer} on {day}, as asked by {request_id}"


monday = date(2030, 1, 7)
first = report("acme", "c1", monday, "r1")
assert report("acme", "c1", monday, "r2") == first  # the recorded outcome
assert report("other", "c1", monday, "r3") != first  # another tenant
assert idempotency_of(report).key_for("acme", "c1", monday, "r1") == "c1:2030-01-07"
