"""The pytest plugin: fixtures for tests of handlers, and the seed of what is chosen at random.

pytest loads it in every run wherever idem_tasks is installed, so it imports what it needs where it needs it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from idem_tasks import Idempotency
    from idem_tasks.testing import ManualClock


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--idem-seed`."""
    parser.getgroup("idem_tasks").addoption(
        "--idem-seed",
        type=int,
        metavar="N",
        help="seed of what idem_tasks chooses at random in tests; the default is another one in every run",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Choose the seed, in a worker of pytest-xdist the one that was chosen for all."""
    if config.option.idem_seed is None:
        handed = getattr(config, "workerinput", {}).get("idem_seed")
        config.option.idem_seed = secrets.randbelow(2**32) if handed is None else handed


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Hand the seed to a worker of pytest-xdist."""
    node.workerinput["idem_seed"] = node.config.option.idem_seed


def pytest_report_header(config: pytest.Config) -> str:
    """Print the seed."""
    return f"idem_tasks: --idem-seed={config.option.idem_seed}"


@pytest.fixture
def idem_seed(request: pytest.FixtureRequest) -> int:
    """The seed for what a test chooses at random; a test that fails says how to have it again."""
    seed: int = request.config.option.idem_seed
    request.node.add_report_section("setup", "idem_tasks", f"the same again: --idem-seed={seed}")
    return seed


@pytest.fixture
def idempotency_clock() -> ManualClock:
    """The clock of `idempotency`; it stands still until a test moves it."""
    from idem_tasks.testing.clock import ManualClock

    return ManualClock()


@pytest.fixture
def idempotency(idempotency_clock: ManualClock) -> Iterator[Idempotency]:
    """Records in memory for every handler of this test that has no `Idempotency` of its own."""
    from idem_tasks.config import configure, default_restored
    from idem_tasks.runtime import deadline_clock_from
    from idem_tasks.stores.memory import MemoryStore

    began = idempotency_clock()

    def deadlines() -> float:
        # Runs on by itself as well, so that who waits for a key in progress does not wait for ever.
        return time.monotonic() + idempotency_clock() - began

    with default_restored(), deadline_clock_from(deadlines):
        yield configure(store=MemoryStore(idempotency_clock))
