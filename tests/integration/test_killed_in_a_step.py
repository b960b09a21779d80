"""A worker process that is killed within a step, between its effect and its record, and after its record."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from idem_tasks import Idempotency, InDoubtError, Policy, SQLStore, State, current_claim

LEASE = 2.0
"""Seconds that a dead worker keeps its key; a claim that is granted after that long begins no handler."""

WORKER = """
import os, signal, sys
from idem_tasks import Idempotency, Policy, SQLStore, current_claim
from idem_tasks.stores.sql import SQLStore as Store

url, effects, place, on_crash, lease = sys.argv[1:]

def die_at(here):
    if here == place:
        os.kill(os.getpid(), signal.SIGKILL)

def charge():
    die_at("before the effect")
    with open(effects, "a") as file:
        file.write(current_claim().provider_key("charge") + "\\n")
    die_at("in the step")
    return "receipt " + str(os.getpid())

finish_step = Store.finish_step

async def killed_around(self, *args):
    die_at("before the record")
    answer = await finish_step(self, *args)
    die_at("after the record")
    return answer

Store.finish_step = killed_around

def handler():
    receipt = current_claim().step("charge", charge)
    die_at("after the step")
    return receipt

idem = Idempotency(store=SQLStore(url), observers=[])
idem.get("pay", "connect before the lease begins")
idem.run(handler, scope="pay", key="A-1", policy=Policy(lease=float(lease), on_crash=on_crash))
"""


@pytest.fixture(params=["sqlite_url", "postgres_url"])
def url(request: pytest.FixtureRequest) -> str:
    found: str = request.getfixturevalue(request.param)
    with Idempotency(store=SQLStore(found), observers=[]) as idem:
        idem.prepare()
    return found


@pytest.fixture
def effects(tmp_path: Path) -> Path:
    file = tmp_path / "effects"
    file.touch()
    return file


def kill_at(place: str, url: str, effects: Path, on_crash: str = "rerun") -> int:
    """Let a worker process handle the message until it is killed at this place; returns its process id."""
    command = [sys.executable, "-c", WORKER, url, str(effects), place, on_crash, str(LEASE)]
    with subprocess.Popen(command) as worker:
        assert worker.wait(30) == -signal.SIGKILL
        return worker.pid


def deliver(url: str, effects: Path, on_crash: str = "rerun") -> str:
    """Deliver the message again, as soon as the lease of the dead worker is over."""

    def charge() -> str:
        with effects.open("a") as file:
            file.write(current_claim().provider_key("charge") + "\n")
        return "receipt of the second"

    def handler() -> str:
        return current_claim().step("charge", charge)

    policy = Policy(lease=LEASE, on_crash=on_crash, on_in_progress="wait", wait_timeout=20)  # type: ignore[arg-type]
    with Idempotency(store=SQLStore(url), observers=[]) as idem:
        idem.get("pay", "connect before the lease begins")
        return idem.run(handler, scope="pay", key="A-1", policy=policy)


@pytest.mark.parametrize(
    "place, times",
    [
        ("before the effect", 1),
        ("in the step", 2),
        ("before the record", 2),
        ("after the record", 1),
        ("after the step", 1),
    ],
)
def test_a_killed_step_runs_again_unless_it_is_recorded(url: str, effects: Path, place: str, times: int) -> None:
    """At least once, each time with the same provider key; once it is recorded everybody gets that outcome (F15)."""
    dead = kill_at(place, url, effects)
    outcome = "receipt of the second" if place in {"before the effect", "in the step", "before the record"} else None
    assert deliver(url, effects) == (outcome or f"receipt {dead}")
    assert deliver(url, effects) == (outcome or f"receipt {dead}")
    keys = effects.read_text().splitlines()
    assert len(keys) == times
    assert len(set(keys)) == 1


@pytest.mark.parametrize("place", ["in the step", "before the record", "after the record"])
def test_under_hold_a_killed_step_waits_for_a_person(url: str, effects: Path, place: str) -> None:
    """At most once: nothing runs until a person says so, and then only a step whose outcome is not there (F15)."""
    dead = kill_at(place, url, effects, "hold")
    with pytest.raises(InDoubtError):
        deliver(url, effects, "hold")
    assert len(effects.read_text().splitlines()) == 1
    with Idempotency(store=SQLStore(url), observers=[]) as idem:
        assert [record.key for record in idem.records(state=State.IN_DOUBT)] == ["A-1"]
        idem.resolve("pay", "A-1", rerun=True)
    recorded = place == "after the record"
    assert deliver(url, effects, "hold") == (f"receipt {dead}" if recorded else "receipt of the second")
    assert len(effects.read_text().splitlines()) == (1 if recorded else 2)
