"""First calls beside many former records: an index that grows must not be felt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

from benchmarks.by_hand.records import PostgresRecords
from benchmarks.case import case
from benchmarks.measuring import Here
from benchmarks.orders import AMOUNT, decorated, new_orders
from benchmarks.place import Place
from idem_tasks import Idempotency, SQLStore

GROUP = "First call beside former records"
FEW, MANY = 10_000, 1_000_000

FILL = """
INSERT INTO {prefix}records (scope, key, state, fencing_token, owner, fingerprint, attempts, failures, crashes,
    generation, holder, outcome, codec, lease_expires_at, created_at, updated_at, completed_at, expires_at)
SELECT 'former', md5(n::text), 'completed', n, md5(n::text), md5(n::text) || md5(n::text), 1, 0, 0, 1, 'bench',
    convert_to(repeat('x', 100), 'UTF8'), 'json', now(), now(), now(), now(), now() + n * interval '1 second'
FROM generate_series(1, %s) AS n
"""


@case(GROUP, "PostgreSQL alone", needs=("postgres",), floor=f"{FEW:,} records", counted=False, in_quick=False)
@contextmanager
def former_records(place: Place) -> Iterator[dict[str, Here]]:
    """The same call on a small table and on a large one."""
    ways = {}
    order = new_orders()
    with ExitStack() as stack:
        records = stack.enter_context(closing(PostgresRecords(place.postgres)))
        for number in (FEW, MANY):
            prefix = f"beside_{number}_"
            idempotency = stack.enter_context(
                Idempotency(store=SQLStore(place.postgres, table_prefix=prefix, create_schema=True))
            )
            idempotency.prepare()
            records.connection.execute(FILL.format(prefix=prefix), (number,))
            records.connection.execute(f"VACUUM ANALYZE {prefix}records")
            call = decorated(idempotency)
            ways[f"{number:,} records"] = Here(lambda call=call: call(order(), AMOUNT))  # type: ignore[misc]
        yield ways
