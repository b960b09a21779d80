"""What batches save: `python benchmarks/batch_stores.py [POSTGRES_URL REDIS_URL]`.

Claims and finishes 100 messages at a time, with outcomes of 100 bytes, in three ways that take turns: through the batch
verbs of a `TieredStore`, through its verbs for one at a time, and by the same protocol written by hand for psycopg and
redis-py, beside 30,000 former records. Prints the medians. Without URLs it starts servers of its own, as the tests do.
What it makes has a prefix of its own and is removed. `--profile` at the end shows where the batches spend their time.
"""

from __future__ import annotations

import cProfile
import pstats
import secrets
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psycopg
import redis
from sqlalchemy import MetaData, create_engine, make_url

from idem_tasks import Policy, RedisStore, SQLStore, TieredStore
from idem_tasks.claims import ClaimRequest, EncodedOutcome, Granted, new_owner
from idem_tasks.runtime import run_sync

MESSAGES = 100
ROUNDS = 60
FORMER = 30_000
"""Records that are there already."""

BODY = b'"' + b"x" * 98 + b'"'
encode = msgspec.msgpack.Encoder().encode
PREFIX = f"bench_{secrets.token_hex(4)}_"

TAKE = """
local standing = {}
for i, key in ipairs(KEYS) do
  standing[i] = redis.call('GET', key)
  if not standing[i] then redis.call('SET', key, ARGV[i], 'PX', 60000) end
end
return standing
"""
PUBLISH = """
for i, key in ipairs(KEYS) do
  if redis.call('GET', key) == ARGV[2 * i - 1] then redis.call('SET', key, ARGV[2 * i], 'PX', 86400000) end
end
return 0
"""
CLAIM = f"""
WITH wanted AS (SELECT * FROM unnest(%b::text[], %b::text[], %b::text[]) AS w(key, owner, fingerprint)),
seen AS (SELECT r.key, r.state, r.fencing_token, r.owner FROM {PREFIX}records r JOIN wanted w
         ON r.scope = %s AND r.key = w.key),
claim AS (INSERT INTO {PREFIX}records (scope, key, state, fencing_token, owner, fingerprint, attempts, failures,
    crashes, generation, lease_expires_at, holder, created_at, updated_at, expires_at)
  SELECT %s, key, 'running', extract(epoch from clock_timestamp()) * 1000000, owner, fingerprint, 1, 0, 0, 1,
    clock_timestamp() + %s * interval '1 second', %s, clock_timestamp(), clock_timestamp(),
    clock_timestamp() + %s * interval '1 second'
  FROM wanted WHERE NOT EXISTS (SELECT 1 FROM seen WHERE seen.key = wanted.key)
  ORDER BY key ON CONFLICT DO NOTHING RETURNING key, state, fencing_token, owner)
SELECT * FROM seen UNION ALL SELECT * FROM claim
"""  # noqa: S608 (a prefix of our own)
FINISH = f"""
UPDATE {PREFIX}records r SET state = 'completed', outcome = w.outcome, codec = 'json', completed_at = clock_timestamp(),
  updated_at = clock_timestamp(), expires_at = greatest(expires_at, clock_timestamp() + %s * interval '1 second')
FROM unnest(%b::text[], %b::bigint[], %b::text[], %b::bytea[]) AS w(key, token, owner, outcome)
WHERE r.scope = %s AND r.key = w.key AND r.fencing_token = w.token AND r.owner = w.owner
  AND r.state IN ('running', 'in_doubt') RETURNING r.key
"""  # noqa: S608 (as above)


def requests(scope: str) -> list[ClaimRequest]:
    """Make new requests as decorated tasks do, in the order of their keys."""
    policy = Policy()
    return [
        ClaimRequest(scope, f"order-{number:06}", "f" * 64, new_owner(), policy, "web-3:812 task")
        for number in range(MESSAGES)
    ]


def in_batches(store: TieredStore, scope: str) -> None:
    """Claim and finish all at once."""
    answers = run_sync(store.claim_batch(requests(scope)))
    leases = [answer.lease for answer in answers if isinstance(answer, Granted)]
    done = EncodedOutcome(body=BODY, codec="json")
    assert all(run_sync(store.finish_batch([(lease, done) for lease in leases])))
    assert len(leases) == MESSAGES


def one_at_a_time(store: TieredStore, scope: str) -> None:
    """Claim and finish each."""
    for request in requests(scope):
        answer = run_sync(store.claim(request))
        assert isinstance(answer, Granted)
        run_sync(store.finish(answer.lease, EncodedOutcome(body=BODY, codec="json")))


def by_hand(connection: psycopg.Connection[tuple[object, ...]], client: redis.Redis, scope: str) -> None:
    """Do the same with the drivers alone."""
    asked = requests(scope)
    places = [b"%s%s:%s" % (PREFIX.encode(), scope.encode(), each.key.encode()) for each in asked]
    values = [b"running:%s:1" % each.owner.encode() for each in asked]
    assert not any(client.eval(TAKE, MESSAGES, *places, *values))
    keys, owners = [each.key for each in asked], [each.owner for each in asked]
    policy, prints = asked[0].policy, [each.fingerprint for each in asked]
    given = (keys, owners, prints, scope, scope, policy.lease, "web-3:812 task", policy.max_hold + policy.retention)
    granted = {key: token for key, _, token, _ in connection.execute(CLAIM, given)}
    tokens = [granted[key] for key in keys]
    finished = connection.execute(FINISH, (policy.retention, keys, tokens, owners, [BODY] * MESSAGES, scope))
    assert len(finished.fetchall()) == MESSAGES
    ends = time.time() + policy.retention
    outcomes = [
        b"finished:" + encode(("completed", BODY, "json", None, None, None, each.fingerprint, token, None, ends))
        for each, token in zip(asked, tokens, strict=True)
    ]
    client.eval(PUBLISH, MESSAGES, *places, *(each for pair in zip(values, outcomes, strict=True) for each in pair))


@contextmanager
def servers() -> Iterator[tuple[str, str]]:
    """Give the URLs that were named, or those of servers of our own."""
    if sys.argv[1:]:
        yield sys.argv[1], sys.argv[2]
        return
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.services import finding
    from tests.services.run import Run

    run = Run.begin()
    try:
        yield finding.find(finding.POSTGRES, run).url, finding.find(finding.REDIS, run).url
    finally:
        run.end()


def measure(ways: dict[str, Callable[[str], None]]) -> dict[str, float]:
    """Return the seconds that each takes for a message, the median of many rounds in turn."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(ROUNDS + 5):
        for name, way in ways.items():
            if name == "one at a time" and number % 5:
                continue
            begun = time.perf_counter()
            way(f"{name}.{number}")
            if number >= 5:  # connections are made, statements compiled and prepared
                taken[name].append(time.perf_counter() - begun)
    return {name: statistics.median(times) / MESSAGES for name, times in taken.items()}


def main() -> None:
    """Measure, print, and remove what was made."""
    with servers() as (postgres_url, redis_url):
        sql = SQLStore(postgres_url, table_prefix=PREFIX, create_schema=True)
        store = TieredStore(RedisStore(redis_url, prefix=PREFIX), sql)
        run_sync(store.prepare())
        plain = make_url(postgres_url).set(drivername="postgresql").render_as_string(hide_password=False)
        client = redis.Redis.from_url(redis_url)
        try:
            with psycopg.connect(plain, autocommit=True) as connection:
                ways: dict[str, Callable[[str], None]] = {
                    "in batches": lambda scope: in_batches(store, scope),
                    "by hand": lambda scope: by_hand(connection, client, scope),
                    "one at a time": lambda scope: one_at_a_time(store, scope),
                }
                # PostgreSQL plans by what it knows of the table, which autovacuum tells it within a minute.
                for number in range(FORMER // MESSAGES):
                    in_batches(store, f"former.{number}")
                connection.execute(f"VACUUM ANALYZE {PREFIX}records")
                seconds = measure(ways)
                if "--profile" in sys.argv:
                    profile = cProfile.Profile()
                    profile.enable()
                    for number in range(50):
                        in_batches(store, f"profile.{number}")
                    profile.disable()
                    pstats.Stats(profile).sort_stats("tottime").print_stats(25)
            print(f"{'':16}{'us a message':>14}{'messages a second':>20}{'against by hand':>18}")
            for name, each in seconds.items():
                print(f"{name:16}{each * 1e6:14.0f}{1 / each:20.0f}{seconds['by hand'] / each:18.2f}")
        finally:
            run_sync(store.close())
            engine = create_engine(postgres_url)
            made = MetaData()
            made.reflect(engine, only=lambda name, _: name.startswith(PREFIX))
            made.drop_all(engine)
            engine.dispose()
            for key in client.scan_iter(f"{PREFIX}*", count=1000):
                client.delete(key)
            client.close()


if __name__ == "__main__":
    main()
