"""A process of its own: `python -m idem_tasks.demo.worker with` is a Celery worker, `.. marker 3` a Redis stand-in."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from typing import cast

from idem_tasks.demo.settings import Settings, Side

CONCURRENCY = 2


def main() -> None:
    """Run what the command line says until it is stopped, or the demo is gone."""
    settings = Settings.from_environment()
    threading.Thread(target=_end_with_the_demo, args=[settings], daemon=True).start()
    if sys.argv[1] == "marker":
        serve_marker(int(sys.argv[2]))
    else:
        run_worker(settings, cast(Side, sys.argv[1]))


def _end_with_the_demo(settings: Settings) -> None:
    """Kill this process group once the demo has ended, however it did: its end of the pipe is closed then."""
    os.read(settings.lifeline, 1)
    if not settings.keep:
        shutil.rmtree(settings.folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def run_worker(settings: Settings, side: Side) -> None:
    """Run a Celery worker with its child processes."""
    from idem_tasks.demo.shop import Shop

    app = Shop(settings, side).open()
    app.worker_main(
        [
            "worker",
            *("--pool=prefork", f"--concurrency={CONCURRENCY}", "--loglevel=WARNING", f"--hostname={side}@demo"),
            *("--without-gossip", "--without-mingle", "--without-heartbeat"),
        ]
    )


def serve_marker(listening: int) -> None:
    """Serve the Redis protocol on a socket that the demo opened: a Redis in memory, without a server's program."""
    import socket

    from fakeredis import TcpFakeServer

    server = TcpFakeServer(("127.0.0.1", 0), bind_and_activate=False)
    server.socket.close()
    server.socket = socket.socket(fileno=listening)
    server.server_address = server.socket.getsockname()
    server.serve_forever(poll_interval=0.1)


if __name__ == "__main__":
    main()
