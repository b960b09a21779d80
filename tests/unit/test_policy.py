"""A policy is right or refused when it is made."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from datetime import timedelta
from decimal import Decimal
from typing import Any, get_type_hints

import pytest
from kombu.transport.redis import Channel as RedisChannel

from idem_tasks.errors import ConfigurationError
from idem_tasks.policy import FIELD_NAMES, Policy, PolicyFields


def make(**fields: Any) -> Policy:
    """Make a policy of values that a type checker would refuse."""
    return Policy(**fields)


def test_defaults() -> None:
    """The defaults are those of the documentation."""
    assert dataclasses.asdict(Policy()) == {
        "lease": 60.0,
        "max_hold": 3600.0,
        "retention": 604800.0,
        "cache_ttl": 86400.0,
        "on_duplicate": "replay",
        "on_in_progress": "raise",
        "wait_timeout": 10.0,
        "on_crash": "rerun",
        "record_failures": (),
        "safe_to_retry": (),
        "max_attempts": None,
        "max_crashes": 3,
        "on_marker_unavailable": "bypass",
        "on_store_unavailable": "raise",
        "max_outcome_bytes": 1048576,
        "shadow": False,
        "enabled": True,
    }


def test_the_default_retention_outlasts_every_redelivery() -> None:
    """A week is far more than the hours after which Celery's brokers deliver again by default (F16)."""
    slowest = max(RedisChannel.visibility_timeout, 12 * 3600)  # the second: the most that SQS allows
    assert Policy().retention > 10 * slowest


@pytest.mark.parametrize("name", ["lease", "max_hold", "retention", "cache_ttl", "wait_timeout"])
@pytest.mark.parametrize(
    "given, seconds",
    [(90, 90.0), (90.5, 90.5), (timedelta(minutes=2), 120.0), (timedelta(seconds=70, milliseconds=1), 70.001)],
)
def test_durations_become_float_seconds(name: str, given: Any, seconds: float) -> None:
    """A duration is a number of seconds or a timedelta, and is kept as float seconds."""
    policy = make(**{"max_hold": 7200, "lease": 60, name: given})
    kept = getattr(policy, name)
    assert kept == pytest.approx(seconds)
    assert type(kept) is float


@pytest.mark.parametrize("name", ["lease", "max_hold", "retention", "cache_ttl", "wait_timeout"])
@pytest.mark.parametrize(
    "given",
    [
        -1,
        -0.001,
        math.nan,
        math.inf,
        -math.inf,
        10000000000.0,
        timedelta(seconds=-1),
        timedelta.max,
        True,
        "60",
        None,
        Decimal(60),
        [60],
        60 + 0j,
    ],
    ids=repr,
)
def test_durations_that_are_none(name: str, given: Any) -> None:
    """What is not a finite time of 0 s or more is refused, naming the field."""
    with pytest.raises(ConfigurationError, match=name):
        make(**{name: given})


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"lease": 0.09}, "lease=0.09 is too short"),
        ({"lease": 0}, "too short"),
        ({"lease": 10, "max_hold": 9.99}, "max_hold=9.99 is shorter than lease=10"),
        ({"lease": 3601}, "max_hold=3600.0 is shorter than lease=3601"),
        ({"retention": 0}, "retention must be more than 0"),
        ({"cache_ttl": 0}, "cache_ttl must be more than 0"),
        ({"safe_to_retry": KeyError}, 'on_crash="hold"'),
    ],
)
def test_contradictions(fields: dict[str, Any], words: str) -> None:
    """Values that cannot work together are refused, naming both."""
    with pytest.raises(ConfigurationError) as refused:
        make(**fields)
    assert words in str(refused.value)


def test_borders_are_allowed() -> None:
    """The shortest lease, a hold of one lease, and no waiting at all are allowed."""
    policy = Policy(lease=0.1, max_hold=0.1, wait_timeout=0, max_crashes=0, max_outcome_bytes=0)
    assert (policy.lease, policy.max_hold, policy.wait_timeout) == (0.1, 0.1, 0.0)


def test_the_cache_never_outlasts_the_retention() -> None:
    """A retention below the default `cache_ttl` shortens it: Redis never answers longer than SQL."""
    assert Policy(retention=60).cache_ttl == 60
    assert Policy(retention=60, cache_ttl=61).cache_ttl == 60
    assert Policy(retention=60, cache_ttl=59).cache_ttl == 59


@pytest.mark.parametrize(
    "name, choices",
    [
        ("on_duplicate", ["replay", "skip", "raise"]),
        ("on_in_progress", ["raise", "wait"]),
        ("on_crash", ["rerun", "hold"]),
        ("on_marker_unavailable", ["bypass", "raise"]),
        ("on_store_unavailable", ["raise", "run"]),
    ],
)
def test_choices(name: str, choices: list[str]) -> None:
    """Each choice is accepted; anything else is refused with the list of choices."""
    for choice in choices:
        assert getattr(make(**{name: choice}), name) == choice
    for wrong in ("", "Replay", None, 1, ["raise"], lambda: "hold"):
        with pytest.raises(ConfigurationError) as refused:
            make(**{name: wrong})
        assert all(repr(choice) in str(refused.value) for choice in choices)
        assert name in str(refused.value)


@pytest.mark.parametrize("name", ["max_attempts", "max_crashes", "max_outcome_bytes"])
def test_counts(name: str) -> None:
    """A limit is a whole number of 0 or more; None means no limit where there may be none."""
    assert getattr(make(**{name: 5}), name) == 5
    for wrong in (-1, 1.0, "3", True, math.inf):
        with pytest.raises(ConfigurationError, match=name):
            make(**{name: wrong})
    if name == "max_outcome_bytes":
        with pytest.raises(ConfigurationError, match=name):
            make(max_outcome_bytes=None)
    else:
        assert getattr(make(**{name: None}), name) is None


@pytest.mark.parametrize("name", ["shadow", "enabled"])
def test_switches(name: str) -> None:
    """A switch is True or False, not something that looks like it."""
    for wrong in (0, 1, "yes", "false", None):
        with pytest.raises(ConfigurationError, match=name):
            make(**{name: wrong})


@pytest.mark.parametrize("name", ["record_failures", "safe_to_retry"])
def test_exception_types(name: str) -> None:
    """One type, or a tuple, list or set of types, becomes a tuple."""
    rest: dict[str, Any] = {"on_crash": "hold"}
    for given in (KeyError, (KeyError,), [KeyError], {KeyError}, frozenset({KeyError})):
        assert getattr(make(**rest, **{name: given}), name) == (KeyError,)
    assert getattr(make(**rest, **{name: (KeyError, OSError)}), name) == (KeyError, OSError)
    assert getattr(make(**rest, **{name: ()}), name) == ()
    for wrong in ("KeyError", KeyError(), int, None, [KeyError, "x"], (KeyError, (OSError,))):
        with pytest.raises(ConfigurationError, match=name):
            make(**rest, **{name: wrong})


def test_a_shutdown_is_never_a_recorded_failure() -> None:
    """`record_failures` takes Exceptions only; `safe_to_retry` also what stops a process."""
    with pytest.raises(ConfigurationError, match="record_failures"):
        make(record_failures=(SystemExit,))
    assert Policy(on_crash="hold", safe_to_retry=(SystemExit,)).safe_to_retry == (SystemExit,)


def test_replace_checks_again() -> None:
    """A changed copy is as right as a new one, and the first stays as it was."""
    first = Policy(lease=30)
    second = first.replace(lease=timedelta(seconds=20), on_crash="hold", safe_to_retry=KeyError)
    assert (first.lease, second.lease, second.on_crash, second.safe_to_retry) == (30, 20, "hold", (KeyError,))
    assert first.replace() is first
    with pytest.raises(ConfigurationError, match="safe_to_retry"):
        second.replace(on_crash="rerun")
    with pytest.raises(ConfigurationError, match="max_hold"):
        first.replace(max_hold=1)


def test_replace_names_an_unknown_field() -> None:
    """A misspelt field is refused with the list of fields."""
    with pytest.raises(ConfigurationError) as refused:
        Policy().replace(leese=5, ttl=3)
    assert "leese, ttl" in str(refused.value)
    assert "max_hold" in str(refused.value)


def test_a_policy_is_a_value() -> None:
    """It cannot be changed, and can be compared, hashed, copied and sent to another process."""
    policy = Policy(lease=5, record_failures=(KeyError,))
    for again in (
        pickle.loads(pickle.dumps(policy)),
        copy.deepcopy(policy),
        make(lease=5.0, record_failures=KeyError),
    ):
        assert again == policy
        assert hash(again) == hash(policy)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.lease = 3  # type: ignore[misc]


def test_the_keywords_are_the_fields() -> None:
    """The typed keywords of the decorator are exactly the policy's fields."""
    assert set(get_type_hints(PolicyFields)) == FIELD_NAMES == {field.name for field in dataclasses.fields(Policy)}


@pytest.mark.parametrize("value", ["1", "true", "TRUE", "yes", "on"])
def test_the_environment_turns_it_off(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """IDEM_TASKS_DISABLED=1 turns every policy off, at once."""
    policy = Policy()
    assert policy.active
    monkeypatch.setenv("IDEM_TASKS_DISABLED", value)
    assert not policy.active
    monkeypatch.delenv("IDEM_TASKS_DISABLED")
    assert policy.active


@pytest.mark.parametrize("value", ["", "0", "false", "False", "no", "off", "maybe"])
def test_only_a_clear_yes_turns_it_off(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """Nobody who writes IDEM_TASKS_DISABLED=false runs unprotected."""
    monkeypatch.setenv("IDEM_TASKS_DISABLED", value)
    assert Policy().active


def test_enabled_false_is_not_active() -> None:
    """A policy can be off by itself."""
    assert not Policy(enabled=False).active
