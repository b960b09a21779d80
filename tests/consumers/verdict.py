"""What a run of endurance showed: every effect exactly once, nothing lost, nothing left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from idem_tasks.events import EventName
from tests.consumers.plan import REFUSED

ANSWERS = (EventName.GRANTED, EventName.REPLAYED, EventName.IN_PROGRESS)
"""Events of which each delivery that comes to its end has one."""


@dataclass(frozen=True)
class Verdict:
    keys: list[str]
    published: int
    effects: Counter[str]
    dead: set[str]
    events: Counter[str]
    kills: int
    left: int
    seconds: float

    @property
    def duplicates(self) -> list[str]:
        """Keys that had more than one effect."""
        return sorted(key for key, number in self.effects.items() if number > 1)

    @property
    def lost(self) -> list[str]:
        """Keys that neither had their effect nor are among the dead letters."""
        return [key for key in self.keys if key not in self.effects and key not in self.dead]

    @property
    def strange(self) -> list[str]:
        """Keys that had an effect or are dead letters, and should not."""
        wrongly_dead = {key for key in self.dead if not key.startswith(REFUSED)}
        wrongly_done = {key for key in self.effects if key.startswith(REFUSED)}
        return sorted(wrongly_dead | wrongly_done | ((self.effects.keys() | self.dead) - set(self.keys)))

    @property
    def good(self) -> bool:
        return not (self.duplicates or self.lost or self.strange or self.left)

    def __str__(self) -> str:
        deliveries = sum(self.events[name] for name in ANSWERS)
        return "\n".join(
            [
                f"published    {self.published} messages with {len(self.keys)} keys",
                f"deliveries   {deliveries}: {_counted(self.events, ANSWERS)}",
                f"of these     {_counted(self.events, (EventName.TAKEN_OVER, EventName.PUT_BACK))}",
                f"kills        {self.kills}",
                f"effects      {self.effects.total()}, and {len(self.dead)} keys in dead letters",
                f"duplicates   {_named(self.duplicates)}",
                f"lost         {_named(self.lost)}",
                f"unexpected   {_named(self.strange)}",
                f"left         {self.left} in the broker",
                f"seconds      {self.seconds:.1f}",
                "GOOD" if self.good else "NOT GOOD",
            ]
        )


def _counted(events: Counter[str], names: Iterable[EventName]) -> str:
    return ", ".join(f"{events[name]} {name.value.replace('_', ' ')}" for name in names)


def _named(keys: list[str]) -> str:
    return " ".join([str(len(keys)), *keys[:10]])
