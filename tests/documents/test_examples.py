"""What the documents show, runs.

The ```python blocks of a document are one program, run from top to bottom in an empty folder; each file of examples/
is a program by itself.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SOURCES = [
    REPOSITORY / "README.md",
    *sorted(REPOSITORY.glob("docs/**/*.md")),
    *sorted(REPOSITORY.glob("examples/*.py")),
]

FENCE = re.compile(r"^ {0,3}```(\w*)")


def python_of(document: str) -> str:
    """The document with everything but its ```python blocks left blank, so that line numbers stay."""
    language, lines = None, []
    for line in document.splitlines():
        fence = FENCE.match(line)
        lines.append(line if language == "python" and not fence else "")
        if fence:
            language = fence[1] if language is None else None
    return "\n".join(lines)


def test_only_python_blocks_are_taken() -> None:
    """Prose, fences and other languages are blank lines of the program."""
    document = "Say:\n```python\nx = 1\n```\n```sh\nmake\n```\n```\nprint\n```\n```python\ny = x\n```\n"
    assert python_of(document).split("\n") == ["", "", "x = 1", *[""] * 8, "y = x", ""]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_it_does_what_it_says(source: Path, tmp_path: Path) -> None:
    """The program ends without an error."""
    program = tmp_path / source.with_suffix(".py").name
    text = source.read_text()
    program.write_text(python_of(text) if source.suffix == ".md" else text)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("IDEM_TASKS_")}
    done = subprocess.run(
        [sys.executable, str(program)],
        cwd=tmp_path,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
