"""What a Markdown document holds: its blocks, headings, links and tables."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("docs/**/*.md"))]
EXAMPLES = sorted(REPOSITORY.glob("examples/*.py"))

_FENCE = re.compile(r"^ {0,3}```(\w*)")
_UNSEEN = re.compile(r"^<!-- (\w+)$")
_FILE_NAME = re.compile(r"# (\w+\.py)$")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """What stands between two fences, or in a comment that begins with a language and so is run but not seen."""

    language: str
    line: int
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def file_name(self) -> str | None:
        """The file that the block is, if its first line says so: `# worker.py`."""
        named = _FILE_NAME.match(self.lines[0]) if self.lines else None
        return named[1] if named and self.language == "python" else None


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def blocks(document: str) -> Iterator[Block]:
    """Each block of a document; `line` is where its first line stands, counted from 1."""
    language, end, start = None, "", 0
    lines = document.splitlines()
    for number, line in enumerate(lines):
        fence, unseen = _FENCE.match(line), _UNSEEN.match(line)
        if language is None and (fence or unseen):
            language, end, start = (fence or unseen)[1], "```" if fence else "-->", number + 1  # type: ignore[index]
        elif language is not None and line.strip() == end:
            yield Block(language, start + 1, tuple(lines[start:number]))
            language = None


def prose(document: str) -> str:
    """The document without its blocks."""
    hidden = {n for block in blocks(document) for n in range(block.line - 1, block.line + len(block.lines))}
    return "\n".join("" if number + 1 in hidden else line for number, line in enumerate(document.splitlines()))


def links(document: str) -> list[str]:
    """Where its links lead, images included."""
    return _LINK.findall(prose(document))


def anchors(document: str) -> set[str]:
    """The anchors that a Markdown renderer makes of its headings."""
    headings = _HEADING.findall(prose(document))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def table(document: str, heading: str) -> list[list[str]]:
    """The cells of the table that follows this heading, row by row, without head and rule."""
    after = document.split(f"\n{heading}\n", 1)[1]
    rows: list[list[str]] = []
    for line in after.splitlines():
        if line.startswith("|"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif rows:
            break
    return rows[2:]
