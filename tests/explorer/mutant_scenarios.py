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
    Scenario(name="the handler raises", policy=policy(), behaviours=("raise",)),
    Scenario(
        name="the handler raises, and a command is lost",
        policy=policy(),
        behaviours=("raise",),
        faults={"command lost": 1},
    ),
    Scenario(name="retention ends", policy=policy(), faults={"retention over": 1}),
    Scenario(
        name="a renewal is late",
        policy=policy(),
        faults={"third of a lease over": 1, "lease over": 1},
        most_faults=2,
    ),
    Scenario(name="commands are sent again", policy=policy(), copies=1, faults={"sent again": 1}),
    Scenario(name="hold and a pause", policy=policy("hold"), faults={"lease over": 1}),
    Scenario(
        name="hold, and a person lets it run again",
        policy=policy("hold"),
        behaviours=("return", "raise"),
        faults={"lease over": 1, "resolve with a rerun": 1},
        most_faults=2,
    ),
    Scenario(
        name="a crash is too many",
        policy=policy(max_crashes=0),
        faults={"killed": 1, "lease over": 1},
        most_faults=2,
    ),
    Scenario(
        name="forgotten while answers are late",
        policy=policy(),
        copies=1,
        deliveries=1,
        faults={"lease over": 1, "forget": 1},
        most_faults=2,
        every_reply=True,
    ),
    Scenario(
        name="forgotten while a renewal is late",
        policy=policy(),
        copies=1,
        deliveries=1,
        faults={"third of a lease over": 1, "forget": 1},
        most_faults=2,
    ),
    Scenario(
        name="forgotten while an outcome is pending",
        policy=policy(),
        copies=1,
        deliveries=2,
        faults={"SQL down": 1, "lease over": 4, "forget": 1},
        most_faults=6,
    ),
    Scenario(name="struck", policy=policy(), copies=1, faults={"soft limit": 1, "shutdown": 1}),
    Scenario(
        name="heartbeats in time",
        policy=policy(),
        faults={"third of a lease over": 3},
        most_faults=3,
        beats_in_time=True,
    ),
)

SCENARIOS = {scenario.name: scenario for scenario in _ALL}
