"""A finish within a transaction of Django's ORM."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from django.apps import apps
from django.conf import settings
from django.db import IntegrityError, connections, models, transaction
from sqlalchemy import make_url

from idem_tasks import current_claim
from idem_tasks.claims import State
from idem_tasks.errors import ConfigurationError
from idem_tasks.testing import Driver
from tests.integration.sessions.seller import SCOPE, SHORT, Seller

if not settings.configured:
    settings.configure(LOGGING_CONFIG=None)
    apps.populate(())


class DjangoOrder(models.Model):  # type: ignore[misc] # Django is untyped
    number = models.AutoField(primary_key=True)
    name = models.CharField(max_length=100)

    class Meta:
        app_label = "orders"
        db_table = "orders"

    def __str__(self) -> str:
        return str(self.name)


@pytest.fixture
def driver() -> Iterator[Driver]:
    with Driver("blocking") as driver:
        yield driver


@pytest.fixture
def alias(url: str) -> Iterator[str]:
    """Django's name of the test's database."""
    place = make_url(url)
    engine = {"sqlite": "sqlite3", "postgresql": "postgresql"}[place.get_backend_name()]
    name = f"test_{id(place)}"
    connections.settings[name] = connections.configure_settings(
        {
            "default": {},
            name: {
                "ENGINE": f"django.db.backends.{engine}",
                "NAME": place.database,
                "HOST": place.host or "",
                "PORT": str(place.port or ""),
                "USER": place.username or "",
                "PASSWORD": place.password or "",
            },
        }
    )[name]
    yield name
    connections[name].close()
    del connections[name]


@pytest.mark.parametrize("url", ["sqlite_url", "postgres_url"], indirect=True)
def test_django_commits_both(seller: Seller, alias: str) -> None:
    """An order of its ORM and the outcome are committed by `atomic()`; what rolls that back undoes both (F14)."""
    refused: list[Exception] = []

    def handler(name: str) -> str:
        with transaction.atomic(using=alias):
            DjangoOrder.objects.using(alias).create(name=name)
            if name == "A-2":
                DjangoOrder.objects.using(alias).create(number=1, name=name)
            current_claim().finish_in(connections[alias], f"ordered {name}")
        return name

    for _ in range(2):
        assert seller.idem.run(handler, "A-1", scope=SCOPE, key="A-1") == "ordered A-1"
    assert (seller.orders(), seller.state()) == (1, State.COMPLETED)
    with pytest.raises(IntegrityError):
        seller.idem.run(handler, "A-2", scope=SCOPE, key="A-2")
    assert (seller.orders(), seller.state("A-2")) == (1, State.RELEASED)

    def outside(name: str) -> None:
        with pytest.raises(ConfigurationError, match="in autocommit") as caught:
            current_claim().finish_in(connections[alias], name)
        refused.append(caught.value)

    seller.idem.run(outside, "A-3", scope=SCOPE, key="A-3")
    assert len(refused) == 1


@pytest.mark.parametrize("url", ["sqlite_url", "postgres_url"], indirect=True)
def test_django_rolls_a_zombie_back(seller: Seller, alias: str) -> None:
    """Taken over, its order vanishes with the error that leaves `atomic()` (F1)."""

    def handler(name: str) -> None:
        seller.stop_renewing()
        seller.finish_elsewhere(seller.take_over())
        with transaction.atomic(using=alias):
            DjangoOrder.objects.using(alias).create(name=name)
            current_claim().finish_in(connections[alias], name)

    policy = seller.idem.policy.replace(lease=SHORT)
    assert seller.idem.run(handler, "A-1", scope=SCOPE, key="A-1", policy=policy) == "the other one"
    assert seller.orders("A-1") == 0
