"""The documents hold together: links lead somewhere, commands and extras exist, pages are found and are short."""

import re
import tomllib
from pathlib import Path

import pytest

from idem_tasks.cli.application import application
from tests.documents.reading import DOCUMENTS, REPOSITORY, anchors, blocks, links, name_of, prose

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
SHELL = ("sh", "console", "bash")


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    """A link within the project names a file that is there, and a heading that is in it."""
    for link in links(document.read_text()):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_every_page_is_found_from_the_index() -> None:
    """Each page of docs/ is linked from its index."""
    index = REPOSITORY / "docs/index.md"
    linked = {(index.parent / link).resolve() for link in links(index.read_text())}
    assert {page for page in DOCUMENTS if REPOSITORY / "docs" in page.parents} - {index} <= linked


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_commands_exist(document: Path) -> None:
    """What a document tells to type is there: the targets of make, the scripts, the commands, the extras."""
    text = document.read_text()
    shown = [block.text for block in blocks(text) if block.language in SHELL]
    shell = "\n".join(shown + re.findall(r"`((?:make|sh|pip|idem-tasks) [^`]+)`", prose(text)))
    targets = re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"\bmake (\w+)", shell)) <= set(targets)
    for script in re.findall(r"\bsh (scripts/\w+)", shell):
        assert (REPOSITORY / script).exists(), script
    assert set(re.findall(r"\bidem-tasks ([a-z][\w-]*)", shell)) <= {
        command.name for command in application.registered_commands
    }
    for extras in re.findall(r"'(?:idem-tasks|\.)\[([\w,]+)\]'", text):
        assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"]), extras


def test_the_readme_names_what_is_supported() -> None:
    """Versions and extras of the README are those of pyproject.toml."""
    text = (REPOSITORY / "README.md").read_text()
    for extra in PROJECT["optional-dependencies"]:
        assert f"`{extra}`" in text
    versions = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", c)]
    assert f"CPython {versions[0]} to {versions[-1]}" in text
    lowest = dict(re.findall(r"^(\w+)(?:\[\w+\])?>=([\d.]+)", "\n".join(PROJECT["dependencies"]), re.MULTILINE))
    assert f"SQLAlchemy {lowest['sqlalchemy']} or newer, redis-py {lowest['redis']} or newer" in text


@pytest.mark.parametrize("page", sorted(REPOSITORY.glob("docs/decisions/*.md")), ids=name_of)
def test_a_decision_is_short(page: Path) -> None:
    """At most 40 lines."""
    assert len(page.read_text().splitlines()) <= 40


def test_the_readme_is_short() -> None:
    """At most 200 lines."""
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 200
