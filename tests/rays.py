"""Ray clusters for tests: hosts in namespaces of their own, the first of which has the head, and the stack."""

import contextlib
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from scripts.faults.networks import OtherHost
from scripts.faults.saboteur import patiently
from tests.networks import hosts_or_skip
from tests.tiny import environment

RAY = str(Path(sys.executable).with_name("ray"))
SIZES = ("--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats", "--include-dashboard=false")
PORT = 6399


@dataclass
class RayCluster:
    head: OtherHost
    nodes: list[OtherHost]
    env: dict[str, str]
    folder: Path  # of Ray's files, and of agents' state

    @property
    def address(self) -> str:
        return f"{self.head.address}:{PORT}"

    def start(self, host: OtherHost) -> None:
        """Start Ray on a host: the head on the first, a node on others."""
        which = ["--head", f"--port={PORT}"] if host is self.head else [f"--address={self.address}"]
        sizes = SIZES if host is self.head else SIZES[:-1]
        place = [f"--node-ip-address={host.address}", f"--temp-dir={self.folder / host.name}"]
        done = subprocess.run(
            host.there([RAY, "start", *which, *place, *sizes]),
            env=self.env, capture_output=True, text=True, timeout=90, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]


@contextlib.contextmanager
def ray_cluster(nodes: int, redis: bool = False) -> Iterator[RayCluster]:
    """A head and so many nodes beside it, whose state is kept in Redis or nowhere. They end with their hosts."""
    pytest.importorskip("ray")
    with hosts_or_skip(nodes + 1) as network, tempfile.TemporaryDirectory(prefix="tr-") as folder:
        env = {
            **environment(),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_worker_niceness": "0",
            "RAY_health_check_failure_threshold": "40",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
            "XDG_STATE_HOME": folder,
            "PYTHONWARNINGS": "ignore",
        }
        env.pop("TRIPTYCH_STATE", None)
        head, *others = network.hosts
        cluster = RayCluster(head, others, env, Path(folder))
        if redis:
            head.serve(["redis-server", "--bind", head.address, "--protected-mode", "no", "--save", ""])
            ping = head.there(["redis-cli", "-h", head.address, "ping"])
            patiently(lambda: subprocess.run(ping, capture_output=True, check=False).returncode == 0)
            env["RAY_REDIS_ADDRESS"] = f"{head.address}:6379"
        for host in network.hosts:
            cluster.start(host)
        try:
            yield cluster
        finally:
            for host in network.hosts:
                with contextlib.suppress(ProcessLookupError, OSError):
                    host.switch_off()
