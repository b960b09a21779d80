"""A handler at every place where its worker can die: what is repeated, and what a business key mends.

Needs: pip install idem-tasks pytest
"""

import pytest
import sqlalchemy

from idem_tasks import idempotent_task
from idem_tasks.testing import assert_idempotent, crash_point

engine = sqlalchemy.create_engine("sqlite://", poolclass=sqlalchemy.StaticPool)
with engine.begin() as connection:
    connection.exec_driver_sql("CREATE TABLE payments (order_id TEXT PRIMARY KEY)")
    connection.exec_driver_sql("CREATE TABLE mails (order_id TEXT)")


def insert(statement: str, order_id: str) -> None:
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text(statement), {"order": order_id})


def empty() -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM payments")
        connection.exec_driver_sql("DELETE FROM mails")


@idempotent_task(key="{order_id}")
def pay(order_id: str) -> str:
    insert("INSERT INTO payments VALUES (:order) ON CONFLICT DO NOTHING", order_id)
    crash_point("after the payment")
    return f"paid for {order_id}"


@idempotent_task(key="{order_id}")
def pay_and_mail(order_id: str) -> str:
    insert("INSERT INTO payments VALUES (:order) ON CONFLICT DO NOTHING", order_id)
    insert("INSERT INTO mails VALUES (:order)", order_id)
    return f"paid for {order_id}"


report = assert_idempotent(pay, "A-1", effects=engine, reset=empty)
print(report)
assert report.passed

with pytest.raises(AssertionError) as caught:
    assert_idempotent(pay_and_mail, "A-1", effects=engine, reset=empty)
print(f"\n{caught.value}")
assert "mails: 2 instead of 1" in str(caught.value)
assert "payments: 2" not in str(caught.value)
