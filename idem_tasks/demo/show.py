"""Shows a report: as a table on a terminal, as tab-separated lines elsewhere."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from idem_tasks.demo.orders import make_orders, victim_of
from idem_tasks.demo.report import Report

Row = tuple[str, str, str]


def show(report: Report, data: Console, talk: Console) -> None:
    """Print the two columns to `data`, and what they mean to `talk`."""
    without, protected = report.sides["without"], report.sides["with"]
    effects: list[Row] = [
        ("effects: charges in the ledger", str(without.effects), str(protected.effects)),
        ("expected: one for each order", str(without.expected), str(protected.expected)),
        ("lost", str(without.lost), str(protected.lost)),
        ("duplicated", str(without.duplicated), str(protected.duplicated)),
        (f"money taken, of {_money(report.owed)} owed", _money(without.cents), _money(protected.cents)),
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
        data.print(_table(effects, answers, report))
    else:
        for row in [("", "without idem_tasks", "with idem_tasks"), *effects, *answers]:
            data.file.write("\t".join(row) + "\n")
        data.file.flush()
    _explain(report, talk)


def _table(effects: list[Row], answers: list[Row], report: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column()
    table.add_column("without idem_tasks", justify="right")
    table.add_column("with idem_tasks", justify="right")
    wrong = {"without": bool(report.sides["without"].duplicated), "with": bool(report.faults)}
    for number, (label, without, protected) in enumerate(effects):
        is_last = number == len(effects) - 1
        table.add_row(
            label,
            Text(without, _colour(wrong["without"])),
            Text(protected, _colour(wrong["with"])),
            end_section=is_last,
        )
    for row in answers:
        table.add_row(*row)
    return table


def _colour(wrong: bool) -> str:
    return "bold red" if wrong else "bold green"


def _money(cents: int) -> str:
    return f"{cents / 100:,.2f}"


def _explain(report: Report, talk: Console) -> None:
    victim = victim_of(make_orders(1))
    talk.print()
    if report.faults:
        talk.print(Text(f"Not exactly once: {'; '.join(report.faults)}.", "bold red"))
        return
    talk.print(
        f"The kill struck {victim.order_id} before its charge reached the ledger. A kill after an effect is another "
        "matter: it is what provider_key() and on_crash='hold' are for.",
        style="dim",
        highlight=False,
    )
    talk.print(
        Text(
            f"With idem_tasks each of the {report.sides['with'].expected} orders was charged exactly once; "
            f"without it, {report.sides['without'].duplicated} charges were duplicates.",
            "bold",
        )
    )
