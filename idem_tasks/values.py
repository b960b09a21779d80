"""Data classes of which every call makes several, and which nobody changes.

To the type checker and the reader a `@value(frozen=True, slots=True)` is what `@dataclass` makes of it. At run time it
is not frozen: the constructor of a frozen data class sets each field by a call of its own, and takes five times as
long. One call makes eight such objects, with forty fields.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

T = TypeVar("T")

if TYPE_CHECKING:
    from dataclasses import dataclass as value
else:
    from dataclasses import dataclass

    def value(*, frozen: bool, slots: bool) -> Callable[[type[T]], type[T]]:
        """Make a data class that can be hashed, as a frozen one can, and is as quick to make as another."""
        return dataclass(slots=slots, unsafe_hash=frozen)


__all__ = ["value"]
