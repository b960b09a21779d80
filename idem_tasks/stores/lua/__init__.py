"""The scripts that run inside Redis, each one atomic step on one key."""

from __future__ import annotations

from importlib import resources


def script(*names: str) -> str:
    """Return the text of these scripts, one after the other, without the comments that Redis need not read.

    Scripts are sent whole, with EVAL: that costs the same as EVALSHA for texts of this size, and cannot fail with
    NOSCRIPT after a flush or a failover.
    """
    folder = resources.files(__name__)
    lines = [line.strip() for name in names for line in (folder / f"{name}.lua").read_text("utf-8").splitlines()]
    return "\n".join(line for line in lines if line and not line.startswith("--"))
