"""The process in which librdkafka's mock cluster lives: `python kafka_mock.py FILE` writes its address to FILE."""

import signal
import sys
from pathlib import Path

from confluent_kafka import Producer


def main(file: Path) -> None:
    cluster = Producer({"bootstrap.servers": "none:1", "test.mock.num.brokers": 1, "log_level": 0})
    (broker,) = cluster.list_topics(timeout=30).brokers.values()
    written = file.with_suffix(".new")
    written.write_text(f"{broker.host}:{broker.port}")
    written.rename(file)  # whole or not at all
    signal.pause()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
