"""Goes through interleavings, crashes and faults of the protocol, with the shipped code over simulated tiers.

    python -m idem_tasks.testing.explorer                         every scenario
    python -m idem_tasks.testing.explorer --only "one fault, hold"
    python -m idem_tasks.testing.explorer --replay "one fault, hold:0.0.3.1"

`scenario.py` says what may happen, `world.py` lets it happen, `laws.py` says what must not come of it, `search.py`
tries everything, and `scenarios.py` lists what the promises are held to.
"""

from idem_tasks.testing.explorer.laws import Law, Violation
from idem_tasks.testing.explorer.scenario import Scenario, policy
from idem_tasks.testing.explorer.scenarios import AT_RANDOM, EXHAUSTIVE
from idem_tasks.testing.explorer.search import Explored, Find, explore, explore_at_random, replay

__all__ = [
    "AT_RANDOM",
    "EXHAUSTIVE",
    "Explored",
    "Find",
    "Law",
    "Scenario",
    "Violation",
    "explore",
    "explore_at_random",
    "policy",
    "replay",
]
