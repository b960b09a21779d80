"""A worker killed at each point of its commit: rows and outcome agree, whatever comes next."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from sqlalchemy.orm import Session

from idem_tasks.claims import State
from idem_tasks.errors import InProgressError
from idem_tasks.testing import Driver
from tests.documents.reading import REPOSITORY
from tests.integration.sessions.dying_worker import POINTS
from tests.integration.sessions.seller import Seller, order


@pytest.fixture
def driver() -> Iterator[Driver]:
    with Driver("blocking") as driver:
        yield driver


@pytest.mark.parametrize("point", POINTS)
def test_a_worker_killed_in_its_commit_leaves_both_or_nothing(seller: Seller, point: str) -> None:
    """Killed before, within or after it, there are as many orders as outcomes, and one in the end (F14)."""
    command = [sys.executable, "-m", "tests.integration.sessions.dying_worker", seller.url, point]
    died = subprocess.run(command, cwd=REPOSITORY, timeout=60, capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    committed = point == "after the commit"

    def body(name: str, session: Session) -> str:
        order("before", session)
        return order(name, session)

    def redeliver() -> str | None:
        try:
            return str(seller.task(body)("A-1"))
        except InProgressError:
            return None

    async def redelivery() -> str | None:
        return redeliver()

    assert (seller.orders("A-1"), seller.state()) == ((1, State.COMPLETED) if committed else (0, State.RUNNING))
    assert seller.driver.poll(redelivery, lambda outcome: outcome is not None) == "ordered A-1"
    assert (seller.orders(), seller.orders("A-1"), seller.state()) == (2, 1, State.COMPLETED)
