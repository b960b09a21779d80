"""Two Celery shops under every kind of fault; `make chaos` runs the same for longer."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.servers import SERVERS
from tests.services.finding import in_ci
from tests.services.fixtures import require
from tests.services.run import Run

REPOSITORY = Path(__file__).parents[2]
SECONDS = 150


@pytest.mark.skipif(not in_ci(), reason=f"takes both cores for {SECONDS} s of faults: run `make chaos`, or set CI=true")
@pytest.mark.timeout(900)  # with servers that start, queues that empty, and other tests beside it
def test_no_fault_breaks_a_promise(service_run: Run, tmp_path: Path) -> None:
    """Whatever dies, hangs or forgets: no message is lost, no `pay` repeated, and each order has one outcome.

    F1, F7, F22, F24, F45, F57, F59, F60, and whatever comes of them together.
    """
    for server in SERVERS:
        require(server, service_run)
    seed = int(os.environ.get("CHAOS_SEED") or random.SystemRandom().randrange(10**6))
    command = [sys.executable, "-m", "tests.chaos.run", "--seconds", f"{SECONDS}", "--seed", f"{seed}"]
    with subprocess.Popen(
        [*command, "--folder", str(tmp_path)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as program:
        try:
            said, _ = program.communicate()
        finally:
            program.send_signal(signal.SIGTERM)  # where the time was over: it stops its workers and servers
    assert program.returncode == 0, f"seed {seed}, see {tmp_path}:\n{said}"
