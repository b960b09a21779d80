"""A marker and a record tier that stop before and after every round trip, for tests that decide what happens there.

The tiers behind are real ones. `reach` is awaited at every step; it may raise what a lost command or a lost reply
raises, suspend, or let time pass.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from idem_tasks.events import Announcer
from idem_tasks.stores.base import Marker, RecordTier, RuntimeName


@dataclass(frozen=True, slots=True)
class Step:
    """A place to stop: `before` a command takes effect, or `after` it did and its reply is on the way.

    A command's `args` and `kwargs` say how it can be let take effect at another time.
    """

    tier: str
    verb: str
    when: Literal["before", "after"]
    answer: Any = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


Reach = Callable[[Step], Awaitable[bool]]
"""Returns whether the command is sent once more, as a client does that saw no reply."""


class _Stepped:
    """A tier whose every verb stops at two steps."""

    def __init__(self, tier: Any, name: str, reach: Reach) -> None:
        self._tier = tier
        self._name = name
        self._reach = reach
        self.runtimes: frozenset[RuntimeName] = getattr(
            tier, "runtimes", frozenset()
        )  # what belongs to a tier has none

    def on(self, _runtime: RuntimeName, _announce: Announcer) -> _Stepped:
        return self

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        effect = getattr(self._tier, verb)

        async def stepped(*args: Any, **kwargs: Any) -> Any:
            await self._reach(Step(self._name, verb, "before", None, args, kwargs))
            while True:
                answer = await effect(*args, **kwargs)
                if not await self._reach(Step(self._name, verb, "after", answer)):
                    return answer

        self.__dict__[verb] = stepped
        return stepped


def stepped_marker(marker: Any, reach: Reach) -> Marker:
    """Return this marker tier, stopping at every round trip."""
    return cast(Marker, _Stepped(marker, "marker", reach))


def stepped_record(record: Any, reach: Reach, name: str = "record") -> RecordTier:
    """Return this record tier, stopping at every round trip; or what belongs to it, under another `name`."""
    return cast(RecordTier, _Stepped(record, name, reach))
