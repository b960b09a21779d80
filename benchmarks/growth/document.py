"""Writes `GROWTH.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.growth.measures import OPEN, Found, Timed
from benchmarks.growth.purging import BATCH, Purged

NOTHING = "-"

CALLS = (
    "Each kind of call took turns on the tables; / smallest is the median of the ratios of turns taken side by side. "
    "Random keys fall anywhere in the index, as those of UUIDs of version 4; rising ones at its end, as numbers of "
    "orders do. A duplicate asks for any record that is not over. SQL alone: no marker answers."
)
SIZES = "Bytes for each record, in a table that was filled at once, with keys of 32 bytes and outcomes of some 90."
UPDATES = (
    f"HOT is the share of the finishes that touched no index: of the first calls above, and with {OPEN} claims held at "
    "once. A dead version is what an update or a delete leaves behind until it is pruned or vacuumed."
)
PURGE = (
    f"A quarter of the records was over. The purge deletes {BATCH:,} in a transaction, the oldest first. Autovacuum "
    "has its default thresholds; the time is that from the end of the purge until nothing was due."
)
BESIDE = (
    "First calls with random keys, without a purge and beside one that never rests, in turns. Here both have one core "
    "of the server between them."
)


def document(found: Sequence[Found], facts: Mapping[str, str], command: str) -> str:
    """Return the whole document."""
    return "\n".join(
        [
            "# Growth",
            "",
            f"Written by `{command}`; do not edit. [Benchmarks](../docs/benchmarks.md#growth) says how to read it.",
            "",
            *table(("", ""), facts.items()),
            "",
            "![What calls take and what records need, by the number of records](growth.png)",
            *section("Calls", CALLS, calls(found)),
            *section("Bytes", SIZES, sizes(found)),
            *section("Updates", UPDATES, updates(found)),
            *section("Purge", PURGE, purges(found)),
            *section("First calls beside a purge", BESIDE, beside(found)),
            "",
        ]
    )


def section(heading: str, legend: str, lines: Sequence[str]) -> list[str]:
    """Return a heading, what its table means, and the table."""
    return ["", f"## {heading}", "", legend, "", *lines]


def table(head: Sequence[str], rows: object) -> list[str]:
    """Return a table, whose columns are to the right if they have a name and are not the first."""
    rule = ["--:" if name and place else "---" for place, name in enumerate(head)]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]  # type: ignore[misc]


def calls(found: Sequence[Found]) -> list[str]:
    """Return what calls took."""
    return table(
        ("call", "records", "median µs", "p99", "/ smallest"),
        [
            (kind, f"{each.rows:,}", *timed(each.calls[kind]), f"{each.calls[kind].ratio:.2f}")
            for kind in found[0].calls
            for each in found
        ],
    )


def timed(call: Timed) -> tuple[str, str]:
    """Return the median and the 99th percentile."""
    return microseconds(call.median), microseconds(call.p99)


def sizes(found: Sequence[Found]) -> list[str]:
    """Return what records take."""
    indexes = list(found[0].size.indexes)
    return table(
        ("records", "table", *indexes, "together", "GB in all"),
        [
            (
                f"{each.rows:,}",
                f"{each.size.table:.0f}",
                *(f"{each.size.indexes[name]:.1f}" for name in indexes),
                f"{each.size.total:.0f}",
                f"{each.size.total * each.rows / 1e9:.2f}",
            )
            for each in found
        ],
    )


def updates(found: Sequence[Found]) -> list[str]:
    """Return what updates left behind."""
    return table(
        ("records", "finishes", "HOT", f"finishes, {OPEN} open", "HOT", "dead before", "after", "autovacuum runs"),
        [
            (
                f"{each.rows:,}",
                f"{each.before.updates:,}",
                share(each.before.hot_updates, each.before.updates),
                f"{each.after.updates - each.before.updates:,}",
                share(each.after.hot_updates - each.before.hot_updates, each.after.updates - each.before.updates),
                f"{each.before.dead:,}",
                f"{each.after.dead:,}",
                f"{each.after.autovacuums}",
            )
            for each in found
        ],
    )


def share(part: int, whole: int) -> str:
    """Return it in per cent."""
    return f"{part / whole:.1%}" if whole else NOTHING


def purges(found: Sequence[Found]) -> list[str]:
    """Return what purges did, and what autovacuum did about that."""
    return table(
        (
            "records",
            "purged",
            "a second, alone",
            "first tenth",
            "last tenth",
            "dead after",
            "after autovacuum",
            "its runs",
            "its seconds",
        ),
        [
            (
                f"{each.rows:,}",
                f"{each.purged.records:,}",
                f"{each.alone.rate:,.0f}",
                *rates(each.purged),
                f"{each.emptied.dead:,}",
                f"{each.cleaned.dead:,}",
                f"{each.cleaned.autovacuums - each.after.autovacuums}",
                seconds(each.cleaning, each.cleaned.autovacuums - each.after.autovacuums),
            )
            for each in found
        ],
    )


def rates(purged: Purged) -> tuple[str, str]:
    """Return records a second in the first tenth of the whole purge, and in the last."""
    first, last = purged.rates_of_tenths
    return f"{first:,.0f}", f"{last:,.0f}"


def seconds(took: float | None, runs: int) -> str:
    """Return how long autovacuum took; it need not have had anything to do."""
    if took is None:
        return "not in time"
    return f"{took:.0f}" if runs else "not due"


def beside(found: Sequence[Found]) -> list[str]:
    """Return what first calls took beside a purge."""
    rows = []
    for each in found:
        if each.beside is None:
            rows.append((f"{each.rows:,}", "the purge was over too early", *[NOTHING] * 5))
            continue
        without, with_it = each.beside.without, each.beside.beside
        rows.append(
            (
                f"{each.rows:,}",
                microseconds(without.median),
                microseconds(without.p99),
                microseconds(with_it.median),
                microseconds(with_it.p99),
                f"{with_it.ratio_to(without):.2f}",
                f"{each.beside.purged.rate:,.0f}",
            )
        )
    return table(("records", "without: median µs", "p99", "beside: median µs", "p99", "ratio", "purged a second"), rows)


def microseconds(took: float) -> str:
    """Return it in microseconds."""
    return f"{took * 1e6:,.0f}"
