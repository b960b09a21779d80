"""Shows a report: as a table on a terminal, as tab-separated lines elsewhere."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from idem_tasks.demo.orders import make_orders, victim_of
from idem_tasks.demo.report import Report

Row = tuple[str, str, str]
Judged = tuple[str, str, str, str]
"""A row, and what is right in it."""


def show(report: Report, data: Console, talk: Console) -> None:
    """Print the two columns to `data`, and what they mean to `talk`."""
    without, protected = report.sides["without"], report.sides["with"]
    expected, owed = str(protected.expected), _money(report.owed)
    effects: list[Judged] = [
        ("effects: charges in the ledger", str(without.effects), str(protected.effects), expected),
        ("expected: one for each order", expected, expected, expected),
        ("lost", str(without.lost), str(protected.lost), "0"),
        ("duplicated", str(without.duplicated), str(protected.duplicated), "0"),
        (f"money taken, of {owed} owed", _money(without.cents), _money(protected.cents), owed),
    ]
    answers: list[Row] = [
        ("messages published", str(report.messages), str(report.messages)),
        ("deliveries to a worker", str(without.deliveries), str(protected.deliveries)),
        ("runs of the handler", str(without.deliveries), str(report.runs)),
        ("takeovers of these, after the kill", "-", str(report.takeovers)),
        ("replays of the recorded outcome", "-", str(report.replays)),
        ("waits: put back while in progress", "-", str(report.waits)),
        ("records completed in the database", "-", str(report.completed)),
    ]
    if data.is_terminal:
        data.print()
        data.print(_table(effects, answers))
    else:
        for row in [("", "without idem_tasks", "with idem_tasks"), *effects, *answers]:
            data.file.write("\t".join(row[:3]) + "\n")
        data.file.flush()
    _explain(report, talk)


def _table(effects: list[Judged], answers: list[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column()
    table.add_column("without idem_tasks", justify="right")
    table.add_column("with idem_tasks", justify="right")
    for label, *counted, right in effects:
        table.add_row(label, *[Text(text, "bold green" if text == right else "bold red") for text in counted])
    table.add_section()
    for row in answers:
        table.add_row(*row)
    return table


def _money(cents: int) -> str:
    return f"{cents / 100:,.2f}"


def _explain(report: Report, talk: Console) -> None:
    talk.print()
    if report.faults:
        talk.print(Text(f"Not exactly once: {'; '.join(report.faults)}.", "bold red"))
        return
    victim = victim_of(make_orders(1))
    talk.print(
        "Every order came two or three times, and the copy whose process was killed once more. The kill struck "
        f"{victim.order_id} in mid-charge, before the ledger was written. Whether to run again what may have been "
        'killed later is for you to say: on_crash="rerun", as here, or "hold".',
        style="dim",
        highlight=False,
    )
    talk.print()
    once, duplicates = report.sides["with"].expected, report.sides["without"].duplicated
    talk.print(
        f"Charged exactly once with idem_tasks: {once} of {once} orders. Without: {duplicates} duplicates.",
        style="bold",
        highlight=False,
    )
