"""A handler with two steps, killed at three places: its customer is charged once, and gets one mail."""

import os
import signal
import sys

import payment_provider

from idem_tasks import Idempotency, SQLStore, current_claim, idempotent_task

idem = Idempotency(store=SQLStore("sqlite:///payments.db"))
mails = "mails.txt"


def die_at(place: str) -> None:
    """Be killed here, as by a deployment or for want of memory, if this is the place."""
    if sys.argv[1:2] == [place]:
        os.kill(os.getpid(), signal.SIGKILL)


def charge(url: str, amount: int) -> str:
    charged = payment_provider.charge(url, amount, current_claim().provider_key("charge"))
    die_at("after the charge, before its record")
    return charged


def mail(order_id: str, charge_id: str) -> None:
    with open(mails, "a") as outbox:  # noqa: PTH123
        outbox.write(f"{order_id} was paid: {charge_id}\n")


@idempotent_task(key="{order_id}", scope="pay", fingerprint=None, lease=1, on_in_progress="wait", idempotency=idem)
def pay(order_id: str, url: str) -> str:
    charge_id = current_claim().step("charge", charge, url, 500)
    die_at("between the steps")
    current_claim().step("mail", mail, order_id, charge_id)
    die_at("after the mail")
    return charge_id


def deliver(url: str, *place: str) -> int:
    """Deliver the message to a worker process, which may be killed at a place."""
    command = [sys.executable, __file__, *(place or ["nowhere"]), url]
    return os.spawnv(os.P_WAIT, sys.executable, command)  # noqa: S606


if len(sys.argv) > 1:  # a worker
    print(f"{os.getpid()} paid: {pay('A-1', sys.argv[2])}")
else:
    with payment_provider.running() as provider:
        for place in ("after the charge, before its record", "between the steps", "after the mail"):
            assert deliver(provider.url, place) == -signal.SIGKILL, place
        assert deliver(provider.url) == deliver(provider.url) == 0
        print(f"charges: {provider.charges}")
        assert len(provider.charges) == 1
        with open(mails) as outbox:  # noqa: PTH123
            assert outbox.read() == "A-1 was paid: ch_1\n"
