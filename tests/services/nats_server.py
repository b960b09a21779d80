"""NATS with JetStream: one server, its streams in a folder of its own."""

import socket

from tests.services.server import Server


class NATSServer(Server):
    """A nats-server; options are those of its configuration: `NATSServer(run, max_payload="64KB")`."""

    name = "nats"
    programs = ("nats-server", "/usr/sbin/nats-server", "/usr/local/bin/nats-server", "/opt/homebrew/bin/nats-server")

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def prepare(self) -> None:
        options = {"listen": f'"127.0.0.1:{self.port}"', **self.options}
        lines = [f"{name}: {value}\n" for name, value in options.items()]
        lines.append(f'jetstream {{ store_dir: "{self.folder / "streams"}", max_file: 4GB }}\n')
        (self.folder / "nats.conf").write_text("".join(lines))

    def command(self) -> list[str]:
        return [self.program, "--config", str(self.folder / "nats.conf")]

    def answers(self) -> bool:
        """It tells of itself as soon as a client connects, also whether it has JetStream."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                return b'"jetstream":true' in connection.recv(65536)
        except OSError:
            return False
