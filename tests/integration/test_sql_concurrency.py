"""Many processes on one key: one is granted, whatever the database; and the clock and snapshot they go by."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import create_engine, make_url, select, text, update

from idem_tasks.claims import Granted, InDoubt, InProgress
from idem_tasks.runtime import run_sync
from idem_tasks.stores import sql_claims
from idem_tasks.stores.schema import records_table
from idem_tasks.stores.sql import SQLStore
from idem_tasks.stores.sql_clock import clock_microseconds, now
from idem_tasks.testing.driver import Driver
from idem_tasks.testing.store_in_use import SHORT, StoreInUse

DATABASES = ["sqlite_url", "postgres_url", "mariadb_url"]

PROCESSES = 4
THREADS = 25

Claim = Callable[..., Counter[str]]

CLAIMS = """
import json, sys
from collections import Counter
from idem_tasks.stores.sql import SQLStore
from idem_tasks.testing.driver import Driver
from idem_tasks.testing.store_in_use import StoreInUse

for line in iter(sys.stdin.readline, ""):
    url, scope, runtime, number, policy = json.loads(line)
    with Driver(runtime) as driver:
        use = StoreInUse(SQLStore(url), driver)
        driver(use.store.get(scope, "warm up"))
        print("ready", flush=True)
        sys.stdin.readline()
        answers = use.claim_together([use.request(scope=scope, **policy) for _ in range(number)])
        print(json.dumps(Counter(type(answer).__name__ for answer in answers)), flush=True)
        driver(use.store.close())
"""


class Claimer:
    """A process that claims when it is told to."""

    def __init__(self) -> None:
        command = [sys.executable, "-W", "error", "-c", CLAIMS]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def hear(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def end(self) -> None:
        self._process.communicate(timeout=60)
        assert self._process.returncode == 0


@pytest.fixture(scope="module")
def claimers() -> Iterator[list[Claimer]]:
    """Processes that take longer to start than to claim."""
    claimers = [Claimer() for _ in range(PROCESSES)]
    yield claimers
    for claimer in claimers:
        claimer.end()


@pytest.fixture(params=DATABASES)
def use(request: pytest.FixtureRequest) -> Iterator[StoreInUse]:
    with Driver("blocking") as driver:
        use = StoreInUse(SQLStore(request.getfixturevalue(request.param), create_schema=True), driver)
        driver(use.store.prepare())
        yield use
        driver(use.store.close())


@pytest.fixture
def claim_in_processes(use: StoreInUse, claimers: list[Claimer]) -> Claim:
    """Claims the one key in several processes, each with many threads or tasks, at the same moment."""
    url = use.store._clients["blocking"]._url.render_as_string(hide_password=False)  # type: ignore[attr-defined]

    def claim(**policy: object) -> Counter[str]:
        runtimes = ("blocking", "asyncio") * (PROCESSES // 2)
        for claimer, runtime in zip(claimers, runtimes, strict=True):
            claimer.tell(json.dumps([url, use.scope, runtime, THREADS, policy]))
        for claimer in claimers:
            assert claimer.hear() == "ready\n"
        for claimer in claimers:
            claimer.tell("now")
        answers: Counter[str] = Counter()
        for claimer in claimers:
            answers.update(json.loads(claimer.hear()))
        return answers

    return claim


def test_one_of_a_hundred_claims_is_granted(use: StoreInUse, claim_in_processes: Claim) -> None:
    """Of 100 claims on one key, from threads and tasks of four processes, exactly one is granted (F11)."""
    answers = claim_in_processes()
    assert answers == {"Granted": 1, "InProgress": PROCESSES * THREADS - 1}
    assert use.record().attempts == 1


def test_one_of_a_hundred_takes_over(use: StoreInUse, claim_in_processes: Claim) -> None:
    """Of 100 claims that find a dead holder, exactly one takes over (F6)."""
    dead = use.granted(lease=SHORT)
    use.let_expire(dead)
    answers = claim_in_processes()
    assert answers == {"Granted": 1, "InProgress": PROCESSES * THREADS - 1}
    record = use.record()
    assert (record.attempts, record.crashes) == (2, 1)
    assert record.fencing_token > dead.fencing_token


def test_a_hundred_put_in_doubt_once(use: StoreInUse, claim_in_processes: Claim) -> None:
    """Of 100 claims that find a dead holder under hold, none is granted, and the crash is counted once (F6)."""
    dead = use.granted(lease=SHORT)
    use.let_expire(dead)
    answers = claim_in_processes(on_crash="hold")
    assert answers == {"InDoubt": PROCESSES * THREADS}
    record = use.record()
    assert (record.crashes, record.fencing_token, record.owner) == (1, dead.fencing_token, dead.owner)


def test_the_clock_is_the_statements(postgres_url: str) -> None:
    """In a long transaction on PostgreSQL the clock goes on, so that no lease is too short (F48)."""
    engine = create_engine(postgres_url)
    with engine.begin() as connection:
        first, token = connection.execute(select(now(), clock_microseconds())).one()
        time.sleep(0.05)
        second, later_token = connection.execute(select(now(), clock_microseconds())).one()
    engine.dispose()
    assert (second - first).total_seconds() >= 0.05
    assert later_token - token >= 50_000
    assert first.timestamp() == pytest.approx(token / 1_000_000, abs=0.05)


@pytest.mark.parametrize("fixture", DATABASES)
@pytest.mark.parametrize("on_crash", ["rerun", "hold"])
def test_a_renewal_between_look_and_write_keeps_its_claim(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, fixture: str, on_crash: str
) -> None:
    """A holder that wakes up and renews once its lease was seen over is neither taken over nor doubted (F6)."""
    url, look = request.getfixturevalue(fixture), sql_claims._claim_or_read
    renewed: list[frozenset[str]] = []
    with Driver("blocking") as driver:
        use = StoreInUse(SQLStore(url, create_schema=True), driver)
        elsewhere = SQLStore(url)
        dead = use.granted(lease=SHORT)
        use.let_expire(dead)

        def renewed_meanwhile(*found: Any) -> Any:
            row = look(*found)
            if not renewed:
                renewed.append(run_sync(elsewhere.renew([dead], lambda _: True)))
            return row

        monkeypatch.setattr(sql_claims, "_claim_or_read", renewed_meanwhile)
        assert isinstance(use.claim(on_crash=on_crash), InProgress)
        assert renewed == [{dead.owner}]
        assert (use.record().owner, use.record().crashes) == (dead.owner, 0)
        driver(use.store.close())
        driver(elsewhere.close())


@pytest.mark.parametrize("fixture", DATABASES)
def test_a_token_of_a_restored_row_does_not_come_again(request: pytest.FixtureRequest, fixture: str) -> None:
    """A database that failed over to an older state never gives a token that it has given since (F10)."""
    url = request.getfixturevalue(fixture)
    engine = create_engine(url)
    with Driver("blocking") as driver:
        use = StoreInUse(SQLStore(url, create_schema=True), driver)
        use.release(use.granted())
        given = use.granted()
        use.release(given)
        with engine.begin() as connection:
            connection.execute(update(records_table()).values(fencing_token=given.fencing_token - 1))
        assert use.granted().fencing_token > given.fencing_token
        driver(use.store.close())
    engine.dispose()


@pytest.mark.parametrize("hours", [-1000, 1000])
def test_a_workers_clock_decides_nothing(use: StoreInUse, monkeypatch: pytest.MonkeyPatch, hours: int) -> None:
    """A lease is as long as it should be for workers whose clocks are wrong by weeks (F9)."""
    lease = use.granted(lease=1.0)
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + hours * 3600)
    assert isinstance(use.claim(), InProgress)
    assert use.renew(lease) == {lease.owner}
    assert isinstance(use.claim(), InProgress)
    token = use.taken_over().fencing_token
    assert abs(token / 1_000_000 - right()) < 60


@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("fixture", ["postgres_url", "mariadb_url"])
def test_no_old_snapshot_is_read(request: pytest.FixtureRequest, fixture: str, isolation: str) -> None:
    """Whatever isolation the server gives by default, a claim sees what was committed before it (F12)."""
    url = request.getfixturevalue(fixture)
    escaped = isolation.lower().replace(" ", r"\ ")
    setting = {
        "postgres_url": {"options": f"-c default_transaction_isolation={escaped}"},
        "mariadb_url": {"init_command": f"SET SESSION TRANSACTION ISOLATION LEVEL {isolation}"},
    }[fixture]
    engine = create_engine(make_url(url).update_query_dict(setting))
    with Driver("blocking") as driver:
        first = StoreInUse(SQLStore(url, create_schema=True), driver)
        second = StoreInUse(SQLStore(engine), driver)
        second.scope = first.scope
        lease = first.granted()
        assert isinstance(second.claim(), InProgress)
        first.release(lease, in_doubt=True)
        assert second.claim() == InDoubt()
        first.resolve(None)
        assert isinstance(second.claim(), Granted)
        driver(first.store.close())
    engine.dispose()


def test_connections_to_mariadb_are_strict(mariadb_url: str) -> None:
    """A key too long for its column is an error on any server, never cut to meet another (F52)."""
    with Driver("blocking") as driver:
        use = StoreInUse(SQLStore(mariadb_url, create_schema=True), driver)
        driver(use.store.prepare())
        engine = use.store._clients["blocking"]._engine  # type: ignore[attr-defined]
        with engine.connect() as connection:
            settings = connection.execute(text("SELECT @@sql_mode, @@tx_isolation, @@innodb_lock_wait_timeout")).one()
        assert "STRICT_ALL_TABLES" in settings[0]
        assert tuple(settings[1:]) == ("READ-COMMITTED", 1)
        driver(use.store.close())
