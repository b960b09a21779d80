"""Whether many records are felt: `python -m benchmarks.growth [--quick] [--rows N ..] [--folder FOLDER]`.

`make growth` does the same. Fills tables of PostgreSQL with records, measures calls on all of them in turns, and
writes GROWTH.md and growth.png into the folder: benchmarks/, or for other sizes .benchmarks/. The server is one of its
own, or what IDEM_TASKS_TEST_POSTGRES_URL names.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path

from benchmarks import machine
from benchmarks.cores import client_cores, on_cores
from benchmarks.growth.document import document
from benchmarks.growth.measures import FULL, QUICK, measure_growth
from benchmarks.growth.picture import draw
from benchmarks.growth.server import postgres, settings
from benchmarks.growth.tables import RecordsTable
from benchmarks.place import new_place

HERE = Path(__file__).parents[2]
ROWS = (10_000, 1_000_000, 10_000_000)
ROWS_IN_QUICK = (10_000, 100_000)

BYTES_EACH = 2_000
"""Of disk for a record while the table is filled, with the log that PostgreSQL keeps of it."""


def main(arguments: list[str]) -> int:
    """Fill, measure and write; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two small tables, in half a minute")
    parser.add_argument("--rows", type=int, nargs="+", help="how many records the tables have")
    parser.add_argument("--folder", type=Path, help="where GROWTH.md and growth.png go")
    given = parser.parse_args(arguments)
    if given.rows and min(given.rows) < 1:
        parser.error("--rows: a table has one record at least")
    wanted = sorted(given.rows or (ROWS_IN_QUICK if given.quick else ROWS))
    folder = given.folder or (HERE / "benchmarks" if wanted == sorted(ROWS) else HERE / ".benchmarks")
    load = os.getloadavg()[0]
    with postgres() as server:
        sizes = [rows for rows in wanted if rows * BYTES_EACH < shutil.disk_usage(server.folder).free]
        if not sizes:
            parser.error(f"the disk has no room for {wanted[0]:,} records")
        facts = machine.description(server, load) | {"settings": settings(server.postgres)}
        if sizes != wanted:
            facts["not measured"] = f"{', '.join(f'{rows:,}' for rows in wanted[len(sizes) :])} records: no room"
        with new_place(server, ("postgres",)) as place, on_cores(client_cores()), ExitStack() as stack:
            tables = [stack.enter_context(closing(RecordsTable(place.postgres, rows))) for rows in sizes]
            for table in tables:
                say(f"{table.rows:,} records ..")
                say(f"{table.fill():,.0f} a second were made")
            found = measure_growth(tables, QUICK if given.quick else FULL, say)
    facts["load after the run"] = f"{os.getloadavg()[0]:.2f}, its own included"
    folder.mkdir(parents=True, exist_ok=True)
    draw(found, folder / "growth.png")
    command = " ".join(["make growth", *(["QUICK=1"] if given.quick else [])])
    if given.rows:
        command = f"sh scripts/growth {' '.join(arguments)}"
    (folder / "GROWTH.md").write_text(document(found, facts, command), encoding="utf-8")
    print(f"written: {folder / 'GROWTH.md'}")
    return 0


def say(what: str) -> None:
    """Tell who waits what is going on."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
