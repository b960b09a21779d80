"""Explores the library with one of its modules broken on purpose, in a process of its own.

The shipped file is not touched. An import hook gives this process the same module from a changed text, under a file
name that only it has; every other module is the shipped one. What is told at the end proves that it was so: the
difference between the text that lives in this process and the shipped file, and which of its lines ran while the law
was broken.
"""

from __future__ import annotations

import difflib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any

from tests.explorer.mutant import Mutant  # which imports nothing of the library, nor does this
from tests.explorer.mutants import MUTANTS

ROOT = Path(__file__).parents[2]

SECONDS = 60.0
"""How long one mutant is explored at most, on a machine that is busy; most are caught in less than one."""

_EXECUTIONS = 20_000
"""How many are drawn for a mutant with a seed, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What became of one exploration; `ran` are the changed lines that ran on the way to the broken law."""

    scenario: str
    law: str | None
    trace: str
    states: int
    seconds: float
    diff: str
    ran: list[str]

    def __str__(self) -> str:
        ran = ", ".join(self.ran)
        return (
            f"{self.diff}\nthe changed lines that ran: {ran}\n{self.states} states, {self.seconds:.1f} s\n{self.trace}"
        )


def run(name: str) -> Report:
    """Explore the mutant of this name in a fresh process."""
    command = [sys.executable, "-m", "tests.explorer.mutant_run", name]
    # Nobody asks how much of a broken module is covered.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False)
    if ended.returncode != 0:
        raise RuntimeError(f"{name} could not be explored:\n{ended.stderr}")
    return Report(**json.loads(ended.stdout))


class _BrokenModule(importlib.abc.ExecutionLoader):
    """Loads a module from its patched text, never from bytecode."""

    def __init__(self, mutant: Mutant, shipped: Path) -> None:
        self.shipped = shipped
        self.source = mutant.broken(shipped.read_text())

    def get_filename(self, fullname: str) -> str:
        return str(self.shipped.with_suffix(".broken.py"))

    def get_source(self, fullname: str) -> str:
        return self.source

    def exec_module(self, module: ModuleType) -> None:
        _traced(self.get_filename(module.__name__), lambda: super(_BrokenModule, self).exec_module(module), _imported)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module broken; all others are found as ever."""

    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._mutant.module:
            return None
        shipped = importlib.machinery.PathFinder.find_spec(fullname, path)
        assert shipped is not None
        assert shipped.origin is not None
        return importlib.util.spec_from_loader(fullname, _BrokenModule(self._mutant, Path(shipped.origin)))


_imported: set[tuple[str, int]] = set()
"""Lines that ran when the broken module was imported."""


def _traced(filename: str, function: Callable[[], Any], into: set[tuple[str, int]]) -> None:
    """Call the function, and note each line of this file that runs, with the name of what it stands in."""

    def line(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            into.add((_name(frame.f_code), frame.f_lineno))
        return line

    def call(frame: FrameType, event: str, arg: Any) -> Any:
        return line if frame.f_code.co_filename == filename else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        function()
    finally:
        sys.settrace(before)


def _name(code: CodeType) -> str:
    return code.co_qualname


def _changed_lines(shipped: str, live: str) -> set[int]:
    """Return the numbers of the live text's lines that are not in the shipped one, or stand where some are gone."""
    changed: set[int] = set()
    lines = difflib.SequenceMatcher(None, shipped.splitlines(), live.splitlines(), autojunk=False)
    for tag, _, _, begin, end in lines.get_opcodes():
        if tag == "delete":
            changed.add(begin + 1)
        elif tag != "equal":
            changed.update(range(begin + 1, end + 1))
    return changed


def _main(name: str) -> None:
    mutant = next(mutant for mutant in MUTANTS if mutant.name == name)
    early = [module for module in sys.modules if module.startswith("idem_tasks")]
    assert not early, f"imported too early to be broken: {early}"
    sys.meta_path.insert(0, _Finder(mutant))

    from idem_tasks.testing.explorer.search import explore, explore_at_random, replay
    from tests.explorer.mutant_scenarios import SCENARIOS

    scenario = SCENARIOS[mutant.scenario]
    module = sys.modules[mutant.module]
    loader = module.__loader__
    assert isinstance(loader, _BrokenModule), f"{mutant.module} is the shipped one"
    shipped, live = loader.shipped.read_text(), inspect.getsource(module)
    file = str(loader.shipped.relative_to(ROOT))
    diff = difflib.unified_diff(shipped.splitlines(), live.splitlines(), file, f"{file}, broken", lineterm="", n=3)

    if mutant.seed is None:
        explored = explore(scenario, seconds=SECONDS)
    else:
        explored = explore_at_random(scenario, mutant.seed, executions=_EXECUTIONS, seconds=SECONDS)
    find, ran = explored.find, {line for line in _imported if line[0] == "<module>"}
    if find is not None:
        numbers = [int(number) for number in find.replay.rpartition(":")[2].split(".") if number]
        again: list[Any] = []
        _traced(loader.get_filename(mutant.module), lambda: again.append(replay(scenario, numbers)), ran)
        assert again[0] is not None, "the same actions broke nothing the second time"
        assert again[0].violation.law is find.violation.law
    changed = _changed_lines(shipped, live)
    report = Report(
        scenario=scenario.name,
        law=None if find is None else find.violation.law.name,
        trace=f"nothing found, {'everything was' if explored.complete else 'not everything was'} tried"
        if find is None
        else str(find),
        states=explored.states,
        seconds=explored.seconds,
        diff="\n".join(diff),
        ran=[f"{name}, line {number}" for name, number in sorted(ran, key=lambda line: line[1]) if number in changed],
    )
    json.dump(asdict(report), sys.stdout)


if __name__ == "__main__":
    _main(sys.argv[1])
