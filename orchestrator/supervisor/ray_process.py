"""The process that puts agents on the hosts of a Ray cluster, where a stack is to use one."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from orchestrator.access import KeyFolder
from orchestrator.pulse import PULSE, PulseWatch
from orchestrator.settings import RaySettings, RaySpec, StackConfig
from orchestrator.state_folder import StackFolder
from orchestrator.supervisor.child import Child
from protocol.client.endpoints import PUBLISHED
from protocol.errors import BadRequest
from protocol.sockets import is_loopback

ANY_PORT = "tcp://0.0.0.0:0"
REACH_SECONDS = 5.0
RAY_STATUS = (sys.executable, "-m", "ray.scripts.scripts", "status")
STATUS_SECONDS = 20.0


def ready_for_ray(config: StackConfig, folder: StackFolder) -> StackConfig:
    """Return the configuration of a stack that a Ray cluster's hosts join; BadRequest where it can't be, or isn't safe.

    Whoever reaches a Ray cluster runs programs on its hosts: it must ask for a token.
    """
    check_installed()
    if os.environ.get("RAY_AUTH_MODE") != "token":
        raise BadRequest(
            "Ray lets everybody in who reaches its ports, unless it asks for a token.",
            "Make one (ray get-auth-token --generate), give it to all hosts, and set RAY_AUTH_MODE=token on each.",
        )
    if (file := token_file()) and file.exists() and file.stat().st_mode & 0o077:
        raise BadRequest(f"Others can read {str(file)!r}, which lets into the Ray cluster.", f"chmod 600 {file}")
    check_reachable(str(config.ray))
    check_closed(str(config.ray))
    if config.listen_workers and is_loopback(config.listen_workers):
        raise BadRequest(
            f"--listen-workers is {config.listen_workers!r}, where no other host finds it.",
            "Leave it out, or give tcp://0.0.0.0:PORT.",
        )
    KeyFolder(folder.keys).server()  # so that the doors want keys
    return config.model_copy(update={"listen_workers": config.listen_workers or same_port(folder)})


def check_reachable(address: str) -> None:
    """Raise BadRequest where nothing answers at the address of a cluster."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), REACH_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BadRequest(
            f"No Ray cluster answers at {address!r}: {reason}.", "Give the address of its head, HOST:PORT, or auto."
        ) from error


def check_closed(address: str) -> None:
    """Raise BadRequest where a cluster lets in who has no token: it was itself started without asking for one."""
    where = [] if address == "auto" else ["--address", address]
    given = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    try:
        done = subprocess.run(
            [*RAY_STATUS, *where], env={**given, "RAY_AUTH_MODE": "disabled"}, timeout=STATUS_SECONDS,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return  # whoever is refused may try for long
    if done.returncode == 0:
        raise BadRequest(
            f"The Ray cluster at {address!r} lets everybody in: it was started without a token.",
            "Start it anew on each of its hosts, with RAY_AUTH_MODE=token in the environment of ray start.",
        )


def same_port(folder: StackFolder) -> str:
    """Return an endpoint at the port of a stack that was killed, where hosts still look for it; or at any port."""
    try:
        port = int(json.loads((folder.path / PUBLISHED).read_text())["remote"]["worker"].rpartition(":")[2])
        with socket.create_server(("", port)):
            return f"tcp://0.0.0.0:{port}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ANY_PORT


def check_installed() -> None:
    """Raise BadRequest where there is no ray."""
    if importlib.util.find_spec("ray") is None:
        raise BadRequest("--ray needs ray, which is not installed.", "pip install 'triptych[ray]'")


def token_file() -> Path | None:
    """Return the file that Ray takes its token from; None where it is in the environment."""
    if "RAY_AUTH_TOKEN" in os.environ:
        return None
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


class RayProcess:
    """The launcher's process. Once it has worked it is started again whenever it has ended: a cluster may be away."""

    def __init__(self, config: RaySettings, folder: StackFolder, lifeline: int) -> None:
        self._pulse = PulseWatch()
        given = {name: getattr(config, name) for name in RaySettings.model_fields}
        spec = RaySpec(state=folder.path, settings=RaySettings(**given))
        self.child = Child(
            "ray", None, ["-m", "orchestrator.ray_launcher"], spec.model_dump_json(), folder.log("ray"), lifeline,
            essential=True, descriptors=(self._pulse.descriptor,), environment={PULSE: str(self._pulse.descriptor)},
        )  # fmt: skip

    def look(self) -> None:
        """Note that it works, which it shows by each turn of its loop."""
        if self.child.state == "running":
            self._pulse.still_for()
            if self._pulse.beaten:
                self.child.proven = self.child.ever_proven = True

    def close(self) -> None:
        self._pulse.close()
