"""Redis or Valkey: alone, as primary and replica under a Sentinel, and as a cluster of three."""

from redis import Redis
from redis.exceptions import RedisError

from tests.services.run import Run
from tests.services.server import Server, stop_all
from tests.services.waiting import wait_until


class RedisServer(Server):
    """A redis-server; options are those of redis.conf, with `_` for `-`: `RedisServer(run, maxmemory="2mb")`."""

    name = "redis"
    programs = ("redis-server", "valkey-server", "/usr/local/bin/redis-server", "/opt/homebrew/bin/redis-server")
    mode: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def prepare(self) -> None:
        options = {
            "port": self.port,
            "bind": "127.0.0.1",
            "dir": f'"{self.folder}"',
            "save": '""',  # a restart forgets everything, unless the test says appendonly="yes"
            "databases": 128,  # one for each xdist worker
            **self.options,
        }
        lines = [f"{name.replace('_', '-')} {value}\n" for name, value in options.items()]
        (self.folder / "redis.conf").write_text("".join(lines))

    def command(self) -> list[str]:
        return [self.program, str(self.folder / "redis.conf"), *self.mode]

    def client(self) -> Redis:
        """A new client; close it."""
        password = self.options.get("requirepass")
        return Redis(
            port=self.port,
            password=None if password is None else str(password),
            decode_responses=True,
            socket_timeout=5,
        )

    def answers(self) -> bool:
        with self.client() as client:
            try:
                return bool(client.ping())
            except RedisError:
                return False


class SentinelServer(RedisServer):
    """A Sentinel that alone decides on a failover, half a second after the primary was last heard."""

    name = "sentinel"
    mode = ("--sentinel",)

    def __init__(self, run: Run, primary: RedisServer, primary_name: str) -> None:
        super().__init__(run)
        self.primary = primary
        self.primary_name = primary_name

    def prepare(self) -> None:
        (self.folder / "redis.conf").write_text(
            f"port {self.port}\n"
            "bind 127.0.0.1\n"
            f'dir "{self.folder}"\n'
            f"sentinel monitor {self.primary_name} 127.0.0.1 {self.primary.port} 1\n"
            f"sentinel down-after-milliseconds {self.primary_name} 500\n"
            f"sentinel failover-timeout {self.primary_name} 2000\n"
        )


class RedisSentinel:
    """A primary, its replica, and a Sentinel that knows both."""

    primary_name = "idem"

    def __init__(self, run: Run) -> None:
        self.primary = RedisServer(run, repl_diskless_sync_delay=0).start()
        self.replica = RedisServer(run, replicaof=f"127.0.0.1 {self.primary.port}").start()
        with self.replica.client() as client:
            wait_until(
                lambda: client.info("replication")["master_link_status"] == "up",
                seconds=20,
                what="the replica to follow its primary",
            )
        self.sentinel = SentinelServer(run, self.primary, self.primary_name).start()
        with self.sentinel.client() as client:
            wait_until(
                lambda: len(client.sentinel_slaves(self.primary_name)) == 1,
                seconds=20,
                what="the sentinel to find the replica",
            )

    @property
    def sentinels(self) -> list[tuple[str, int]]:
        """What `redis.sentinel.Sentinel` takes."""
        return [("127.0.0.1", self.sentinel.port)]

    def remove(self) -> None:
        stop_all([self.sentinel, self.replica, self.primary])


class RedisCluster:
    """Three primaries that share the slots, without replicas unless a test adds one."""

    SLOTS = 16384

    def __init__(self, run: Run) -> None:
        self._run = run
        self.nodes = [self._new_node() for _ in range(3)]
        self.replicas: list[RedisServer] = []
        self._join()

    @property
    def url(self) -> str:
        return self.nodes[0].url

    @property
    def cluster_url(self) -> str:
        """What a store takes: all primaries."""
        return f"redis+cluster://{','.join(f'127.0.0.1:{node.port}' for node in self.nodes)}"

    def add_replica(self, primary: RedisServer) -> RedisServer:
        """Start a replica of this node, which takes its place when it dies; returns when it follows."""
        replica = self._new_node()
        self.replicas.append(replica)
        with primary.client() as known, replica.client() as client:
            name = known.cluster("MYID")
            client.cluster("MEET", "127.0.0.1", primary.port)
            wait_until(lambda: name in str(client.cluster("NODES")), seconds=20, what="the replica to know its primary")
            client.cluster("REPLICATE", name)
            wait_until(
                lambda: client.info("replication").get("master_link_status") == "up",
                seconds=20,
                what="the replica to follow its primary",
            )
            # All have to know of it, or they would give it no votes.
            replica_name = str(client.cluster("MYID"))
        for node in self.nodes:
            with node.client() as client:
                wait_until(
                    lambda client=client: replica_name in str(client.cluster("REPLICAS", name)),  # type: ignore[misc]
                    seconds=20,
                    what="the cluster to know the replica",
                )
        return replica

    def remove(self) -> None:
        stop_all([*self.nodes, *self.replicas])

    def _new_node(self) -> RedisServer:
        return RedisServer(
            self._run,
            databases=1,
            cluster_enabled="yes",
            cluster_config_file="nodes.conf",
            cluster_node_timeout=2000,
        ).start()

    def _join(self) -> None:
        clients = [node.client() for node in self.nodes]
        try:
            for number, client in enumerate(clients):
                client.cluster("ADDSLOTS", *range(number, self.SLOTS, len(clients)))
                client.cluster("MEET", "127.0.0.1", self.nodes[0].port)
            wait_until(
                lambda: all(client.cluster("INFO")["cluster_state"] == "ok" for client in clients),
                seconds=20,
                what="the cluster to form",
            )
        finally:
            for client in clients:
                client.close()
