"""The containers of docker-compose.yml, for machines that have an engine but not the servers."""

import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

# As docker-compose.yml publishes them.
URLS = {
    "redis": "redis://127.0.0.1:56379/0",
    "postgres": "postgresql+psycopg://idem_tasks:idem_tasks@127.0.0.1:55432/postgres",
    "mariadb": "mysql+pymysql://root:idem_tasks@127.0.0.1:53306/mysql",
    "rabbitmq": "amqp://idem_tasks:idem_tasks@127.0.0.1:55672//",
    "kafka": "127.0.0.1:59092",
    "nats": "nats://127.0.0.1:54222",
}


def engine_answers() -> bool:
    try:
        return _docker("compose", "version").returncode == 0 and _docker("info").returncode == 0
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False


def up(service: str, run_folder: Path) -> str:
    """Start the service's container unless it runs, wait until it is healthy, and give its address."""
    if not _docker("compose", "ps", "--quiet", "--status", "running", service).stdout.strip():
        (run_folder / "containers" / service).touch()  # ours to remove; what `make services` started stays
        started = _docker("compose", "up", "--detach", "--wait", service, seconds=300)
        if started.returncode != 0:
            raise RuntimeError(f"docker compose could not start {service}: {started.stderr[-2000:]}")
    return URLS[service]


def remove_started(run_folder: Path) -> None:
    services = [path.name for path in (run_folder / "containers").iterdir()]
    if services:
        _docker("compose", "rm", "--stop", "--force", "--volumes", *services, seconds=60)


def _docker(*arguments: str, seconds: float = 10) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["docker", *arguments], cwd=REPOSITORY, check=False, capture_output=True, text=True, timeout=seconds
    )
