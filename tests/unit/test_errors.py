"""Errors carry their fields, survive pickle and say what to do."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest

from idem_tasks import errors
from idem_tasks.errors import (
    BatchError,
    ConfigurationError,
    ConflictError,
    DuplicateError,
    FingerprintMismatchError,
    IdemTasksError,
    InDoubtError,
    InProgressError,
    InvalidKeyError,
    LeaseLostError,
    MessageError,
    MissingExtraError,
    OutcomeError,
    ParkedError,
    ReplayedFailureError,
    StepsChangedError,
    StoreConfigurationError,
    StoreError,
    StoreUnavailableError,
)

PLACE: dict[str, Any] = {"scope": "shop.charge", "key": "A-1"}

EXAMPLES: list[tuple[IdemTasksError, dict[str, Any], str]] = [
    (IdemTasksError("something"), {}, "something"),
    (ConfigurationError("decorate the other way round"), {}, "decorate"),
    (
        MissingExtraError(package="PyMySQL", extra="mysql"),
        {"package": "PyMySQL", "extra": "mysql"},
        "pip install 'idem-tasks[mysql]'",
    ),
    (InvalidKeyError("key is empty"), {}, "key is empty"),
    (ConflictError("in the way", **PLACE), PLACE, "in the way"),
    (InProgressError(**PLACE, retry_after=2.34), {**PLACE, "retry_after": 2.34}, "try again in 2.3 s"),
    (FingerprintMismatchError(**PLACE), {**PLACE, "changed": ()}, "fingerprint=[...]"),
    (
        FingerprintMismatchError(**PLACE, changed=["amount", "currency"]),
        {**PLACE, "changed": ("amount", "currency")},
        "(amount, currency)",
    ),
    (DuplicateError(**PLACE, outcome={"paid": 3}), {**PLACE, "outcome": {"paid": 3}}, "was handled before"),
    (DuplicateError(**PLACE), {**PLACE, "outcome": None}, "was handled before"),
    (LeaseLostError(**PLACE, fencing_token=7), {**PLACE, "fencing_token": 7}, "fencing token 7"),
    (InDoubtError(**PLACE), PLACE, "idem-tasks resolve, or call Idempotency.resolve"),
    (
        ParkedError(**PLACE, crashes=4, failures=1),
        {**PLACE, "crashes": 4, "failures": 1},
        "idem-tasks resolve --rerun, or call Idempotency.resolve",
    ),
    (
        StepsChangedError(**PLACE, crashes=1, earlier=["charge", "mail"], now=["charge", "refund"]),
        {**PLACE, "crashes": 1, "failures": 0, "earlier": ("charge", "mail"), "now": ("charge", "refund")},
        "were charge, mail at an earlier attempt and are charge, refund now",
    ),
    (OutcomeError("not kept"), {}, "not kept"),
    (
        BatchError(results=["receipt", None], errors=[1]),
        {"results": ["receipt", None], "errors": (1,)},
        "1 of 2 messages have no outcome",
    ),
    (MessageError("no JSON"), {}, "no JSON"),
    (
        ReplayedFailureError(error_type="shop.Declined", error_message="no"),
        {"error_type": "shop.Declined", "error_message": "no"},
        "shop.Declined: no",
    ),
    (StoreError("READONLY"), {}, "READONLY"),
    (StoreUnavailableError("refused"), {}, "refused"),
    (StoreConfigurationError("no table"), {}, "no table"),
]

each_error = pytest.mark.parametrize(
    "error, fields, words", EXAMPLES, ids=[type(example[0]).__name__ for example in EXAMPLES]
)


def fields_of(error: IdemTasksError, names: dict[str, Any]) -> dict[str, Any]:
    return {name: getattr(error, name) for name in names}


def test_every_error_is_tried_here() -> None:
    """An error added to the tree has to be added to these examples."""
    defined = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)}
    assert {type(error) for error, _, _ in EXAMPLES} == defined


@each_error
def test_fields_and_message(error: IdemTasksError, fields: dict[str, Any], words: str) -> None:
    """Each error has its fields, one message, and says in it what to do where something can be done."""
    assert fields_of(error, fields) == fields
    assert words in str(error)
    assert error.args == (str(error),)
    if "key" in fields:
        assert "shop.charge" in str(error) or type(error) is ConflictError


@each_error
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_survives_pickle(error: IdemTasksError, fields: dict[str, Any], words: str, protocol: int) -> None:
    """Type, message and fields come back from every pickle protocol: one that does not kills a Celery worker."""
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is type(error)
    assert (str(again), again.args) == (str(error), error.args)
    assert fields_of(again, fields) == fields


@each_error
def test_survives_copies(error: IdemTasksError, fields: dict[str, Any], words: str) -> None:
    """Shallow and deep copies are the same error."""
    for again in (copy.copy(error), copy.deepcopy(error)):
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert fields_of(again, fields) == fields


def test_survives_pickle_twice_with_notes() -> None:
    """Notes that somebody added travel along, as often as it travels."""
    error = InProgressError(**PLACE, retry_after=1.0)
    error.add_note("second copy")
    again = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(error))))
    assert again.__notes__ == ["second copy"]
    assert again.retry_after == 1.0


class UsersOwnError(InDoubtError):
    """A subclass of a user's, with another signature."""

    def __init__(self, order: int) -> None:
        super().__init__(scope="orders", key=str(order))
        self.order = order


def test_a_users_subclass_survives_pickle() -> None:
    """An error of a user's own, derived from ours, needs no help to be pickled."""
    again = pickle.loads(pickle.dumps(UsersOwnError(5)))
    assert type(again) is UsersOwnError
    assert (again.order, again.key, again.scope) == (5, "5", "orders")


def test_a_missing_extra_is_an_import_error_in_all() -> None:
    """`except ImportError` catches it, and its `msg` says what to install."""
    error = MissingExtraError(package="celery", extra="celery")
    assert isinstance(error, ImportError)
    assert error.msg == str(error)


@pytest.mark.parametrize(
    "error, base",
    [
        (ConfigurationError, ValueError),
        (MissingExtraError, ImportError),
        (MissingExtraError, ConfigurationError),
        (InvalidKeyError, ValueError),
        (InProgressError, ConflictError),
        (FingerprintMismatchError, ConflictError),
        (DuplicateError, ConflictError),
        (LeaseLostError, ConflictError),
        (StoreUnavailableError, StoreError),
        (StoreConfigurationError, ConfigurationError),
        (StoreConfigurationError, StoreError),
    ],
)
def test_the_tree(error: type[Exception], base: type[Exception]) -> None:
    """What is caught by its base stays caught by it."""
    assert issubclass(error, base)
    assert issubclass(error, IdemTasksError)


def test_one_root_is_no_builtin_outage() -> None:
    """No error of ours is taken for the system's own, which callers handle in their own way."""
    for error, _fields, _fix in EXAMPLES:
        assert not isinstance(error, OSError | RuntimeError | TimeoutError)


def test_keys_are_shown_unambiguously() -> None:
    """A key with spaces or line breaks cannot be misread, nor forge a line in a log."""
    assert r"'A \n1'" in str(InDoubtError(scope="s", key="A \n1"))


def test_every_error_is_rebuilt_from_its_message_by_a_json_result_backend() -> None:
    """Celery keeps an exception's type and arguments as JSON, and calls the type with them."""
    for error, _fields, _fix in EXAMPLES:
        rebuilt = type(error)(*json.loads(json.dumps(error.args)))
        assert type(rebuilt) is type(error)
        assert str(rebuilt) == str(error)
