"""The orders of the demo, and the messages that a broker delivers for them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice, product

_FIRST_NUMBER = 48213
_CUSTOMERS = (
    *("Amara Okafor", "Björn Lindqvist", "Chiara Ricci", "Daniel Whitaker", "Elif Demir", "Farid Haddad"),
    *("Grace O'Connor", "Hiroshi Tanaka", "Ines Carvalho", "Jonas Weber", "Katarzyna Nowak"),
)
_CENTS = (12900, 4950, 8990, 23900, 1999, 6475, 31900, 2450, 15800, 7325, 999, 54000, 3780)


@dataclass(frozen=True, slots=True)
class Order:
    """What one customer is to pay, once."""

    order_id: str
    customer: str
    cents: int


def make_orders(count: int) -> list[Order]:
    """Return that many orders, always the same ones."""
    customers = islice(product(range(count), _CUSTOMERS), count)
    return [
        Order(f"A-{_FIRST_NUMBER + 17 * number}", customer, _CENTS[number % len(_CENTS)])
        for number, (_, customer) in enumerate(customers)
    ]


def victim_of(orders: list[Order]) -> Order:
    """Return the order whose first charge is killed: the one whose message is delivered first."""
    return orders[0]


def messages_for(orders: list[Order]) -> list[Order]:
    """Return the orders as often as they are published, and in that sequence: each twice, every fourth three times.

    The third copies directly follow the first, so that two workers have the same order at the same time; the second
    ones follow when all orders were published once.
    """
    first_round = [copy for number, order in enumerate(orders) for copy in [order] * (2 if number % 4 == 0 else 1)]
    return first_round + orders
