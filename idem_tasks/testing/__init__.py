"""For tests, also of other people's stores: suites that say what a store has to do, and what they are run with.

Needs pytest.
"""

import pytest

# Before the suites are imported: a failed assertion then shows its values.
pytest.register_assert_rewrite("idem_tasks.testing.contract", "idem_tasks.testing.marker_contract")

from idem_tasks.testing.clock import ManualClock  # noqa: E402
from idem_tasks.testing.contract import RecordTierContract, StoreContract  # noqa: E402
from idem_tasks.testing.driver import Driver  # noqa: E402
from idem_tasks.testing.marker_contract import MarkerContract  # noqa: E402

__all__ = ["Driver", "ManualClock", "MarkerContract", "RecordTierContract", "StoreContract"]
