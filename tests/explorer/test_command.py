"""`python -m idem_tasks.testing.explorer` tells what it did, and what it cannot do."""

from __future__ import annotations

import pytest

from idem_tasks.testing.explorer import AT_RANDOM, EXHAUSTIVE
from idem_tasks.testing.explorer.__main__ import main

FEW = ["--only", "many faults, rerun", "--executions", "3", "--seed", "7"]


def test_what_is_drawn_is_not_said_to_be_all(capsys: pytest.CaptureFixture[str]) -> None:
    """Executions drawn at random have no end that could be reached."""
    assert main(FEW) == 0
    out = capsys.readouterr().out
    assert "3 executions" in out
    assert "drawn at random" in out
    assert "to the end" not in out
    assert "no law broken" in out


def test_a_scenario_is_gone_through_to_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    """It says so, or that time did not allow it."""
    assert main(["--only", "one fault, rerun", "--seconds", "0.01"]) == 0
    assert ", not to the end" in capsys.readouterr().out


def test_one_execution_is_gone_through_again(capsys: pytest.CaptureFixture[str]) -> None:
    """By the number of each action."""
    assert main(["--replay", "one fault, rerun:0.0"]) == 0
    assert capsys.readouterr().out == "no law broken\n"


@pytest.mark.parametrize("numbers", ["", ":", ":0.99", ":0.-1", ":0.x"])
def test_an_execution_that_does_not_exist_is_refused(numbers: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A find of other code, or half of one: usage, and neither a traceback nor a verdict."""
    with pytest.raises(SystemExit, match="2"):
        main(["--replay", f"one fault, rerun{numbers}"])
    streams = capsys.readouterr()
    assert "error: argument --replay" in streams.err
    assert "no law broken" not in streams.out


def test_an_unknown_scenario_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Each known one stands quoted, for names have commas."""
    for options in (["--only", "nothing"], ["--replay", "nothing:0.0"]):
        with pytest.raises(SystemExit, match="2"):
            main(options)
        err = capsys.readouterr().err
        assert all(f"'{scenario.name}'" in err for scenario in (*EXHAUSTIVE, *AT_RANDOM))


@pytest.mark.parametrize("option", ["--executions", "--seconds"])
def test_nothing_is_no_proof(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Who asks for no execution at all is not told that no law was broken."""
    with pytest.raises(SystemExit, match="2"):
        main([*FEW, option, "0"])
    assert "more than 0" in capsys.readouterr().err


def test_help_names_the_scenarios(capsys: pytest.CaptureFixture[str]) -> None:
    """One in a line, as `--only` takes it."""
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert all(f"'{scenario.name}'" in lines for scenario in (*EXHAUSTIVE, *AT_RANDOM))
