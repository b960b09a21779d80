"""Where mutants are caught: small scenarios, so that everything in them can be tried."""

from __future__ import annotations

from idem_tasks.testing.explorer.scenario import Scenario, policy

_ALL = (
    Scenario(name="nothing goes wrong", policy=policy()),
    Scenario(name="nothing goes wrong but the markers are lost", policy=policy(), faults={"markers lost": 1}),
    Scenario(name="a pause", policy=policy(), faults={"lease over": 1}),
    Scenario(name="a pause, and the handler raises", policy=policy(), behaviours=("raise",), faults={"lease over": 1}),
    Scenario(
        name="two take over from one",
        policy=policy(),
        copies=3,
        deliveries=3,
        faults={"lease over": 1, "Redis down": 1},
        most_faults=2,
    ),
    Scenario(name="SQL goes away", policy=policy(), faults={"SQL down": 1, "lease over": 1}, most_faults=2),
    Scenario(
        name="SQL goes away, and leases end",
        policy=policy(),
        faults={"SQL down": 1, "lease over": 2, "markers lost": 1},
        most_faults=4,
        copies=3,
        deliveries=3,
    ),
    Scenario(
        name="heartbeats and lost markers",
        policy=policy(),
        faults={"third of a lease over": 1, "markers lost": 1, "lease over": 1},
        most_faults=3,
    ),
    Scenario(name="forgotten", policy=policy(), copies=3, deliveries=3, faults={"forget": 1}),
    Scenario(name="a crash", policy=policy(), faults={"killed": 1}),
    Scenario(name="hold and a crash", policy=policy("hold"), faults={"killed": 1, "lease over": 1}, most_faults=2),
    Scenario(name="hold, and the handler raises", policy=policy("hold"), behaviours=("raise",)),
    Scenario(
        name="hold, and a person resolves",
        policy=policy("hold"),
        faults={"lease over": 1, "resolve with an outcome": 1},
        most_faults=2,
    ),
)

SCENARIOS = {scenario.name: scenario for scenario in _ALL}
