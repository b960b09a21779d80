"""A table that is partitioned by the hash of its key keeps every promise: one record a key, and what is live stays."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import NullPool, create_engine, text

from idem_tasks.claims import Finished, Granted, InProgress
from idem_tasks.stores.sql import SQLStore
from idem_tasks.testing.driver import Driver
from idem_tasks.testing.store_in_use import SHORT, StoreInUse

PARTITIONED = {
    "postgres_url": [
        "ALTER TABLE idem_tasks_records RENAME TO whole",
        "CREATE TABLE idem_tasks_records (LIKE whole INCLUDING ALL) PARTITION BY HASH (scope, key)",
        *(
            f"CREATE TABLE part_{number} PARTITION OF idem_tasks_records "
            f"FOR VALUES WITH (MODULUS 4, REMAINDER {number})"
            for number in range(4)
        ),
        "DROP TABLE whole",
    ],
    "mariadb_url": ["ALTER TABLE idem_tasks_records PARTITION BY KEY (scope, `key`) PARTITIONS 4"],
}
KEYS = [f"key-{number}" for number in range(20)]


@pytest.fixture(params=["postgres_url", "mariadb_url"])
def use(request: pytest.FixtureRequest) -> Iterator[StoreInUse]:
    url = request.getfixturevalue(request.param)
    with Driver("blocking") as driver:
        use = StoreInUse(SQLStore(url, create_schema=True), driver)
        driver(use.store.prepare())
        with create_engine(url, poolclass=NullPool).begin() as connection:
            for statement in PARTITIONED[request.param]:
                connection.execute(text(statement))
        yield use
        driver(use.store.close())


def test_a_key_has_one_record_in_all_partitions(use: StoreInUse) -> None:
    """It is granted once, whatever its state and time are by then, and taken over once (F13)."""
    for key in KEYS:
        lease = use.granted(key)
        assert isinstance(use.claim(key), InProgress)
        use.release(lease)
        assert isinstance(use.claim(key, lease=SHORT), Granted)
    for key in KEYS:
        use.finish(use.taken_over(key))
        assert isinstance(use.claim(key), Finished)
    assert sum(use.driver(use.store.stats()).values()) == len(KEYS)


def test_a_purge_takes_no_live_record_of_another_partition(use: StoreInUse) -> None:
    """Rows at the same place of two partitions are told apart: what has ended goes, what is live stays (F47)."""
    over = KEYS[::2]
    for key in over:
        use.finish(use.granted(key, lease=0.1, max_hold=0.1, retention=0.1))
    for key in KEYS[1::2]:
        use.granted(key)
    use.driver.pause(0.4)
    purged = use.purge(limit=3) + use.purge()
    assert sorted(purged) == sorted((use.scope, key) for key in over)
    assert [key for key in KEYS if use.get(key) is None] == over
