"""Ray clusters for tests: hosts in namespaces of their own, the first of which has the head, and the stack."""

import contextlib
import json
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
    of_head: tuple[str, ...] = ()  # what it is started with besides

    @property
    def address(self) -> str:
        return f"{self.head.address}:{PORT}"

    def start(self, host: OtherHost) -> None:
        """Start Ray on a host: the head on the first, a node on others."""
        which = ["--head", f"--port={PORT}", *self.of_head] if host is self.head else [f"--address={self.address}"]
        sizes = SIZES if host is self.head else SIZES[:-1]
        place = [f"--node-ip-address={host.address}", f"--temp-dir={self.folder / host.name}"]
        done = subprocess.run(
            host.there([RAY, "start", *which, *place, *sizes]),
            env=self.env, capture_output=True, text=True, timeout=90, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]


def environment_of_ray(folder: str) -> dict[str, str]:
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
    return env


def tls_of_ray(folder: Path, addresses: list[str]) -> dict[str, str]:
    """Make a certificate for all hosts, which they believe; return what Ray is to be started with."""
    certificate, key = folder / "tls.crt", folder / "tls.key"
    names = ",".join(["DNS:localhost", *(f"IP:{address}" for address in ["127.0.0.1", *addresses])])
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=ray"]
    files = ["-addext", f"subjectAltName={names}", "-out", str(certificate), "-keyout", str(key)]
    subprocess.run([*command, *files], check=True, capture_output=True)
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": str(certificate),
        "RAY_TLS_SERVER_KEY": str(key),
        "RAY_TLS_CA_CERT": str(certificate),
    }


@contextlib.contextmanager
def scaled_cluster(most: int) -> Iterator[RayCluster]:
    """A head whose autoscaler brings up to so many nodes, by Ray's provider for tests: all are on one machine."""
    pytest.importorskip("ray")
    with hosts_or_skip(1) as network, tempfile.TemporaryDirectory(prefix="tr-") as folder:
        (head,) = network.hosts
        box = {"CPU": 1, "triptych": 1, "object_store_memory": 80_000_000}
        nothing = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
        config = {
            **{f"{name}_commands": [] for name in nothing}, "file_mounts": {}, "cluster_synced_files": [],
            "file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": [], "docker": {},
            "upscaling_speed": 1.0,
            "cluster_name": "fake_multinode", "max_workers": most, "idle_timeout_minutes": 0.1, "auth": {},
            "provider": {
                "type": "fake_multinode", "use_node_id_as_ip": True, "disable_node_updaters": True,
                "disable_launch_config_check": True, "gcs_address": f"{head.address}:{PORT}",
            },
            "head_node_type": "ray.head.default",
            "available_node_types": {
                "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
                "box": {"resources": box, "node_config": {}, "min_workers": 0, "max_workers": most},
            },
        }  # fmt: skip
        (Path(folder) / "autoscaler.json").write_text(json.dumps(config))
        env = {**environment_of_ray(folder), "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
        cluster = RayCluster(head, [], env, Path(folder), (f"--autoscaling-config={folder}/autoscaler.json",))
        cluster.start(head)
        try:
            yield cluster
        finally:
            with contextlib.suppress(ProcessLookupError, OSError):
                head.switch_off()


@contextlib.contextmanager
def ray_cluster(nodes: int, redis: bool = False, token: bool = True, tls: bool = False) -> Iterator[RayCluster]:
    """A head and so many nodes beside it, whose state is kept in Redis or nowhere. They end with their hosts."""
    pytest.importorskip("ray")
    with hosts_or_skip(nodes + 1) as network, tempfile.TemporaryDirectory(prefix="tr-") as folder:
        env = environment_of_ray(folder)
        if tls:
            env |= tls_of_ray(Path(folder), [host.address for host in network.hosts])
        if not token:
            env["RAY_AUTH_MODE"] = "disabled"
            del env["RAY_AUTH_TOKEN"]
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
