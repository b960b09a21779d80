"""What the documents show, runs.

The ```python blocks of a document are one program, run from top to bottom in an empty folder. A block whose first
line is a comment like `# worker.py` is that file in the folder instead, and in a ```console block the lines behind `$`
are run there; the others are what they print, where `...` stands for anything. Each file of examples/ is a program by
itself.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.documents.reading import DOCUMENTS, EXAMPLES, blocks, name_of

SERVERS = {
    "dramatiq_actor.py": {"RABBITMQ_URL": "rabbitmq_url"},
    "faststream_app.py": {"RABBITMQ_URL": "rabbitmq_url"},
    "nats_consumer.py": {"NATS_URL": "nats_url"},
    "rabbitmq_consumer.py": {"RABBITMQ_URL": "rabbitmq_url"},
    "redis_and_postgres.py": {"IDEM_TASKS_REDIS_URL": "redis_url", "IDEM_TASKS_DATABASE_URL": "postgres_url"},
    "taskiq_task.py": {"RABBITMQ_URL": "rabbitmq_url"},
}
"""The examples that need servers: the variables that say where they are, and the fixtures that know."""


def python_of(document: str) -> str:
    """The program of the document, everything else left blank, so that line numbers stay."""
    lines = [""] * len(document.splitlines())
    for block in blocks(document):
        if block.language == "python" and block.file_name is None:
            lines[block.line - 1 : block.line - 1 + len(block.lines)] = block.lines
    return "\n".join(lines)


def commands_of(console: str) -> list[tuple[str, str]]:
    """The commands of a ```console block, each with what it prints."""
    parts = re.split(r"^\$ (.+)$", console, flags=re.MULTILINE)
    return list(zip(parts[1::2], (printed.strip() for printed in parts[2::2]), strict=True))


def prints(expected: str, printed: str) -> bool:
    # Of a command that was killed, each shell tells in words of its own, or not at all.
    expected, printed = (re.sub(r".*Killed.*\n?", "", text).strip() for text in (expected, printed))
    pattern = ".*".join(map(re.escape, expected.split("...")))
    return re.fullmatch(pattern, printed, re.DOTALL) is not None


def run(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("IDEM_TASKS_")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        command,
        cwd=folder,
        env=environment | variables | {"PYTHONUNBUFFERED": "1"},
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,  # as they come on a terminal
        text=True,
        timeout=60,
    )


def test_only_python_blocks_are_taken() -> None:
    """Prose, files, fences and other languages are blank lines of the program."""
    document = (
        "Say:\n```python\nx = 1\n```\n```sh\nmake\n```\n```\nprint\n```\n"
        "```python\n# worker.py\nz = 1\n```\n<!-- python\ny = x\n-->\n"
    )
    assert python_of(document).split("\n") == ["", "", "x = 1", *[""] * 12, "y = x", ""]


def test_what_a_command_prints_is_compared() -> None:
    """Each command has the lines behind it, and `...` in them stands for anything."""
    assert commands_of("$ a b\n1\n...\n3\n$ c\n") == [("a b", "1\n...\n3"), ("c", "")]
    assert prints("1\n...\n3", "1\n2\n3\n")
    assert not prints("1\n...\n3", "1\n2\n")
    assert not prints("", "1\n")


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_a_document_does_what_it_says(document: Path, tmp_path: Path) -> None:
    """Its commands print what stands there, and its program ends without an error."""
    text = document.read_text()
    for block in blocks(text):
        if block.file_name is not None:
            (tmp_path / block.file_name).write_text(block.text)
        for command, expected in commands_of(block.text) if block.language == "console" else ():
            done = run(["sh", "-c", command], tmp_path)
            assert prints(expected, done.stdout), f"line {block.line}: $ {command}\n{done.stdout}"
    name = document.stem.lower().replace("-", "_")
    # A program with a library's name would be imported in its place.
    program = tmp_path / (f"{name}.py" if find_spec(name) is None else f"{name}_tasks.py")
    program.write_text(python_of(text))
    done = run([sys.executable, str(program)], tmp_path)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=name_of)
def test_an_example_does_what_it_says(example: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The program ends without an error."""
    urls = {name: request.getfixturevalue(fixture) for name, fixture in SERVERS.get(example.name, {}).items()}
    done = run([sys.executable, str(example)], tmp_path, **urls)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=name_of)
def test_an_example_is_short_and_checks_itself(example: Path) -> None:
    """At most 60 lines, with an assertion of what it shows."""
    text = example.read_text()
    assert len(text.splitlines()) <= 60
    assert re.search(r"^\s*assert ", text, re.MULTILINE)
