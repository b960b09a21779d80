"""One delivery of a message on its way through the story, and what it needs on that way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from idem_tasks.claims import ClaimRequest, Lease
from idem_tasks.events import Announcer, Event, EventName
from idem_tasks.heartbeat import Heartbeat
from idem_tasks.hosts import Host
from idem_tasks.outbox import OutgoingMessages, Relay, Senders
from idem_tasks.outcomes import Codec, OutcomeContext
from idem_tasks.policy import Policy
from idem_tasks.runtime import Runtime
from idem_tasks.session_argument import SessionOfCall
from idem_tasks.stores.base import Store
from idem_tasks.values import value


@dataclass(frozen=True, slots=True)
class Services:
    """An `Idempotency` as one runtime uses it."""

    store: Store
    heartbeat: Heartbeat
    announce: Announcer
    codec: Codec
    runtime: Runtime
    senders: Senders = field(default_factory=Senders)

    def outgoing(self, lease: Lease) -> OutgoingMessages:
        """Make what keeps the messages of one claim."""
        return OutgoingMessages(lease, self.store, self.senders)

    @property
    def relay(self) -> Relay:
        """What sends the messages of recorded outcomes."""
        return Relay(self.store, self.senders, self.announce, self.runtime)


@value(frozen=True, slots=True)
class Call:
    """One delivery: what was asked for, with whose services, for which return type, inside which framework."""

    request: ClaimRequest
    services: Services
    return_type: Callable[[], Any]
    host: Host | None = None
    session: SessionOfCall | None = None
    step: str | None = None
    """The name of the step of its handler that this is about; None: the handler itself."""

    @property
    def policy(self) -> Policy:
        """The policy of the handler."""
        return self.request.policy

    @property
    def context(self) -> OutcomeContext:
        """What an encoded outcome is bound to."""
        return OutcomeContext(self.request.scope, self.request.key, self.request.fingerprint, self.step)

    def announce(self, name: EventName, **details: Any) -> None:
        """Tell the observers what happened to this key, or to a step of it."""
        announce = self.services.announce
        if announce.is_heard(name):
            if self.step is not None:
                details["step"] = self.step
            announce.tell(Event(name, self.request.scope, self.request.key, details))
