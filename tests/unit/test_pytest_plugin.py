"""The pytest plugin: records in memory for a test, a clock to move, and a seed that can be had again."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.unit.test_import import CLIENTS

pytest_plugins = ["pytester"]

SHOP = """
import pytest
from idem_tasks import *
from idem_tasks import config

runs = []

@idempotent_task(key="{order}", retention=100, max_hold=10, lease=10, on_in_progress="wait", wait_timeout=0.2)
def charge(order):
    runs.append(order)

@pytest.fixture(autouse=True)
def forget():
    runs.clear()
"""


@pytest.fixture(autouse=True)
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project whose warnings are errors, without a setting of ours."""
    for name in ("IDEM_TASKS_DATABASE_URL", "IDEM_TASKS_REDIS_URL", "IDEM_TASKS_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makeini("[pytest]\nfilterwarnings = error\n")


def run(pytester: pytest.Pytester, program: str, *options: str, **outcomes: int) -> str:
    """Run a test module in a pytest of its own, with no other plugin than ours, and return what it printed."""
    pytester.makepyfile(SHOP + program)
    result = pytester.runpytest_subprocess("-p", "idem_tasks", *options)
    result.assert_outcomes(**outcomes)
    return result.stdout.str()


def test_pytest_loads_it_by_itself(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside other plugins, without a warning, and without a change for those who do not use it."""
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    pytester.makepyfile("def test_nothing(): pass")
    result = pytester.runpytest_subprocess("-p", "no:asyncio")
    result.assert_outcomes(passed=1)
    assert "idem_tasks: --idem-seed=" in result.stdout.str()
    assert "warning" not in result.stdout.str()


def test_each_test_has_records_of_its_own(pytester: pytest.Pytester) -> None:
    """They are those of every handler, and gone in the next test."""
    program = """
@pytest.mark.parametrize("n", [1, 2])
def test_charge(n, idempotency):
    charge("A-1"), charge("A-1")
    assert runs == ["A-1"]
    assert [record.key for record in idempotency.records()] == ["A-1"]
    assert config.default_idempotency() is idempotency
"""
    run(pytester, program, passed=2)


@pytest.mark.parametrize("before", ["None", "configure(store=MemoryStore())"])
def test_what_was_configured_before_is_restored(pytester: pytest.Pytester, before: str) -> None:
    """Also that nobody had called `configure`; no file is made, also when the test fails."""
    program = f"""
before = {before}

def test_fails(idempotency):
    charge("A-1")
    configure(store=MemoryStore())
    assert False

def test_after():
    assert config._default is before
"""
    run(pytester, program, passed=1, failed=1)
    assert not list(pytester.path.glob("*.db"))


def test_time_is_moved_by_the_clock(pytester: pytest.Pytester) -> None:
    """That of the records and that of the claims, and one who waits does not wait for ever."""
    program = """
def test_retention(idempotency, idempotency_clock):
    charge("A-1")
    idempotency_clock.advance(99)
    charge("A-1")
    assert runs == ["A-1"]
    idempotency_clock.advance(12)
    charge("A-1")
    assert runs == ["A-1", "A-1"]

def test_lease(idempotency, idempotency_clock):
    with idempotency.claim(scope="s", key="A-1", lease=10) as claim:
        assert not current_claim().lost
        idempotency_clock.advance(11)
        assert current_claim().lost

def test_waiting(idempotency):
    function = idempotency_of(charge)
    with idempotency.claim(scope=function.scope_for("A-1"), key="A-1"):
        with pytest.raises(InProgressError):
            charge("A-1")
"""
    run(pytester, program, passed=3)


def test_an_async_handler_uses_them_too(pytester: pytest.Pytester) -> None:
    """On any event loop."""
    program = """
import asyncio

@idempotent_task(key="{order}")
async def send(order):
    runs.append(order)

def test_send(idempotency):
    asyncio.run(send("A-1")), asyncio.run(send("A-1"))
    assert runs == ["A-1"]
"""
    run(pytester, program, passed=1)


def test_a_projects_own_fixture_stays(pytester: pytest.Pytester) -> None:
    """One of the same name is used instead of ours."""
    program = """
@pytest.fixture
def idempotency():
    return "mine"

def test_mine(idempotency):
    assert idempotency == "mine"
"""
    run(pytester, program, passed=1)


SEED = """
def test_seed(idem_seed):
    assert idem_seed == -1
"""


def test_a_seed_is_printed_and_can_be_given(pytester: pytest.Pytester) -> None:
    """In the header, and with a failed test that used it; otherwise it is another one in every run."""
    printed = [run(pytester, SEED, failed=1) for _ in range(2)]
    seeds = [re.findall(r"--idem-seed=(\d+)", text) for text in printed]
    assert [len(found) for found in seeds] == [2, 2]
    assert [len(set(found)) for found in seeds] == [1, 1]
    assert seeds[0] != seeds[1]
    assert f"assert {seeds[0][0]} == -1" in printed[0]
    run(pytester, SEED.replace("-1", "7"), "--idem-seed=7", passed=1)


def test_all_workers_of_xdist_have_the_same_seed(pytester: pytest.Pytester) -> None:
    """It is chosen once."""
    program = SEED.replace("def test_seed(", '@pytest.mark.parametrize("n", range(4))\ndef test_seed(n, ')
    text = run(pytester, program, "-p", "xdist", "-n", "2", failed=4)
    assert len(set(re.findall(r"--idem-seed=(\d+)", text))) == 1


def test_a_suite_shows_its_values(pytester: pytest.Pytester) -> None:
    """A store that breaks its contract is shown what was compared: the suite is rewritten, though we are loaded."""
    program = """
from idem_tasks.testing import StoreContract

class Wrong(MemoryStore):
    async def get(self, scope, key):
        return None

class TestWrong(StoreContract):
    runtimes = ("blocking",)

    @pytest.fixture
    def store(self):
        return Wrong()
"""
    text = run(pytester, program, "-k", "test_finish_records_and_the_next_claim_replays and blocking", failed=1)
    assert "assert None is not None" in text


def test_a_name_that_is_not_there_is_an_error() -> None:
    """Names that are imported when they are used do not hide one that was mistyped."""
    with pytest.raises(ImportError, match="assert_idempotentt"):
        from idem_tasks.testing import assert_idempotentt  # noqa: F401


def test_it_imports_no_client_library() -> None:
    """Nor what is only needed by those who use it: it is loaded in every run."""
    unused = {"idem_tasks.testing.contract", "idem_tasks.testing.idempotent", "idem_tasks.stores.memory", "hypothesis"}
    program = (
        "import sys, pytest\n"
        "import idem_tasks.testing.plugin\n"
        f"found = {CLIENTS | unused} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=60)
