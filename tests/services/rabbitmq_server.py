"""RabbitMQ."""

import json
import subprocess

from kombu import Connection
from kombu.exceptions import OperationalError

from tests.services.run import Run
from tests.services.server import Server, Unavailable, find_program

VIRTUAL_HOSTS = 16  # made as the server starts; one for each xdist worker


class RabbitMQServer(Server):
    """A RabbitMQ node without plugins; lines of rabbitmq.conf by name: `RabbitMQServer(run, heartbeat=2)`."""

    name = "rabbitmq"
    # What /usr/sbin has on Debian is a wrapper that only root and the user rabbitmq may run.
    programs = ("/usr/lib/rabbitmq/bin/rabbitmq-server", "rabbitmq-server", "/opt/homebrew/sbin/rabbitmq-server")
    seconds_to_start = 60.0

    def __init__(self, run: Run, **options: str | int) -> None:
        super().__init__(run, **options)
        self.epmd_port = run.free_port()
        self.distribution_port = run.free_port()
        self._epmd: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return self.virtual_host(0)

    def virtual_host(self, number: int) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}/tests{number}"

    def prepare(self) -> None:
        hosts = [f"tests{number}" for number in range(VIRTUAL_HOSTS)]
        everything = {"user": "guest", "configure": ".*", "write": ".*", "read": ".*"}
        definitions = {
            "users": [{"name": "guest", "password": "guest", "tags": ["administrator"]}],
            "vhosts": [{"name": host} for host in hosts],
            "permissions": [{"vhost": host, **everything} for host in hosts],
        }
        (self.folder / "definitions.json").write_text(json.dumps(definitions))
        (self.folder / "enabled_plugins").write_text("[].\n")
        settings = {
            "listeners.tcp.local": f"127.0.0.1:{self.port}",
            "load_definitions": str(self.folder / "definitions.json"),
            "log.console": "true",
            "log.file": "false",
            **self.options,
        }
        lines = [f"{name} = {value}\n" for name, value in settings.items()]
        (self.folder / "rabbitmq.conf").write_text("".join(lines))
        epmd = find_program("epmd", "/usr/lib/erlang/bin/epmd", "/usr/lib/erlang/erts-*/bin/epmd")
        if epmd is None:
            raise Unavailable("rabbitmq-server is there, but not Erlang's epmd")
        # In the foreground and ours: the one that Erlang starts by itself is shared and outlives everything.
        self._epmd = self.launch([epmd, "-port", str(self.epmd_port), "-address", "127.0.0.1"])

    def command(self) -> list[str]:
        return [self.program]

    def environment(self) -> dict[str, str]:
        return super().environment() | {
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self.epmd_port),
            "RABBITMQ_CONF_ENV_FILE": str(self.folder / "none"),
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_DIST_PORT": str(self.distribution_port),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            "RABBITMQ_LOG_BASE": str(self.folder / "logs"),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "mnesia"),
            "RABBITMQ_NODENAME": f"tests{self.port}@localhost",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-start_epmd false -kernel inet_dist_use_interface {127,0,0,1}",
        }

    def answers(self) -> bool:
        # The last of the virtual hosts is made last.
        with Connection(self.virtual_host(VIRTUAL_HOSTS - 1), connect_timeout=2) as connection:
            try:
                connection.connect()
            except (OperationalError, *connection.connection_errors, *connection.channel_errors):
                return False
        return True

    def remove(self) -> None:
        super().remove()
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd.wait()
