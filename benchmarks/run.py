"""All benchmarks: `python -m benchmarks.run [--quick] [--only WORDS] [--folder FOLDER]`; `make bench` does the same.

Writes RESULTS.md and the pictures into the folder, which is this one if nothing else is said. With `--only` it prints
the table of those cases whose group or name has the words in it, and writes nothing.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from importlib import import_module
from pathlib import Path

from benchmarks import machine, plots, record_size, table
from benchmarks.case import CASES, Case
from benchmarks.cores import ALL, client_cores, on_cores
from benchmarks.measuring import FULL, QUICK, Effort
from benchmarks.place import Place, Server, new_place
from benchmarks.rows import Row, rows_of
from benchmarks.servers import NotEmpty, started

HERE = Path(__file__).parent
MODULES = (
    "in_memory",
    "duplicates",
    "first_calls",
    "table_size",
    "sessions",
    "at_once",
    "many",
    "through_celery",
    "peers",
)
"""Those of `cases/`, in the order of the document."""

RECORDS_IN_QUICK = 1000


def all_cases() -> list[Case]:
    """Return all cases, in the order of the document."""
    for name in MODULES:
        import_module(f"benchmarks.cases.{name}")
    return CASES


def chosen(cases: list[Case], *, quick: bool, only: str) -> list[Case]:
    """Return those that are asked for."""
    return [
        case for case in cases if (case.in_quick or not quick) and only.lower() in f"{case.group}: {case.name}".lower()
    ]


def measure_all(cases: list[Case], servers: Place, effort: Effort) -> list[Row]:
    """Measure one case after another, each on its cores, and say so."""
    rows = []
    for case in cases:
        begun = time.monotonic()
        print(f"{case.group}: {case.name} ..", end=" ", file=sys.stderr, flush=True)
        gc.collect()
        gc.freeze()  # else the collector walks through what the cases before left behind, at whatever way allocates
        with on_cores(ALL if case.all_cores else client_cores()):
            rows += rows_of(case, servers, effort)
        print(f"{time.monotonic() - begun:.0f} s", file=sys.stderr)
    return rows


def sizes_of(servers: Place, records: int) -> dict[str, float]:
    """Return the bytes of a record, or a marker, on each server that is there."""
    sizes = {}
    there: list[Server] = [name for name in ("redis", "postgres", "mariadb") if getattr(servers, name)]
    with new_place(servers, there) as place, on_cores(client_cores()):
        for name, url in (
            ("record in PostgreSQL", place.postgres),
            ("record in MariaDB", place.mariadb),
            ("record in SQLite", place.sqlite),
        ):
            if url:
                sizes[name] = record_size.size_of_records(url, records)
        if place.redis:
            sizes["marker in Redis"] = record_size.size_of_markers(place.redis, records)
    return sizes


def main(arguments: list[str]) -> int:
    """Measure what is asked for; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less of each, in less than five minutes")
    parser.add_argument("--only", default="", metavar="WORDS", help="cases with these words in their name")
    parser.add_argument("--folder", type=Path, default=HERE, help="where RESULTS.md and the pictures go")
    given = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"this machine is at work (load {load:.2f}): the figures will be worth little", file=sys.stderr)
    cases = chosen(all_cases(), quick=given.quick, only=given.only)
    if not cases:
        parser.error(f"no case has {given.only!r} in its name")
    try:
        with started({need for case in cases for need in case.needs}) as servers:
            facts = machine.description(servers, load)
            rows = measure_all(cases, servers, QUICK if given.quick else FULL)
            records = RECORDS_IN_QUICK if given.quick else record_size.RECORDS
            sizes = {} if given.only else sizes_of(servers, records)
            facts |= {"load after the run": f"{os.getloadavg()[0]:.2f}, its own included"}
    except NotEmpty as error:
        print(error, file=sys.stderr)
        return 2
    text = table.document(rows, sizes, facts, quick=given.quick)
    if given.only:
        print(text)
        return 0
    given.folder.mkdir(parents=True, exist_ok=True)
    (given.folder / "RESULTS.md").write_text(text, encoding="utf-8")
    for file in (given.folder / "RESULTS.md", *plots.draw(rows, given.folder)):
        print(f"written: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
