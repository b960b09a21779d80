"""Batches that meet one another, and others: of each record one claim is granted, and nobody waits for long."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial

import pytest
from sqlalchemy import Connection, NullPool, create_engine, insert, literal, select, text

from idem_tasks.claims import Granted, InProgress, Recorded, State
from idem_tasks.runtime import run_sync
from idem_tasks.stores import sql_batches
from idem_tasks.stores.schema import records_table
from idem_tasks.stores.sql import SQLStore
from idem_tasks.testing.batch_contract import BatchInUse
from idem_tasks.testing.driver import Driver
from idem_tasks.testing.store_in_use import DONE, StoreInUse
from tests.integration.test_sql_locks import RUNTIMES, SERVERS, touch, transaction
from tests.services.waiting import wait_until

ROUNDS = 30
MANY = 60

CLAIMER = """
import json, sys
from idem_tasks import Policy, SQLStore
from idem_tasks.claims import ClaimRequest, EncodedOutcome, Granted, new_owner
from idem_tasks.runtime import run_sync

url, scope, order = sys.argv[1:]
store = SQLStore(url)
granted = []
run_sync(store.get(scope, "warm up"))
print("ready", flush=True)
for line in sys.stdin:
    keys = [f"{line.strip()}-{number:03}" for number in range(60)]
    if order == "backward":
        keys.reverse()
    asked = [ClaimRequest(scope, key, None, new_owner(), Policy()) for key in keys]
    answers = run_sync(store.claim_batch(asked))
    answers = [answer or run_sync(store.claim(request)) for request, answer in zip(asked, answers)]
    leases = [answer.lease for answer in answers if isinstance(answer, Granted)]
    finished = run_sync(store.finish_batch([(lease, EncodedOutcome(body=b"1", codec="json")) for lease in leases]))
    print(json.dumps([[lease.key for lease in leases], [each is not None for each in finished]]), flush=True)
"""


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    found: str = request.getfixturevalue(request.param)
    return found


@pytest.fixture(params=RUNTIMES)
def batches(url: str, request: pytest.FixtureRequest) -> Iterator[BatchInUse]:
    with Driver(request.param) as driver:
        use = StoreInUse(SQLStore(url, create_schema=True), driver)
        driver(use.store.prepare())
        yield BatchInUse(use)
        driver(use.store.close())


@pytest.mark.timeout(300)
@pytest.mark.parametrize("url", [*SERVERS, "sqlite_url"], indirect=True)
def test_two_processes_in_opposite_order_grant_each_record_once(url: str) -> None:
    """F66: they claim and finish the same keys at the same moment, 30 times; a deadlock is begun again."""
    store = SQLStore(url, create_schema=True)
    run_sync(store.prepare())
    run_sync(store.close())
    both = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIMER, url, "scope", order],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for order in ("forward", "backward")
    ]
    try:
        for each in both:
            assert each.stdout is not None
            assert each.stdout.readline() == "ready\n"
        for number in range(ROUNDS):
            for each in both:
                assert each.stdin is not None
                each.stdin.write(f"{number}\n")
                each.stdin.flush()
            told = [json.loads(each.stdout.readline()) for each in both if each.stdout is not None]
            granted = sorted(key for keys, _ in told for key in keys)
            assert granted == [f"{number}-{n:03}" for n in range(MANY)]
            assert all(all(finished) for _, finished in told)
    finally:
        for each in both:
            each.communicate(timeout=60)


@pytest.mark.parametrize("url", SERVERS, indirect=True)
def test_many_overlapping_batches_in_any_order_grant_each_record_once(batches: BatchInUse) -> None:
    """F66: eight at once, each with the keys in an order of its own, some with only half of them."""
    for number in range(5):
        keys = [f"{number}-{each:02}" for each in range(40)]
        chance = random.Random(number)
        asked = [batches.requests(*chance.sample(keys, 40 if n % 2 else 20)) for n in range(8)]
        for some in asked:
            chance.shuffle(some)
        answers = batches.use.driver.together([partial(batches.verbs.claim_batch, some) for some in asked])
        granted = [
            request.key
            for some, told in zip(asked, answers, strict=True)
            for request, answer in zip(some, told, strict=True)
            if isinstance(answer or batches.use.claim(request), Granted)
        ]
        assert sorted(granted) == keys


@pytest.mark.parametrize("url", SERVERS, indirect=True)
def test_a_record_that_is_inserted_just_now_holds_a_batch_up_shortly(url: str, batches: BatchInUse) -> None:
    """Its members are left to claims of their own, which say so; it is no outage (F46)."""
    batches.use.granted("template")
    with transaction(url) as other:
        insert_copy(other, batches.use, "template", "locked")
        begun = time.monotonic()
        answers = batches.claim(batches.requests("a", "locked", "z"))
        assert time.monotonic() - begun < 8
        assert answers == [None] * 3
    assert isinstance(batches.use.claim("locked"), Granted)


def insert_copy(connection: Connection, use: StoreInUse, template: str, key: str) -> None:
    """Insert a record in somebody's transaction, by copying another."""
    table = records_table()
    columns = [literal(key, each.type) if each is table.c.key else each for each in table.c]
    found = select(*columns).where(table.c.scope == use.scope, table.c.key == template)
    connection.execute(insert(table).from_select([each.name for each in table.c], found))


@pytest.mark.parametrize("url", SERVERS, indirect=True)
def test_a_locked_record_leaves_its_batch_to_finishes_of_their_own(url: str, batches: BatchInUse) -> None:
    """Somebody holds one of them for longer than is waited: nothing of that batch is written yet (F46)."""
    leases = batches.granted("a", "locked", "z")
    with transaction(url) as other:
        touch(other, batches.use, "locked")
        assert batches.finish(*((lease, DONE) for lease in leases)) == [None] * 3
        assert batches.use.finish(leases[0]) == Recorded()
    assert batches.finish(*((lease, DONE) for lease in leases[1:])) == [Recorded()] * 2


@pytest.mark.parametrize("url", ["postgres_url"], indirect=True)
def test_a_locked_record_does_not_hold_up_a_batch_of_claims(url: str, batches: BatchInUse) -> None:
    """On PostgreSQL a record that is there is read past its lock."""
    batches.granted("locked")
    with transaction(url) as other:
        touch(other, batches.use, "locked")
        answers = batches.claim(batches.requests("a", "locked"))
        assert [type(answer) for answer in answers] == [Granted, InProgress]


@pytest.mark.parametrize("url", [*SERVERS, "sqlite_url"], indirect=True)
def test_a_record_that_goes_meanwhile_is_left_to_a_claim_of_its_own(
    url: str, batches: BatchInUse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was there when the batch wanted to insert it, and is gone when it is read."""
    batches.granted("a")
    monkeypatch.setattr(sql_batches, "_by_place", lambda _rows: {})
    assert batches.claim(batches.requests("a", "b")) == [None, None]


@pytest.fixture
def latin1(url: str) -> None:
    """A character set of the database's own, whatever that of its tables is."""
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        connection.execute(text(f"ALTER DATABASE {engine.url.database} CHARACTER SET latin1"))


@pytest.mark.usefixtures("latin1")
@pytest.mark.parametrize("url", ["mariadb_url", "mysql_url"], indirect=True)
def test_keys_of_any_script_are_told_apart_in_a_database_of_latin1(batches: BatchInUse) -> None:
    """Keys that its character set lacks are not all question marks, and so one key (F51)."""
    keys = ["E", "e", "é", "字", "漢", "😀"]
    leases = batches.granted(*keys)
    assert [lease.key for lease in leases] == keys
    assert batches.finish(*((lease, DONE) for lease in leases)) == [Recorded()] * len(keys)
    assert {batches.use.record(key).state for key in keys} == {State.COMPLETED}


def test_a_growing_table_is_not_read_whole_before_it_is_analyzed(postgres_url: str) -> None:
    """Plans that were made while it had few records look members up by the index for as long as they are used."""
    with Driver("blocking") as driver:
        use = StoreInUse(SQLStore(postgres_url, create_schema=True), driver)
        driver(use.store.prepare())
        for turn in range(30):
            claimed = BatchInUse(use).granted(*(f"{turn}-{number}" for number in range(20)))
            assert BatchInUse(use).finish(*((lease, DONE) for lease in claimed)) == [Recorded()] * 20
        driver(use.store.close())  # whose sessions then tell what they read
    read = text("SELECT seq_tup_read, idx_tup_fetch FROM pg_stat_user_tables WHERE relname = 'idem_tasks_records'")
    engine = create_engine(postgres_url, poolclass=NullPool)

    def all_is_told() -> bool:
        with engine.connect() as connection:
            whole, by_index = connection.execute(read).one()
        return bool(whole == 0 and by_index >= 600)

    wait_until(all_is_told, seconds=20, what="600 records to be found by the index, and none otherwise")
