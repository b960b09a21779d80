"""The tests' last lines about the proof: states explored, laws, mutants caught, and the time it took."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from idem_tasks.testing.explorer.laws import Law


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None, None, None]:
    yield
    states = mutants = caught = 0
    seconds = 0.0
    traces: list[str] = []
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            told = dict(getattr(report, "user_properties", ()))
            states += told.get("explored_states", 0)
            if "explored_states" in told or "mutant" in told:
                seconds += report.duration
            if "mutant" in told:
                mutants += 1
                caught += outcome == "passed"
                law = "nothing: it was NOT caught" if told.get("law") is None else Law[told["law"]].value
                traces.append(f"  {told['mutant']:<60} broke: {law}")
    if not states and not mutants:
        return
    terminalreporter.section("proof")
    for trace in sorted(traces):
        terminalreporter.line(trace)
    terminalreporter.line(
        f"{states:,} states explored, {len(Law)} laws, none broken; "
        f"{caught} of {mutants} mutants caught; {seconds:.0f} s of computing"
        if not terminalreporter.stats.get("failed")
        else f"{states:,} states explored, {caught} of {mutants} mutants caught, and see the failures above"
    )
