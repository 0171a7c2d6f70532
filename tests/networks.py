"""Other hosts for tests: namespaces of network, processes and host names on this machine, joined by a bridge."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from scripts.faults.saboteur import patiently

UNSHARE = ("unshare", "--net", "--pid", "--uts", "--mount", "--fork", "--kill-child", "--mount-proc")


@dataclass
class OtherHost:
    """A host with an address, a name and processes of its own; files are this machine's."""

    name: str
    address: str
    device: str  # the near end of its link
    init: int  # process that holds it

    def there(self, command: Sequence[str] = ()) -> list[str]:
        """A command that runs there."""
        return ["nsenter", "-t", str(self.init), "-n", "-p", "-u", "-m", *command]

    def run(self, *command: str) -> str:
        return subprocess.run(self.there(command), check=True, capture_output=True, text=True).stdout

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to a process there, by the number that it has there."""
        self.run("kill", f"-{int(number)}", str(pid))

    def processes(self) -> list[str]:
        """The command lines of what runs there."""
        found = self.run("ps", "-eo", "args", "--no-headers").splitlines()
        return [line for line in found if "sleep infinity" not in line and not line.startswith(("ps ", "unshare"))]

    def cut(self) -> None:
        ip("link", "set", self.device, "down")

    def heal(self) -> None:
        ip("link", "set", self.device, "up")

    def switch_off(self) -> None:
        """End it at once, with all that runs there."""
        os.kill(self.init, signal.SIGKILL)


@dataclass
class Network:
    near: str  # this machine's address
    hosts: list[OtherHost] = field(default_factory=list)


def ip(*arguments: str, there: Sequence[str] = ()) -> None:
    subprocess.run([*there, "ip", *arguments], check=True, capture_output=True)


@contextlib.contextmanager
def other_hosts(count: int) -> Iterator[Network]:
    """So many hosts; the test is skipped where they can't be made."""
    if sys.platform != "linux" or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("other hosts need iproute2 and util-linux")
    number = random.Random(os.getpid()).randrange(250)
    bridge = f"tb{os.getpid() % 1000000}"
    network = Network(f"10.214.{number}.1")
    keepers: list[subprocess.Popen[bytes]] = []
    try:
        try:
            ip("link", "add", bridge, "type", "bridge")
            ip("addr", "add", f"{network.near}/24", "dev", bridge)
            ip("link", "set", bridge, "up")
            for index in range(count):
                keepers.append(subprocess.Popen([*UNSHARE, "sleep", "infinity"], stderr=subprocess.DEVNULL))
                network.hosts.append(_host(network, bridge, index, keepers[-1].pid))
        except (AssertionError, subprocess.CalledProcessError, OSError) as error:
            pytest.skip(f"only root may make networks: {error}")
        yield network
    finally:
        for keeper in keepers:
            keeper.kill()
            keeper.wait()
        with contextlib.suppress(subprocess.CalledProcessError, OSError):
            ip("link", "del", bridge)


def _host(network: Network, bridge: str, index: int, keeper: int) -> OtherHost:
    children = Path(f"/proc/{keeper}/task/{keeper}/children")
    patiently(lambda: children.read_text().strip(), 5)
    init = int(children.read_text().split()[0])
    patiently(lambda: Path(f"/proc/{init}/comm").read_text().strip() == "sleep", 5)
    address = f"{network.near.rpartition('.')[0]}.{index + 2}"
    host = OtherHost(f"box{index + 1}", address, f"tv{index}{os.getpid() % 1000000}", init)
    ip("link", "add", host.device, "type", "veth", "peer", "name", "far", "netns", str(init))
    ip("link", "set", host.device, "master", bridge)
    host.heal()
    there = host.there()
    ip("addr", "add", f"{address}/24", "dev", "far", there=there)
    ip("link", "set", "far", "up", there=there)
    ip("link", "set", "lo", "up", there=there)
    host.run("hostname", host.name)
    return host
