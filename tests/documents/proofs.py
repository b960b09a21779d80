"""Which tests name which failure modes in their docstrings, and which real servers those tests use.

Read from the source by `ast`: nothing is imported or run. A test uses a server if it, or what it calls or is given in
its own file or by a fixture, names one of the fixtures that give it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tests.documents.reading import REPOSITORY

WORKERS = "Celery workers"

SERVERS = {
    "Redis": ("redis_url", "private_redis", "celery_redis"),
    "Redis Sentinel": ("redis_sentinel", "private_redis_sentinel"),
    "Redis Cluster": ("redis_cluster", "private_redis_cluster"),
    "PostgreSQL": ("postgres_url", "postgres_database", "private_postgres"),
    "MariaDB": ("mariadb_url", "mariadb_database", "private_mariadb"),
    "SQLite": ("sqlite_url",),
    "RabbitMQ": ("rabbitmq_url", "private_rabbitmq", "broker_urls", "impatient_rabbitmq"),
    WORKERS: (WORKERS,),
}
"""The fixtures by which a test gets a server, or workers."""

SIGNALS = {"kill": "SIGKILL", "pause": "SIGSTOP", "quit": "SIGQUIT"}
"""What a process is sent by these calls without arguments, or by the signal's own name."""

_NUMBER = re.compile(r"\bF([1-9]\d?)\b")
_MENTION = re.compile(r"^(?:F\d+(?:, )?)+: | \((?:F\d+(?:, )?)+\)")


@dataclass(frozen=True)
class Proof:
    """A test that names failure modes."""

    path: Path
    name: str
    promise: str
    """The first sentence of its docstring, without the numbers."""
    numbers: tuple[int, ...]
    servers: tuple[str, ...]


@dataclass
class Source:
    """A test file: its top-level names, and the fixtures that its tests can ask for."""

    path: Path
    tree: ast.Module
    names: dict[str, ast.stmt] = field(default_factory=dict)

    @property
    def classes(self) -> Iterator[ast.ClassDef]:
        return (node for node in self.tree.body if isinstance(node, ast.ClassDef))


def proofs() -> list[Proof]:
    """Return every test that names a failure mode, in the order of files and lines."""
    found = []
    for source in sources():
        for node, within in tests_of(source):
            docstring = ast.get_docstring(node) or ""
            numbers = tuple(dict.fromkeys(int(number) for number in _NUMBER.findall(docstring)))
            if numbers:
                name = f"{within.name}::{node.name}" if within and not is_contract(source) else node.name
                servers = servers_of(source, node, within)
                found.append(Proof(source.path, name, promise_of(docstring), numbers, servers))
    return found


def promise_of(docstring: str) -> str:
    """Return the first sentence, without the numbers."""
    paragraph = " ".join(docstring.split("\n\n", maxsplit=1)[0].split())
    sentence = re.split(r"(?<=\.) (?=[A-Z])", paragraph)[0]
    plain = _MENTION.sub("", sentence)
    return plain[0].upper() + plain[1:] if plain.split(maxsplit=1)[0].isalpha() else plain


@cache
def sources() -> list[Source]:
    files = [
        *sorted(REPOSITORY.glob("tests/**/test_*.py")),
        *sorted(REPOSITORY.glob("idem_tasks/testing/*contract*.py")),
    ]
    return [source_of(path) for path in files]


@cache
def source_of(path: Path) -> Source:
    source = Source(path, ast.parse(path.read_text()))
    for node in source.tree.body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                source.names[name] = node
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                source.names[name] = node
            case _:
                pass
    return source


def tests_of(source: Source) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, ast.ClassDef | None]]:
    """The tests of a file, each with the class that it stands in."""
    for node in source.tree.body:
        for each in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef) and each.name.startswith("test_"):
                yield each, node if isinstance(node, ast.ClassDef) else None


def is_contract(source: Source) -> bool:
    return source.path.parent.name == "testing"


# The servers


def servers_of(source: Source, test: ast.stmt, within: ast.ClassDef | None) -> tuple[str, ...]:
    """The servers that a test uses; those of a contract's test are those of all stores that are held to it."""
    if is_contract(source) and within is not None:
        named = {name for other in sources() for held in held_to(within.name, other) for name in reached(other, held)}
    else:
        named = reached(source, test, within)
    used = [server for server, fixtures in SERVERS.items() if not named.isdisjoint(fixtures)]
    if only_on_redis(test, source.names.get("pytestmark")):
        used.remove("RabbitMQ")
    return (*used, *sorted(named & set(SIGNALS.values())))


def held_to(contract: str, source: Source) -> list[ast.ClassDef]:
    """The test classes of a file that are subclasses of this contract, also by another contract."""
    contracts = {contract}
    for other in sources():
        if is_contract(other):
            contracts |= {each.name for each in other.classes if any(base in contracts for base in bases(each))}
    return [each for each in source.classes if not is_contract(source) and contracts & set(bases(each))]


def bases(node: ast.ClassDef) -> list[str]:
    return [base.id for base in node.bases if isinstance(base, ast.Name)]


def reached(source: Source, *nodes: ast.stmt | None) -> set[str]:
    """Every name and word that these statements hold, or what they use of their own file and by fixtures."""
    named: set[str] = set()
    left = [(source, node) for node in nodes if node is not None]
    seen: set[int] = set()
    while left:
        where, node = left.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        for part in parts_of(node):
            match part:
                case ast.arg(arg="shop" | "own_shop"):
                    named |= {WORKERS, "celery_redis", "broker_urls"}
                case ast.arg(arg=name):
                    named.add(name)
                    left += fixtures_named(name, where)
                case ast.Name(id=name) if name in where.names and not is_fixture(where.names[name]):
                    left.append((where, where.names[name]))
                case ast.Constant(value=str(word)):
                    named.add(word)
                    left += tasks_named(word, where)
                case ast.Attribute(attr=name) if name in SIGNALS.values():
                    named.add(name)
                case ast.Call(func=ast.Attribute(attr=name), args=[], keywords=[]) if name in SIGNALS:
                    named.add(SIGNALS[name])
                case _:
                    pass
    return named


def parts_of(node: ast.stmt) -> Iterator[ast.AST]:
    inner = [node]
    if isinstance(node, ast.ClassDef):  # a test's class gives fixtures; its other tests are not this test
        inner = [each for each in node.body if not getattr(each, "name", "").startswith("test_")]
    return (part for each in inner for part in ast.walk(each))


def is_fixture(node: ast.stmt) -> bool:
    return "pytest.fixture" in "".join(map(ast.unparse, getattr(node, "decorator_list", [])))


def fixtures_named(name: str, source: Source) -> Iterator[tuple[Source, ast.stmt]]:
    """The fixture of this name: of the file itself, or of the nearest conftest above it."""
    files = [source.path, *(folder / "conftest.py" for folder in source.path.parents if REPOSITORY in folder.parents)]
    for file in files:
        if file.exists() and is_fixture(found := source_of(file).names.get(name, ast.Pass())):
            yield source_of(file), found
            return


def tasks_named(word: str, source: Source) -> Iterator[tuple[Source, ast.stmt]]:
    """The Celery task that a test sends by this name."""
    shop = source.path.parent / "shop.py"
    if shop.exists() and isinstance(task := source_of(shop).names.get(word), ast.FunctionDef):
        yield source_of(shop), task


def only_on_redis(*marks: ast.stmt | None) -> bool:
    """Tell whether a test of Celery, or its whole file, is for this broker alone; Redis has the markers of all."""
    calls = [node for mark in marks if mark is not None for node in ast.walk(mark) if isinstance(node, ast.Call)]
    return any([ast.unparse(part) for part in call.args] == ["'broker'", "['redis']"] for call in calls)
