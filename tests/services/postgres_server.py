"""PostgreSQL."""

import signal
import subprocess
from pathlib import Path

import psycopg

from tests.services.server import Server

USER = "idem_tasks"


class PostgresServer(Server):
    """A PostgreSQL that trusts its local clients; settings as in postgresql.conf: `max_connections=20`."""

    name = "postgres"
    programs = ("postgres", "/usr/lib/postgresql/*/bin/postgres", "/usr/pgsql-*/bin/postgres")
    users = ("postgres", "nobody")  # it refuses root
    stop_signal = signal.SIGINT  # "fast": clients are cut off, the data is in order

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://{USER}@127.0.0.1:{self.port}/postgres"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def prepare(self) -> None:
        initdb = str(Path(self.program).resolve().with_name("initdb"))
        options = ["--username", USER, "--auth", "trust", "--encoding", "UTF8", "--no-locale", "--no-sync"]
        self.run_to_end([initdb, "--pgdata", str(self.data), *options])

    def command(self) -> list[str]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            "fsync": "off",  # what is written survives a kill of the server, which is all that tests do to it
            "max_connections": 200,
            **self.options,
        }
        return [self.program, "-D", str(self.data), *(f"--{name}={value}" for name, value in settings.items())]

    def answers(self) -> bool:
        try:
            psycopg.connect(host="127.0.0.1", port=self.port, user=USER, dbname="postgres", connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def kill(self) -> None:
        shared_memory = self.data.joinpath("postmaster.pid").read_text().splitlines()[6].split()[1]
        super().kill()
        # Else it would stay in the kernel for ever.
        subprocess.run(["ipcrm", "-m", shared_memory], check=True)
