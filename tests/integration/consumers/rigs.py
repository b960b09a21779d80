"""A consumer of each client, in a thread of its own: it connects again when it was cut, until it is stopped."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, Self

import aio_pika
import pika
from aio_pika.abc import AbstractIncomingMessage
from kombu import Connection, Queue
from kombu.mixins import ConsumerMixin
from pika.exceptions import AMQPError
from sqlalchemy.ext.asyncio import AsyncEngine

from idem_tasks import Event, Idempotency
from idem_tasks.integrations import aio_pika as of_aio_pika, kombu_consumer as of_kombu, pika as of_pika
from tests.services.waiting import wait_until

PREFETCH = 8
SECONDS = 20.0


class Rig:
    """`work` is given the body of each message whose handler begins; `handled` are those whose handler has ended."""

    def __init__(self, url: str, queue: str, idem: Idempotency, work: Callable[..., Any], /, **options: Any) -> None:
        self.url = url
        self.queue = queue
        self.idem = idem
        self.work = work
        self.handled: list[str] = []
        self.begun: list[str] = []
        self.connections = 0
        self.failed: BaseException | None = None
        self.engine: AsyncEngine | None = None  # to dispose of in the loop that used it
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=queue)
        options = {"queue": queue, "idempotency": idem, "lease": 1.0, "longest_delay": 0.2, **options}
        self.callback = self.make_callback(options)

    def start(self) -> Self:
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop it in good order, and raise what it failed with."""
        self._stop.set()
        self._thread.join(timeout=SECONDS)
        if self.failed is not None:
            raise self.failed

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_for(self, *bodies: str) -> None:
        """Wait until the handler has come to its end for exactly these."""
        wait_until(lambda: len(self.handled) >= len(bodies), seconds=SECONDS, what=f"{bodies} to be handled")
        assert sorted(self.handled) == sorted(bodies)

    def _run(self) -> None:
        try:
            self.consume()
        except BaseException as error:  # noqa: BLE001 - it is raised by stop
            self.failed = error

    def _handle(self, body: str) -> str:
        self.begun.append(body)
        self.work(body)
        self.handled.append(body)
        return f"handled {body}"

    def make_callback(self, options: dict[str, Any]) -> Any:
        raise NotImplementedError

    def consume(self) -> None:
        raise NotImplementedError


class PikaRig(Rig):
    def make_callback(self, options: dict[str, Any]) -> Any:
        if "session" in options:

            @of_pika.idempotent_callback(**options)
            def with_session(channel: Any, method: Any, properties: Any, body: bytes, session: Any) -> str:
                self.begun.append(body.decode())
                self.work(body.decode(), session)
                return "done"

            return with_session

        @of_pika.idempotent_callback(**options)
        def on_message(channel: Any, method: Any, properties: Any, body: bytes) -> str:
            return self._handle(body.decode())

        return on_message

    def consume(self) -> None:
        with self.callback:
            while not self._stop.is_set():
                with contextlib.suppress(AMQPError):  # it was cut, and connects again
                    self._consume()

    def _consume(self) -> None:
        connection = pika.BlockingConnection(pika.URLParameters(self.url))
        self.connections += 1
        channel = connection.channel()
        channel.basic_qos(prefetch_count=PREFETCH)
        channel.basic_consume(self.queue, self.callback)
        while not self._stop.is_set():
            connection.process_data_events(time_limit=0.05)
            if channel.is_closed:  # by the broker
                break
        else:
            self.callback.close()
        connection.close()


class AioPikaRig(Rig):
    def make_callback(self, options: dict[str, Any]) -> Any:
        if "session" in options:

            @of_aio_pika.idempotent_callback(**options)
            async def with_session(message: AbstractIncomingMessage, session: Any) -> str:
                self.begun.append(message.body.decode())
                self.work(message.body.decode(), session)
                return "done"

            return with_session

        @of_aio_pika.idempotent_callback(**options)
        async def on_message(message: AbstractIncomingMessage) -> str:
            body = message.body.decode()
            self.begun.append(body)
            await asyncio.to_thread(self.work, body)
            self.handled.append(body)
            return f"handled {body}"

        return on_message

    def consume(self) -> None:
        asyncio.run(self._consume())

    async def _consume(self) -> None:
        connection = await aio_pika.connect_robust(self.url, reconnect_interval=0.2)
        self.connections += 1
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=PREFETCH)
        queue = await channel.get_queue(self.queue)
        await queue.consume(self.callback)
        await asyncio.to_thread(self._stop.wait)
        await self.callback.close()
        await connection.close()
        await self.idem.aclose()
        if self.engine is not None:
            await self.engine.dispose()


class KombuRig(Rig):
    def make_callback(self, options: dict[str, Any]) -> Any:
        if "session" in options:

            @of_kombu.idempotent_callback(**options)
            def with_session(body: str, message: Any, session: Any) -> str:
                self.begun.append(body)
                self.work(body, session)
                return "done"

            return with_session

        @of_kombu.idempotent_callback(**options)
        def on_message(body: str, message: Any) -> str:
            return self._handle(body)

        return on_message

    def consume(self) -> None:
        with Connection(self.url, transport_options=self.transport_options) as connection:
            _Consumers(connection, self).run()  # type: ignore[no-untyped-call]
        self.callback.close()

    transport_options: dict[str, Any] = {}  # noqa: RUF012 - nobody changes it


class _Consumers(ConsumerMixin):
    def __init__(self, connection: Connection, rig: KombuRig) -> None:
        self.connection = connection
        self._rig = rig

    def get_consumers(self, consumer: Any, channel: Any) -> list[Any]:
        queue = Queue(self._rig.queue, exchange="", routing_key=self._rig.queue, no_declare=True)
        return [consumer([queue], callbacks=[self._rig.callback], prefetch_count=PREFETCH)]

    def on_connection_revived(self) -> None:
        self._rig.connections += 1

    def on_iteration(self) -> None:
        self.should_stop = self._rig._stop.is_set()
        self._rig.callback.on_iteration()

    def consume(self, *args: Any, **kwargs: Any) -> Any:
        return super().consume(*args, **{**kwargs, "safety_interval": 0.05})  # type: ignore[no-untyped-call]


RIGS: dict[str, type[Rig]] = {"pika": PikaRig, "aio_pika": AioPikaRig, "kombu": KombuRig}


class Heard:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def count(self, name: str) -> int:
        return sum(event.name.value == name for event in self.events)

    def wait_for(self, name: str, times: int = 1) -> None:
        wait_until(lambda: self.count(name) >= times, seconds=SECONDS, what=f"{times} events {name}")
