"""Kafka, as far as librdkafka's mock cluster speaks its protocol: produce, fetch, groups, rebalances, commits."""

import sys
from pathlib import Path

from tests.services.run import Run
from tests.services.server import Server, Unavailable


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
