"""Side effects once, however often the message comes.

>>> from idem_tasks import configure, idempotent_task
>>> idempotency = configure(database_url="sqlite://")
>>> @idempotent_task(key="{order_id}")
... def charge(order_id, amount):
...     return f"charged {amount}"
>>> charge("A-1", 5), charge("A-1", 5)
('charged 5', 'charged 5')
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from idem_tasks.asking import HOLD, RERUN, Outcome
from idem_tasks.batch_decorator import idempotent_batch
from idem_tasks.claims import (
    AuditEntry,
    Claim,
    DeadClaim,
    OutboxMessage,
    Record,
    State,
    StepRecord,
    current_claim,
    current_claims,
)
from idem_tasks.config import configure
from idem_tasks.decorator import IdempotentFunction, idempotency_of, idempotent_task
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
from idem_tasks.events import Event, EventName, Observer, log_event
from idem_tasks.idempotency import Idempotency
from idem_tasks.outbox import RelayReport, Sender
from idem_tasks.outcomes import Codec, JsonCodec, OutcomeContext
from idem_tasks.policy import Policy
from idem_tasks.stores import store_from_url
from idem_tasks.stores.base import Store

if TYPE_CHECKING:
    from idem_tasks.stores.memory import MemoryStore
    from idem_tasks.stores.redis import RedisStore
    from idem_tasks.stores.sql import SQLStore
    from idem_tasks.stores.tiered import TieredStore

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 - in groups, in the order in which a reader needs them
    # Handlers
    "configure",
    "current_claim",
    "current_claims",
    "idempotency_of",
    "idempotent_batch",
    "idempotent_task",
    "Claim",
    "Idempotency",
    "IdempotentFunction",
    "Policy",
    # Stores
    "AuditEntry",
    "MemoryStore",
    "Record",
    "RedisStore",
    "SQLStore",
    "State",
    "StepRecord",
    "Store",
    "TieredStore",
    "store_from_url",
    # What is asked after a crash
    "HOLD",
    "RERUN",
    "DeadClaim",
    "Outcome",
    # Outcomes
    "Codec",
    "JsonCodec",
    "OutcomeContext",
    # Messages
    "OutboxMessage",
    "RelayReport",
    "Sender",
    # Events
    "Event",
    "EventName",
    "Observer",
    "log_event",
    # Errors
    "BatchError",
    "ConfigurationError",
    "ConflictError",
    "DuplicateError",
    "FingerprintMismatchError",
    "IdemTasksError",
    "InDoubtError",
    "InProgressError",
    "InvalidKeyError",
    "LeaseLostError",
    "MessageError",
    "MissingExtraError",
    "OutcomeError",
    "ParkedError",
    "ReplayedFailureError",
    "StepsChangedError",
    "StoreConfigurationError",
    "StoreError",
    "StoreUnavailableError",
    "__version__",
]

# These load a client library (or are not needed by most), so they are imported when they are first named.
_ON_DEMAND = {
    "MemoryStore": "idem_tasks.stores.memory",
    "RedisStore": "idem_tasks.stores.redis",
    "SQLStore": "idem_tasks.stores.sql",
    "TieredStore": "idem_tasks.stores.tiered",
}


def __getattr__(name: str) -> Any:
    if name in _ON_DEMAND:
        return getattr(importlib.import_module(_ON_DEMAND[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
