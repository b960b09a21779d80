"""A handler that runs once for its key, however often its message comes."""

from idem_tasks import configure, idempotency_of, idempotent_task

configure()  # records are kept in the SQLite file idem_tasks.db

charged: list[str] = []


@idempotent_task(key="{order_id}")
def charge(order_id: str, amount: int) -> dict[str, int]:
    charged.append(order_id)  # the side effect
    return {"amount": amount}


first = charge("A-1", 500)
again = charge("A-1", 500)  # delivered again

assert first == again == {"amount": 500}
assert charged == ["A-1"]

print(idempotency_of(charge).lookup("A-1", 500))

assert idempotency_of(charge).forget("A-1", 500)  # the next delivery would run; and so does the example, if run again
