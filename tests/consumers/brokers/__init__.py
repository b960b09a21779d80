"""One module for each broker and client, which offers what `Broker` says; its name is what `--broker` takes."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from tests.consumers.plan import Plan
from tests.services.server import Server

if TYPE_CHECKING:
    from tests.consumers.consumer import Options


class Broker(Protocol):
    """A module of this folder."""

    SERVER: type[Server]
    """What `python -m tests.consumers.run` starts; its `url` becomes that of the plan."""

    FIXTURE: str
    """The fixture that gives tests such a URL."""

    def declare(self, plan: Plan) -> None:
        """Make the queue or topic and that of the dead letters, empty."""

    def publish(self, plan: Plan, keys: Sequence[str]) -> None:
        """Publish a message for each key, in this order, and return once the broker has them all."""

    def consume(self, plan: Plan, options: Options) -> None:
        """Give each message to `ledger.effect` through the integration, until this process is killed."""

    def left(self, plan: Plan, *, running: bool) -> int:
        """How many messages nobody has settled; while consumers are `running`, those that they hold may be left out."""

    def dead_letters(self, plan: Plan) -> set[str]:
        """The keys of the dead letters that were not told before; or of all."""


def module(name: str) -> Broker:
    return cast(Broker, importlib.import_module(f"{__name__}.{name}"))


def pace(name: str) -> dict[str, Any]:
    """What a module's `PACE` says of the plan, such as how many consumers there are and how often one is killed."""
    found: dict[str, Any] = getattr(module(name), "PACE", {})
    return found


def names() -> list[str]:
    """Those that can be consumed."""
    found = sorted(info.name for info in pkgutil.iter_modules(__path__))
    return [name for name in found if hasattr(module(name), "consume")]
