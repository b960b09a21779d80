"""DBOS on PostgreSQL, a workflow of one step: `python with_dbos.py POSTGRES_URL`."""

import sys
from collections.abc import Callable
from typing import Any

from dbos import DBOS, SetWorkflowID
from speaking import charge, new_orders, serve

DBOS(config={"name": "bench", "system_database_url": sys.argv[1], "log_level": "ERROR"})


@DBOS.step()
def charged(order_id: str, amount: int) -> dict[str, Any]:
    """Do nothing for an order."""
    return charge(order_id, amount)


@DBOS.workflow()
def workflow(order_id: str, amount: int) -> dict[str, Any]:
    """Do it as a step, whose outcome is recorded."""
    return charged(order_id, amount)


@DBOS.workflow()
def workflow_without_a_step(order_id: str, amount: int) -> dict[str, Any]:
    """Do it in the workflow itself."""
    return charge(order_id, amount)


order = new_orders()


def run(work: Callable[[str, int], Any], order_id: str) -> None:
    """Run the workflow under the order's number."""
    with SetWorkflowID(order_id):
        work(order_id, 4900)


DBOS.launch()
run(workflow, "A-1")
serve(
    {
        "first call, with a step": lambda: run(workflow, order()),
        "first call, without a step": lambda: run(workflow_without_a_step, order()),
        "duplicate, with a step": lambda: run(workflow, "A-1"),
    }
)
DBOS.destroy()
