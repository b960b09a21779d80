"""The demo: real Celery workers, one of them killed in the middle of a charge, and the charges counted.

The same handler takes the same messages twice: bare, and under `@idempotent_task`. Read `shop.py` for the handler,
`run.py` for what happens to it, `report.py` for what is counted. Nothing of it is needed by a program that uses the
library.
"""

from idem_tasks.demo.run import run_demo

__all__ = ["run_demo"]
