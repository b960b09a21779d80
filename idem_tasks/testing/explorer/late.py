"""Commands that are still on their way when their sender has given them up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from idem_tasks.testing.stepped import Step


@dataclass(frozen=True, slots=True)
class LateCommand:
    """A command in some buffer, which takes effect at any later moment, or never."""

    name: str
    sender: str
    sent_at: float
    step: Step

    def summary(self) -> tuple[Any, ...]:
        """Return all that depends on it."""
        step = self.step
        return self.name, self.sent_at, step.tier, _hashable(step.args), _hashable(step.kwargs)


def _hashable(argument: Any) -> Any:
    if isinstance(argument, list | tuple):
        return tuple(_hashable(part) for part in argument)
    if isinstance(argument, Mapping):
        return tuple((name, _hashable(value)) for name, value in sorted(argument.items()))
    return None if callable(argument) else argument  # `still_held` is asked by the sender, who is gone
