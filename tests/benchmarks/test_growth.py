"""The benchmark of many records runs on few, and its document says what was found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.growth.measures import DUPLICATE, RANDOM_KEYS, RISING_KEYS
from benchmarks.growth.purging import Purged
from tests.documents.reading import REPOSITORY, table


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
    updates = table(text, "## Updates")
    assert all(float(share.removesuffix("%")) > 85 for row in updates for share in (row[2], row[4]))
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
