"""MariaDB."""

from pathlib import Path

import pymysql

from tests.services.server import Server, Unavailable, find_program


class MariaDBServer(Server):
    """A MariaDB whose root needs no password; settings as in my.cnf: `max_connections=20`."""

    name = "mariadb"
    programs = ("mariadbd", "/usr/sbin/mariadbd", "/usr/local/sbin/mariadbd", "/opt/homebrew/bin/mariadbd")
    users = ("mysql", "nobody")  # it refuses root

    @property
    def url(self) -> str:
        return f"mysql+pymysql://root@127.0.0.1:{self.port}/mysql?charset=utf8mb4"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def environment(self) -> dict[str, str]:
        """With a folder of its own for temporary tables: at its start a server deletes those of all others there."""
        return super().environment() | {"TMPDIR": str(self.folder)}

    def prepare(self) -> None:
        install = find_program("mariadb-install-db", str(Path(self.program).with_name("mariadb-install-db")))
        if install is None:
            raise Unavailable("mariadbd is there, but not mariadb-install-db")
        # "normal": root without a password from 127.0.0.1, instead of only through the socket.
        self.run_to_end(
            [
                install,
                "--no-defaults",
                f"--datadir={self.data}",
                "--auth-root-authentication-method=normal",
                "--skip-test-db",
                "--innodb-log-file-size=16M",
            ]
        )

    def command(self) -> list[str]:
        settings = {
            "bind_address": "127.0.0.1",
            "port": self.port,
            "datadir": self.data,
            "socket": self.folder / "socket",
            "pid_file": self.folder / "pid",
            "character_set_server": "utf8mb4",
            "innodb_flush_log_at_trx_commit": 2,  # commits survive a kill of the server
            "innodb_log_file_size": "16M",
            "max_connections": 200,
            "skip_name_resolve": 1,
            **self.options,
        }
        return [self.program, "--no-defaults", *(f"--{name}={value}" for name, value in settings.items())]

    def answers(self) -> bool:
        try:
            pymysql.connect(host="127.0.0.1", port=self.port, user="root", connect_timeout=2).close()
        except pymysql.err.OperationalError:
            return False
        return True
