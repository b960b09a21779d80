"""For tests of handlers and of stores, also of other people's: `assert_idempotent`, and suites for stores.

The suites and the plugin need pytest; `ManualClock`, `assert_idempotent` and the explorer do not.
"""

import contextlib
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from idem_tasks.testing.batch_contract import BatchContract, BatchMarkerContract
    from idem_tasks.testing.clock import ManualClock
    from idem_tasks.testing.contract import RecordTierContract, StoreContract
    from idem_tasks.testing.driver import Driver
    from idem_tasks.testing.idempotent import aassert_idempotent, assert_idempotent
    from idem_tasks.testing.marker_contract import MarkerContract
    from idem_tasks.testing.outbox_contract import OutboxContract
    from idem_tasks.testing.redelivery import crash_point
    from idem_tasks.testing.report import IdempotencyReport, ReportedPoint
    from idem_tasks.testing.step_contract import StepContract

__all__ = [
    "BatchContract",
    "BatchMarkerContract",
    "Driver",
    "IdempotencyReport",
    "ManualClock",
    "MarkerContract",
    "OutboxContract",
    "RecordTierContract",
    "ReportedPoint",
    "StepContract",
    "StoreContract",
    "aassert_idempotent",
    "assert_idempotent",
    "crash_point",
]

# Before the suites are imported: a failed assertion then shows its values.
with contextlib.suppress(ImportError):
    import pytest

    pytest.register_assert_rewrite(
        "idem_tasks.testing.batch_contract",
        "idem_tasks.testing.contract",
        "idem_tasks.testing.marker_contract",
        "idem_tasks.testing.outbox_contract",
        "idem_tasks.testing.step_contract",
    )

# Imported when they are first named: the pytest plugin is loaded in every run, also by those who use none of them.
_ON_DEMAND = {
    "BatchContract": "batch_contract",
    "BatchMarkerContract": "batch_contract",
    "Driver": "driver",
    "IdempotencyReport": "report",
    "ManualClock": "clock",
    "MarkerContract": "marker_contract",
    "OutboxContract": "outbox_contract",
    "RecordTierContract": "contract",
    "ReportedPoint": "report",
    "StepContract": "step_contract",
    "StoreContract": "contract",
    "aassert_idempotent": "idempotent",
    "assert_idempotent": "idempotent",
    "crash_point": "redelivery",
}


def __getattr__(name: str) -> Any:
    if name in _ON_DEMAND:
        return getattr(importlib.import_module(f"{__name__}.{_ON_DEMAND[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
