"""Writes docs/reference/failure-modes.md from what is known of the modes and from the tests that name them.

python -m tests.documents.failure_modes
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from textwrap import fill

from tests.documents.modes import FEATURES, GROUPS, MODES, Mode
from tests.documents.proofs import Proof, proofs
from tests.documents.reading import REPOSITORY

PAGE = REPOSITORY / "docs/reference/failure-modes.md"

SHOWN = 4
"""Tests shown of each mode; of more than these the number is told."""

WIDTH = 120

_HEAD = """\
# Failure modes

Every way known to us in which a marker in Redis and a record in SQL can run an effect twice, lose a message, get stuck
or mix things up. Each has a number, which tests and comments in the code name. Under it stands what prevents it here,
and the tests that fail without that: those on real servers first, with the servers that they run on. A test without
servers runs in memory, and where it can on a clock of its own. Of more than four the others are found with
`grep -rnw F7 tests idem_tasks/testing`.

{counts}

This page is written from the tests' docstrings by `python -m tests.documents.failure_modes`, and a test fails when it
says anything else than they do.
"""


def page() -> str:
    """Return the whole page."""
    tests = proofs()
    return "\n".join([_HEAD.format(counts=_counts(tests)), *_groups(tests)])


def _counts(tests: list[Proof]) -> str:
    tested = {number for test in tests for number in test.numbers}
    on_servers = {number for test in tests if test.servers for number in test.numbers}
    waiting = len(MODES) - len(tested)
    others = f"; the other {waiting} wait for features that are not built yet" if waiting else ""
    return fill(
        f"Of {len(MODES)} modes {len(tested)} have tests, {len(on_servers)} of them on real servers{others}. "
        "Whatever is missing is named.",
        WIDTH,
    )


def _groups(tests: list[Proof]) -> Iterator[str]:
    for title, modes in GROUPS.items():
        yield f"## {title}\n"
        for mode in modes:
            yield _entry(mode, [test for test in tests if mode.number in test.numbers])


def _entry(mode: Mode, tests: list[Proof]) -> str:
    lines = [f"### {mode.name}: {mode.title}", "", fill(mode.remedy, WIDTH), ""]
    if mode.lacks:
        lines += [fill(f"*Not built yet:* {'; '.join(feature.name for feature in mode.lacks)}.", WIDTH), ""]
    best = sorted(tests, key=lambda test: (-len(test.servers), len(test.numbers)))[:SHOWN]
    lines += [_line(test) for test in best]
    if len(tests) > len(best):
        lines.append(f"- and {len(tests) - len(best)} more")
    return "\n".join(lines).rstrip() + "\n"


def _line(test: Proof) -> str:
    link = os.path.relpath(test.path, PAGE.parent)
    servers = f" · {', '.join(test.servers)}" if test.servers else ""
    return f"- [{test.path.name}::{test.name}]({link}): {test.promise}{servers}"


def not_built_any_more() -> list[str]:
    """Return the features that the page calls missing and that are there."""
    return [feature.name for feature in FEATURES if feature.is_built()]


if __name__ == "__main__":
    PAGE.write_text(page())
