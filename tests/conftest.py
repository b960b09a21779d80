"""What all tests have: servers (services/fixtures.py), and last lines on what was skipped and what was proved."""

import pytest

pytest_plugins = ["tests.services.fixtures", "tests.skip_list", "tests.explorer.proof_summary"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    """Name the order that failed, which `-q` hides at the beginning."""
    seed = config.getoption("randomly_seed", None)
    if exitstatus and seed is not None:
        terminalreporter.write_line(f"this order again: --randomly-seed={seed}")
