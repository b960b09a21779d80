"""What all tests have: servers (services/fixtures.py), and last lines on what was skipped and what was proved."""

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ["tests.services.fixtures", "tests.services.tables", "tests.skip_list", "tests.explorer.proof_summary"]


# How long an example takes says how busy this machine is, and nothing of what is tested.
settings.register_profile("busy machine", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")


@pytest.hookimpl(trylast=True)  # after the order is shuffled
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes minutes, or one process would be at it alone when all others have ended."""
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    """Name the order that failed, which `-q` hides at the beginning."""
    seed = config.getoption("randomly_seed", None)
    if exitstatus and seed is not None:
        terminalreporter.write_line(f"this order again: --randomly-seed={seed}")
