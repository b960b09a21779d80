"""Where RabbitMQ gets a message once more, and under which headers."""

from __future__ import annotations

from typing import Any

import pytest

from idem_tasks.errors import ConfigurationError, InvalidKeyError
from idem_tasks.integrations.rabbitmq_copies import WITHOUT_ID_HEADER, Copy, Roads
from idem_tasks.integrations.settling import DeadLetter, PutBack


def test_what_is_put_back_goes_to_its_own_queue() -> None:
    """Whatever exchange it came by, with its own headers and the count."""
    copy = Roads("orders", None, None).copy(PutBack(1.0, 3, "InProgressError"), {"n": 1, "idem_tasks_put_back": 2})
    assert copy == Copy("", "orders", {"n": 1, "idem_tasks_put_back": 3}, expires=True)


def test_a_dead_letter_goes_by_its_exchange() -> None:
    """Under the routing key that was given, or the name of the queue; with the reason, and without an expiration."""
    dead = DeadLetter("parked", {"idem_tasks_reason": "parked"})
    assert Roads("orders", "dead", None).copy(dead, None) == Copy("dead", "orders", dict(dead.headers), expires=False)
    assert Roads("orders", "dead", "of orders").copy(dead, None).routing_key == "of orders"
    assert Roads("orders", "", "dead").copy(dead, None).exchange == ""


def test_headers_with_a_meaning_for_the_broker_are_not_copied() -> None:
    """CC and BCC would multiply a message, and a quorum queue counts its own deliveries (F64)."""
    headers = {"CC": ["other"], "BCC": ["third"], "x-delivery-count": 4, "x-death": [{"count": 1}]}
    copy = Roads("orders", None, None).copy(PutBack(1.0, 1, "InProgressError"), headers)
    assert copy.headers == {"x-death": [{"count": 1}], "idem_tasks_put_back": 1}
    assert len(headers) == 4


@pytest.mark.parametrize(
    "names, said",
    [
        (("", None, None), "queue must be the name"),
        ((None, None, None), "queue must be"),
        (("q" * 256, None, None), "queue must be a text of at most 255 bytes"),
        (("ä" * 128, None, None), "at most 255 bytes"),
        (("orders", None, "dead"), "needs dead_letter_exchange"),
        (("orders", "e" * 256, None), "dead_letter_exchange must be"),
        (("orders", "dead", 17), "dead_letter_routing_key must be"),
        (("orders", "", None), "back to itself"),
        (("orders", "", "orders"), "back to itself"),
    ],
)
def test_names_that_cannot_work_are_refused(names: tuple[Any, ...], said: str) -> None:
    """At decoration, and not with the first dead letter."""
    with pytest.raises(ConfigurationError, match=said):
        Roads(*names)


def test_what_to_give_for_a_road() -> None:
    """Only where there is none."""
    assert Roads("orders", None, None).missing == "dead_letter_exchange="
    assert Roads("orders", "", "dead").missing is None


@pytest.mark.parametrize(
    "headers, ids, key",
    [
        ({"Idempotency-Key": "k"}, ("m-1", "t-1"), "k"),
        (None, ("m-1", "t-1"), "m-1"),
        ({}, (None, "t-1"), "t-1"),
        ({WITHOUT_ID_HEADER: True}, ("made by the client", "t-1"), "t-1"),
    ],
    ids=str,
)
def test_the_default_key(headers: dict[str, Any] | None, ids: tuple[object, object], key: str) -> None:
    """The publisher's, never one that a client made for a copy."""
    assert Roads("orders", None, None).key(headers, *ids) == key


@pytest.mark.parametrize("headers", [None, {WITHOUT_ID_HEADER: True}], ids=str)
def test_a_message_without_a_key_is_refused(headers: dict[str, Any] | None) -> None:
    """With what would help (F29)."""
    with pytest.raises(InvalidKeyError, match=r"no message_id; .* key=\.\.\."):
        Roads("orders", None, None).key(headers, "" if headers is None else "made by the client")
