"""How much room records and markers take: `python benchmarks/record_size.py [URL ..]`.

Makes records as handlers do (claim, then finish with an outcome of 100 bytes, one in ten renewed once) in tables of a
prefix of its own, and removes them. Prints bytes for each record with its indexes, and for a million. A `redis://` URL
is measured by the markers of finished outcomes. Without a URL: an SQLite file in a temporary folder.
"""

from __future__ import annotations

import sys
import tempfile
import uuid
from pathlib import Path

import redis
from sqlalchemy import MetaData, create_engine, text

from idem_tasks import Policy, RedisStore, SQLStore
from idem_tasks.claims import ClaimRequest, EncodedOutcome, Finished, Granted, new_owner
from idem_tasks.runtime import run_sync

RECORDS = 5_000
OUTCOME = EncodedOutcome(body=b'"' + b"x" * 98 + b'"', codec="json")
PREFIX = f"size_{uuid.uuid4().hex[:8]}_"

SIZES = {
    "postgresql": text("SELECT pg_total_relation_size(:name)"),
    "mysql": text(
        "SELECT data_length + index_length FROM information_schema.tables "
        "WHERE table_schema = database() AND table_name = :name"
    ),
    "sqlite": text("SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size() WHERE :name != ''"),
}


def request(number: int) -> ClaimRequest:
    """Make a request as a decorated task with an order's number does."""
    return ClaimRequest("shop.tasks.charge", f"order-{number:010}", "f" * 64, new_owner(), Policy(), "web-3:812 task")


def size_of_records(url: str, records: int = RECORDS) -> float:
    """Return bytes for each record, with its indexes."""
    engine = create_engine(url)
    dialect = "mysql" if engine.dialect.name == "mariadb" else engine.dialect.name
    store = SQLStore(url, table_prefix=PREFIX, create_schema=True)
    try:
        for number in range(records):
            granted = run_sync(store.claim(request(number)))
            assert isinstance(granted, Granted)
            if number % 10 == 0:
                run_sync(store.renew([granted.lease], lambda _: True))
            run_sync(store.finish(granted.lease, OUTCOME))
        with engine.connect() as connection:
            if dialect == "mysql":
                connection.execute(text(f"ANALYZE TABLE {PREFIX}records"))
            size: int = connection.execute(SIZES[dialect], {"name": f"{PREFIX}records"}).scalar_one()
            return size / records
    finally:
        run_sync(store.close())
        made = MetaData()
        made.reflect(engine, only=lambda name, _: name.startswith(PREFIX))
        made.drop_all(engine)
        engine.dispose()


def size_of_markers(url: str, records: int = RECORDS) -> float:
    """Return bytes of memory for each marker."""
    client = redis.Redis.from_url(url)
    store = RedisStore(url, prefix=PREFIX)
    used = client.info("memory")["used_memory"]
    try:
        for number in range(records):
            asked = request(number)
            run_sync(store.take(asked))
            run_sync(store.publish(asked, Finished(OUTCOME, asked.fingerprint, 3600.0, 1), 3600.0))
        return float(client.info("memory")["used_memory"] - used) / records
    finally:
        for key in client.scan_iter(f"{PREFIX}*", count=1000):
            client.delete(key)
        run_sync(store.close())


def main(urls: list[str]) -> None:
    """Measure each, and print a line."""
    with tempfile.TemporaryDirectory() as folder:
        for url in urls or [f"sqlite:///{Path(folder) / 'size.db'}"]:
            size = size_of_markers(url) if url.startswith("redis") else size_of_records(url)
            print(f"{url.partition(':')[0]:24} {size:6.0f} bytes each, {size * 1e6 / 2**20:6.0f} MiB for a million")


if __name__ == "__main__":
    main(sys.argv[1:])
