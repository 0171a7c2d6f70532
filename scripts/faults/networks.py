"""Other hosts on one machine: namespaces of network, processes and host names, joined by a bridge."""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scripts.faults.saboteur import patiently


class CantBe(Exception):
    """There can be no other hosts here; the text says why."""


UNSHARE = ("unshare", "--net", "--pid", "--uts", "--mount", "--fork", "--kill-child", "--mount-proc")

INIT = ("bash", "-c", "while :; do sleep 1000 & wait; done")  # takes in what has lost its parent, as an init does


@dataclass
class OtherHost:
    """A host with an address, a name and processes of its own; files are this machine's."""

    name: str
    address: str
    device: str  # the near end of its link
    init: int  # process that holds it
    served: "list[subprocess.Popen[bytes]]" = field(default_factory=list)

    def there(self, command: Sequence[str] = ()) -> list[str]:
        """A command that runs there."""
        return ["nsenter", "-t", str(self.init), "-n", "-p", "-u", "-m", *command]

    def run(self, *command: str) -> str:
        return subprocess.run(self.there(command), check=True, capture_output=True, text=True).stdout

    def serve(self, command: Sequence[str]) -> None:
        """Start a process there that lasts until its host ends."""
        quiet = subprocess.DEVNULL
        self.served.append(subprocess.Popen(self.there(command), stdin=quiet, stdout=quiet, stderr=quiet))

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to a process there, by the number that it has there."""
        self.run("kill", f"-{int(number)}", str(pid))

    def processes(self) -> list[str]:
        """The command lines of what runs there."""
        found = self.run("ps", "-wweo", "args", "--no-headers").splitlines()
        return [line for line in found if not line.startswith(("ps ", "unshare", "sleep ", *INIT[:1]))]

    def pids(self, pattern: str) -> list[int]:
        """The processes there whose command line has a pattern, by the numbers that they have there."""
        rows = [line.split(None, 1) for line in self.run("ps", "-wweo", "pid,args", "--no-headers").splitlines()]
        return [int(row[0]) for row in rows if len(row) == 2 and pattern in row[1]]

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
    """So many hosts; CantBe where this machine, or this user, makes none."""
    if sys.platform != "linux" or not shutil.which("ip") or not shutil.which("unshare"):
        raise CantBe("other hosts need iproute2 and util-linux")
    number, mark = secrets.randbelow(250), secrets.token_hex(4)
    bridge = f"tb{mark}"
    network = Network(f"10.214.{number}.1")
    keepers: list[subprocess.Popen[bytes]] = []
    try:
        try:
            ip("link", "add", bridge, "type", "bridge")
            ip("addr", "add", f"{network.near}/24", "dev", bridge)
            ip("link", "set", bridge, "up")
            for index in range(count):
                keepers.append(subprocess.Popen([*UNSHARE, *INIT], stderr=subprocess.DEVNULL))
                network.hosts.append(_host(network, bridge, index, keepers[-1].pid))
        except (AssertionError, subprocess.CalledProcessError, OSError) as error:
            raise CantBe(f"only root may make networks: {error}") from error
        yield network
    finally:
        for process in (*keepers, *(process for host in network.hosts for process in host.served)):
            process.kill()
            process.wait()
        with contextlib.suppress(subprocess.CalledProcessError, OSError):
            ip("link", "del", bridge)


def _host(network: Network, bridge: str, index: int, keeper: int) -> OtherHost:
    children = Path(f"/proc/{keeper}/task/{keeper}/children")
    patiently(lambda: children.read_text().strip(), 5)
    init = int(children.read_text().split()[0])
    patiently(lambda: Path(f"/proc/{init}/comm").read_text().strip() == INIT[0], 5)
    address = f"{network.near.rpartition('.')[0]}.{index + 2}"
    host = OtherHost(f"box{index + 1}", address, f"tv{bridge[2:]}{index}", init)
    ip("link", "add", host.device, "type", "veth", "peer", "name", "far", "netns", str(init))
    ip("link", "set", host.device, "master", bridge)
    host.heal()
    there = host.there()
    ip("addr", "add", f"{address}/24", "dev", "far", there=there)
    ip("link", "set", "far", "up", there=there)
    ip("link", "set", "lo", "up", there=there)
    host.run("hostname", host.name)
    return host
