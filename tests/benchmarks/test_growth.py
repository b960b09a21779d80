"""The benchmark of many records runs on few, and its document says what was found."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from benchmarks.growth.measures import DUPLICATE, RANDOM_KEYS, RISING_KEYS, calling, known_keys
from benchmarks.growth.purging import Purged
from benchmarks.growth.tables import FIRST, RecordsTable
from benchmarks.orders import AMOUNT
from benchmarks.partitioning import partition
from benchmarks.server_cpu import cpu_of
from tests.documents.reading import REPOSITORY, table
from tests.services.redis_server import RedisServer


def test_a_quick_run_fills_every_table(postgres_url: str, tmp_path: Path) -> None:
    """Each size has its figures: finishes are HOT, and all that was over is purged."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.growth", "--quick", "--folder", str(tmp_path)],
        cwd=REPOSITORY,
        env=os.environ | {"IDEM_TASKS_TEST_POSTGRES_URL": postgres_url},
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "GROWTH.md").read_text()
    sizes = ["10,000", "100,000"]
    calls = table(text, "## Calls")
    assert [row[:2] for row in calls] == [
        [kind, size] for kind in (RANDOM_KEYS, RISING_KEYS, DUPLICATE) for size in sizes
    ]
    assert [row[4] for row in calls if row[1] == sizes[0]] == ["1.00"] * 3
    assert all(500 < float(row[5]) < 1000 for row in table(text, "## Bytes"))
    # Nearly all of them are, but 40 % where nothing can be pruned meanwhile: while autovacuum analyzes a table, say.
    updates = table(text, "## Updates")
    assert all(float(share.removesuffix("%")) > 30 for row in updates for share in (row[2], row[4]))
    assert [row[1] for row in table(text, "## Purge")] == ["2,500", "25,000"]
    assert [row[0] for row in table(text, "## First calls beside a purge")] == sizes
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_purge_did_is_added_up() -> None:
    """A batch that is not full was the last, and the first and the last tenth are told apart."""
    purged = Purged([(1000, 0.1)] * 10)
    assert (purged.records, purged.is_all) == (10_000, False)
    purged.add(Purged([(1000, 0.2)] * 9 + [(10, 0.01)]))
    assert purged.is_all
    first, last = purged.rates_of_tenths
    assert (round(first), round(last)) == (10_000, round(1010 / 0.21))


def test_a_table_that_is_filled_is_partitioned(postgres_url: str) -> None:
    """Its records answer, and new ones come to them."""
    with closing(RecordsTable(postgres_url, 1_000)) as records:
        records.fill()
        assert partition(records) > 0
        with calling(records) as charge:
            assert charge(known_keys(records)(), AMOUNT)["receipt"] == f"R-{FIRST}"
            assert charge("new", AMOUNT)["receipt"] == "R-new"


def test_the_cpu_of_a_server_is_counted(private_redis: Callable[..., RedisServer]) -> None:
    """What it does for its clients is seen."""
    server = private_redis()
    before = cpu_of(server)
    with server.client() as client:
        client.eval("for i = 1, 3000000 do local x = i * i end", 0)
    assert cpu_of(server) > before
