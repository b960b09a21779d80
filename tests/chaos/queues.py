"""How many of a shop's messages are not settled: waiting, or delivered and not acknowledged."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from tests.chaos.servers import Broker
from tests.services.rabbitmq_server import RabbitMQServer
from tests.services.server import find_program

QUEUE = "orders"

VISIBILITY_TIMEOUT = 8
"""Seconds after which a Redis broker delivers again what was not acknowledged."""


def celery_settings(broker: Broker, *, url: str) -> dict[str, Any]:
    """What publisher and workers of a shop have in common."""
    transport: dict[str, Any] = {}
    if not isinstance(broker.server, RabbitMQServer):
        transport = {
            "visibility_timeout": VISIBILITY_TIMEOUT,
            # A worker killed while it restores messages would keep all others from it for 300 s.
            "unacked_mutex_expire": 5,
            "unacked_restore_interval": 1,
            "unacked_restore_throttle": 1,
        }
    return {
        "broker_url": url,
        "broker_transport_options": transport,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_connection_timeout": 3,
        "task_default_queue": QUEUE,
        "task_ignore_result": True,
        "worker_lost_wait": 0.5,
        "worker_prefetch_multiplier": 2,
        "worker_enable_remote_control": False,
    }


def unsettled(broker: Broker) -> int:
    """How many messages somebody still has to settle."""
    if isinstance(broker.server, RabbitMQServer):
        return _unsettled_in_rabbitmq(broker.server)
    with broker.server.client() as client:
        return int(client.llen(QUEUE)) + int(client.hlen("unacked"))


def _unsettled_in_rabbitmq(server: RabbitMQServer) -> int:
    program = find_program("/usr/lib/rabbitmq/bin/rabbitmqctl", "rabbitmqctl", "/opt/homebrew/sbin/rabbitmqctl")
    assert program is not None, "rabbitmq-server is there, but not rabbitmqctl"
    listed = subprocess.run(
        [program, "--quiet", "--timeout", "20", "list_queues", "--vhost", "tests0", "--formatter", "json", "messages"],
        env=server.environment(),
        cwd=server.folder,
        capture_output=True,
        check=True,
        timeout=40,
    )
    return sum(int(queue["messages"]) for queue in json.loads(listed.stdout))
