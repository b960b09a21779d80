"""Has imported all that a consumer needs, and forks one for each plan that it reads: a start takes milliseconds.

python -m tests.consumers.nursery BROKER prints the pid of each; when its input ends, so do they all.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from contextlib import suppress

from tests.consumers import brokers
from tests.consumers.consumer import work
from tests.consumers.plan import Plan


def main(broker: str) -> None:
    brokers.module(broker)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system buries them
    born = []
    for line in sys.stdin:
        born.append(_fork(Plan.from_json(line)))
        print(born[-1], flush=True)  # noqa: T201 - it is asked for
    for pid in born:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _fork(plan: Plan) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(0)
            work(plan)
        except BaseException:  # noqa: BLE001 - it is logged, and the fleet sees that the process is gone
            traceback.print_exc()
        finally:
            os._exit(1)
    return pid


if __name__ == "__main__":
    main(sys.argv[1])
