"""The demo's own broker: kombu's transport through files, with messages that appear whole.

Not the one through SQLite: a worker without an event loop forks the successor of a killed child while another of its
threads may be inside of SQLite, whose locks the child would then wait for, for ever.
"""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

from kombu import transport
from kombu.transport import filesystem
from kombu.utils.json import dumps

URL = "idem-tasks-demo://"


class Channel(filesystem.Channel):
    """kombu's own lets a reader take a file before its message is in it, and that message is lost."""

    def _put(self, queue: str, payload: Any, **_: Any) -> None:  # type: ignore[override] # kombu differs within itself
        name = f"{time.monotonic_ns():020}_{uuid.uuid4()}.{queue}.msg"
        part = Path(self.data_folder_out, f"{name}.part")
        part.write_text(dumps(payload), encoding="utf-8")
        part.rename(part.with_suffix(""))


class Transport(filesystem.Transport):
    """A broker in a folder. Messages taken by a worker that is killed as a whole are lost; only a child is killed."""

    Channel = Channel


transport.TRANSPORT_ALIASES["idem-tasks-demo"] = f"{__name__}:{Transport.__name__}"
