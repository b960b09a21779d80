"""One change of the shipped text that breaks it. Imports nothing of the library: see mutants.py."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """In `module` the text `before` stands exactly once, and becomes `after`.

    Then one of the `laws` is broken in `scenario`. All of that is tried; or, with a `seed`, what is drawn from it.
    """

    name: str
    module: str
    before: str
    after: str
    laws: tuple[str, ...]
    scenario: str
    seed: int | None = None

    def broken(self, shipped: str) -> str:
        """Return the broken text; raises ValueError where the change does not fit the shipped one any more."""
        found = shipped.count(self.before)
        if found != 1:
            raise ValueError(f"{self.name}: in {self.module} this stands {found} times instead of once:\n{self.before}")
        return shipped.replace(self.before, self.after)
