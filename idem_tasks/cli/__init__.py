"""The command line, `idem-tasks`: `main` is its entry point, `application.py` its root."""

from __future__ import annotations

import sys

from idem_tasks.errors import MissingExtraError

UNUSABLE = 5
"""Exit code: a server or the configuration cannot be used."""


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        from idem_tasks.cli.application import run
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("rich", "typer"):
            raise
        sys.stderr.write(f"idem-tasks: {MissingExtraError(package=package, extra='cli')}\n")
        sys.exit(UNUSABLE)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(run())
