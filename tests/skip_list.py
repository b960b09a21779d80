"""The tests' last lines: what was skipped, and why. Under CI=true a skip that not_run_here.py does not name fails."""

from collections import Counter, defaultdict
from collections.abc import Generator

import pytest

from tests.not_run_here import NOT_RUN_HERE
from tests.services.finding import in_ci


def skipped_tests(config: pytest.Config) -> dict[str, list[str]]:
    """The skipped tests by reason."""
    reporter = config.pluginmanager.getplugin("terminalreporter")
    tests = defaultdict(list)
    for report in reporter.stats.get("skipped", []):
        _, _, reason = report.longrepr
        tests[reason.removeprefix("Skipped: ")].append(report.nodeid)
    return tests


def unexpected(tests: dict[str, list[str]]) -> dict[str, list[str]]:
    return {reason: names for reason, names in tests.items() if reason not in NOT_RUN_HERE.values()}


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    is_controller = not hasattr(session.config, "workerinput")
    if is_controller and in_ci() and unexpected(skipped_tests(session.config)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around pytest's own summaries, to come after them
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> Generator[None, None, None]:
    yield
    tests = skipped_tests(config)
    here = unexpected(tests)
    write(terminalreporter, "skipped", here)
    write(terminalreporter, "not run on any machine of ours", {r: tests[r] for r in tests if r not in here})


def write(terminalreporter: pytest.TerminalReporter, title: str, tests: dict[str, list[str]]) -> None:
    if tests:
        terminalreporter.section(title)
    for reason, names in tests.items():
        terminalreporter.line(f"{reason}:")
        for name, count in Counter(map(without_parameters, names)).items():
            terminalreporter.line(f"  {name}" + (f" ({count} tests)" if count > 1 else ""))


def without_parameters(name: str) -> str:
    """`file::function[parameters]` as `file::function`, and `file::Class::method` as `file::Class`."""
    return "::".join(name.partition("[")[0].split("::")[:2])
