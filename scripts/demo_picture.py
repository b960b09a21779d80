"""Draws docs/demo.svg: what a real run of the demo prints on a terminal. `.venv/bin/python scripts/demo_picture.py`."""  # noqa: INP001

import re
import sys
from pathlib import Path

from rich.console import Console

from idem_tasks.demo import run_demo
from idem_tasks.demo.servers import Servers
from idem_tasks.demo.show import show

PICTURE = Path(__file__).parents[1] / "docs" / "demo.svg"


def main() -> None:
    """Run it, and keep the picture of a run that went right."""
    console = Console(record=True, width=80, force_terminal=True, color_system="truecolor")
    console.print("$ idem-tasks demo", highlight=False)
    report = run_demo(Servers(), console, animated=False)
    show(report, console, console)
    if report.faults:
        sys.exit(1)
    svg = console.export_svg(title="idem-tasks demo", unique_id="demo")
    svg = re.sub(r"@font-face \{.*?\}\n", "", svg, flags=re.DOTALL)  # a picture that fetches nothing
    PICTURE.write_text("".join(f"{line.rstrip()}\n" for line in svg.splitlines()), encoding="utf-8")


if __name__ == "__main__":
    main()
