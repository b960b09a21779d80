"""Kafka, as far as librdkafka's mock cluster speaks its protocol: produce, fetch, groups, rebalances, commits."""

import sys
from pathlib import Path

from tests.services.run import Run
from tests.services.server import Server, Unavailable
from tests.services.waiting import wait_until


class KafkaServer(Server):
    """A cluster of one broker in a process of its own; its partitions are in memory, four for each topic."""

    name = "kafka"
    programs = (sys.executable,)

    def __init__(self, run: Run, **options: str | int) -> None:
        super().__init__(run, **options)
        self._address = self.folder / "address"

    @classmethod
    def find(cls) -> str:
        """This very Python, where confluent-kafka is installed."""
        try:
            import confluent_kafka  # noqa: F401
        except ImportError:
            raise Unavailable("confluent-kafka is not installed here") from None
        return sys.executable

    @property
    def url(self) -> str:
        return self._address.read_text()

    def prepare(self) -> None:
        self._address.unlink(missing_ok=True)

    def command(self) -> list[str]:
        return [self.program, str(Path(__file__).with_name("kafka_mock.py")), str(self._address)]

    def answers(self) -> bool:
        return self._address.exists()


def make_topic(bootstrap: str, name: str) -> list[int]:
    """Have the cluster make a topic, as it does when a producer asks for one; returns its partitions."""
    from confluent_kafka import Producer

    producer, found = Producer({"bootstrap.servers": bootstrap}), list[int]()

    def is_made() -> bool:
        found[:] = producer.list_topics(name, timeout=30).topics[name].partitions
        return len(found) > 0

    wait_until(is_made, seconds=30, what=f"topic {name}")
    return found
