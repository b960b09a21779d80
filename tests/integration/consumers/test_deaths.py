"""A consumer's process killed within its handler: the message is handled by another, once."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable

from sqlalchemy import create_engine

from tests.consumers.ledger import Table, effects
from tests.documents.reading import REPOSITORY
from tests.integration.consumers.dying import sessions_for, write
from tests.integration.consumers.queues import Queues
from tests.integration.consumers.rigs import Heard, Rig


def test_a_message_whose_consumer_was_killed_is_handled_by_another(
    client: str, rig: Callable[..., Rig], queues: Queues, heard: Heard, postgres_url: str
) -> None:
    """It is put back while the dead one's lease lives, and then its rows are written once (F14, F31)."""
    engine = create_engine(postgres_url)
    Table.metadata.create_all(engine)
    queues.publish("A-1")
    command = [sys.executable, "-m", "tests.integration.consumers.dying", client, queues.url, queues.name, postgres_url]
    died = subprocess.run(command, cwd=REPOSITORY, timeout=60, capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    sessions = sessions_for(client, postgres_url)
    with rig(write, session=sessions) as consumer:
        consumer.engine = sessions.kw["bind"] if client == "aio_pika" else None
        heard.wait_for("completed")
    assert heard.count("taken_over") == 1
    assert effects(engine) == {"A-1": 1}
    queues.wait_for(0)
    if client != "aio_pika":
        sessions.kw["bind"].dispose()
    engine.dispose()
