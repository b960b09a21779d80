"""A cache in the process: duplicates without a round trip, and what is given up for that.

Run it: python local_cache.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from time import sleep

from idem_tasks import Idempotency

SECONDS = 1.0  # short, to be seen here; the default is 60
shipped: list[str] = []


def ship(order_id: str) -> str:
    shipped.append(order_id)
    return f"parcel {len(shipped)}"


with TemporaryDirectory() as folder:
    url = f"sqlite:///{Path(folder) / 'records.db'}"
    with (
        Idempotency.from_urls(database_url=url, local_cache=1024, local_cache_ttl=SECONDS) as here,
        Idempotency.from_urls(database_url=url) as elsewhere,  # stands for another process, or `idem-tasks forget`
    ):

        def deliver() -> str:
            return here.run(ship, "A-1", scope="shipping", key="A-1")

        assert [deliver(), deliver()] == ["parcel 1"] * 2  # the second one asks nobody

        here.forget("shipping", "A-1")
        assert deliver() == "parcel 2"  # what is forgotten here is heard at once

        elsewhere.forget("shipping", "A-1")
        assert deliver() == "parcel 2"  # what is forgotten elsewhere is not ..
        sleep(SECONDS)
        assert deliver() == "parcel 3"  # .. until its time is over

assert shipped == ["A-1"] * 3
print(f"shipped {len(shipped)} times: once, and once more for each time that somebody forgot it")
