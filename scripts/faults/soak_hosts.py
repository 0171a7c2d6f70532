#!/usr/bin/env python
"""Random load and random faults across hosts, for minutes; then the account of it that soak.py gives.

    sudo python -m scripts.faults.soak_hosts --minutes 10 --seed 1
    sudo python -m scripts.faults.soak_hosts --minutes 2 --idle --fault "kill agent"

The stack runs here, with one worker a stage; three other hosts, in namespaces of network, processes and names, have an
agent each, kept by a loop as systemd would, and a worker a stage. Faults: SIGKILL of a worker, an agent, all that runs
on a host, two hosts at once, the orchestrator, the supervisor; a link that is cut for seconds. The recovery time of a
fault is that until all workers of all hosts stand ready again, of a cut from when it is healed. Beside it stands how
long the jobs that a fault has interrupted were with no worker.
"""

import functools
import json
import random
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from orchestrator.access import KeyFolder
from protocol.client.client import Client
from protocol.curve_keys import save
from protocol.job import ENDED
from protocol.views import WorkerView
from scripts.faults.networks import Network, OtherHost, other_hosts
from scripts.faults.saboteur import Saboteur, Stack
from scripts.faults.soak import PICTURES, Account, Load, digest_of, free_port, key_of, percentile, recipes, reckon

HOSTS = 3
FAULTS = {  # and how often each is to come
    "kill worker": 10, "kill agent": 4, "kill all of a host": 2, "kill on two hosts": 3, "cut a link": 3,
    "kill orchestrator": 3, "kill supervisor": 1,
}  # fmt: skip
CUT_SECONDS = (1.0, 7.0)  # within which workers are missed, or not


class Hosts:
    """The other hosts of a stack, with agents that are started again whenever they have ended."""

    def __init__(self, network: Network, folder: Path, endpoint: str, keys: KeyFolder) -> None:
        self.all, self._folder = network.hosts, folder
        for host in self.all:
            save(folder / f"{host.name}.key", keys.issue(host.name, "host", endpoint))

    def start(self, host: OtherHost) -> None:
        join = [sys.executable, "-m", "orchestrator.cli", "join", str(self._folder / f"{host.name}.key")]
        once = shlex.join([*join, "--folder", str(self._folder / host.name)])
        host.serve(["bash", "-c", f"while :; do {once}; sleep 0.1; done"])

    @staticmethod
    def ours(host: OtherHost) -> list[int]:
        return [
            pid for pattern in ("while :; do /", "orchestrator.cli", "workers.runtime") for pid in host.pids(pattern)
        ]


class Trouble:
    def __init__(self, stack: Stack, hosts: Hosts, rng: random.Random, account: Account, kinds: Sequence[str]) -> None:
        self._stack, self._hosts, self._rng, self._account = stack, hosts, rng, account
        self._kinds = {kind: FAULTS[kind] for kind in kinds or FAULTS}
        self._saboteur = Saboteur(stack, rng)
        self.interrupted: list[float] = []  # seconds that jobs were with no worker

    def make(self) -> None:
        """Make one fault, and wait until it is overcome."""
        kind = self._rng.choices([*self._kinds], [*self._kinds.values()])[0]
        self._stack.remember()
        there = self._there()
        before = {(worker.host, worker.pid) for worker in there}
        begun = time.monotonic()
        gone = self._do(kind)
        hit = {worker.job for worker in there if (worker.host, worker.pid) in gone and worker.job}
        for job in hit:
            self._saboteur.patiently(functools.partial(self._goes_on, job, gone))
            self.interrupted.append(time.monotonic() - begun)
        if kind == "cut a link":
            begun = time.monotonic()
        if kind != "kill supervisor":
            self._saboteur.patiently(lambda: self._whole(before - gone if gone else before, gone))
        took = time.monotonic() - begun
        self._account.faults[kind] += 1
        self._account.recoveries.setdefault(kind, []).append(took)
        print(f"{time.strftime('%H:%M:%S')} {kind} {took:.2f} s", file=sys.stderr, flush=True)

    def _goes_on(self, job: str, gone: set[tuple[str, int]]) -> bool:
        """Return whether a worker that was not killed has a job, or it has ended."""
        workers = self._saboteur.workers().workers
        held = any(worker.job == job and (worker.host, worker.pid) not in gone for worker in workers)
        return held or self._saboteur.client().job(job).state in ENDED

    def _do(self, kind: str) -> set[tuple[str, int]]:
        """Make a fault; return the workers, by host and process, that it has ended."""
        host, other, *_ = self._rng.sample(self._hosts.all, 2)
        match kind:
            case "kill worker":
                return self._kill_worker(host)
            case "kill on two hosts":
                return self._kill_worker(host) | self._kill_worker(other)
            case "kill agent":
                gone = {(w.host, w.pid) for w in self._there() if w.host == host.name}
                for pid in host.pids("orchestrator.cli join")[-1:]:
                    host.kill(pid)
                return gone
            case "kill all of a host":
                gone = {(w.host, w.pid) for w in self._there() if w.host == host.name}
                host.run("bash", "-c", f"kill -9 {' '.join(map(str, self._hosts.ours(host)))} || true")
                self._hosts.start(host)
                return gone
            case "cut a link":
                host.cut()
                time.sleep(self._rng.uniform(*CUT_SECONDS))
                host.heal()
            case "kill orchestrator":
                self._saboteur.signal("orchestrator", signal.SIGKILL)
            case "kill supervisor":
                self._saboteur.end_supervisor()
                self._saboteur.patiently(lambda: len(self._there()) == 3 * HOSTS)
        return set()

    def _kill_worker(self, host: OtherHost) -> set[tuple[str, int]]:
        mine = [worker for worker in self._there() if worker.host == host.name]
        victim = self._rng.choice(mine)
        host.kill(victim.pid)
        return {(victim.host, victim.pid)}

    def _there(self) -> list[WorkerView]:
        """The workers of other hosts that are loaded."""
        names = {host.name for host in self._hosts.all}
        return [w for w in self._saboteur.workers().workers if w.host in names and w.state != "loading"]

    def _whole(self, stays: set[tuple[str, int]], gone: set[tuple[str, int]]) -> bool:
        there = {(worker.host, worker.pid) for worker in self._there()}
        return len(there) == 3 * HOSTS and stays <= there and not gone & there

    def settle(self) -> None:
        self._saboteur.patiently(lambda: len(self._there()) == 3 * HOSTS)
        self._saboteur.close()


def soak(
    folder: Path, network: Network, seconds: float, seed: int, pause: float, kinds: Sequence[str], idle: bool
) -> dict[str, Any]:
    rng, account = random.Random(seed), Account()
    keys, endpoint = KeyFolder(folder / "state" / "keys"), f"tcp://{network.near}:{free_port()}"
    (folder / "state").mkdir()
    keys.server()
    stack = Stack(folder, ["--device", "cpu", "--listen-workers", endpoint])
    stack.wait_ready()
    pool = [] if idle else recipes(rng, 24)
    with Client(stack.state, timeout=60) as client:
        wanted = {}
        for request in pool:
            (job,) = client.submit_many([request], pictures=PICTURES)
            wanted[key_of(request)] = digest_of(client, client.wait(job.id, 120).id)
    hosts = Hosts(network, folder, endpoint, keys)
    for host in hosts.all:
        hosts.start(host)
    trouble = Trouble(stack, hosts, rng, account, kinds)
    trouble.settle()
    print(f"{HOSTS} hosts are here; now {seconds / 60:g} minutes of trouble, seed {seed}", file=sys.stderr)
    load, start = Load(stack, wanted, pool, seed + 1, account), time.monotonic()
    if not idle:
        load.start()
    while time.monotonic() - start < seconds:
        time.sleep(rng.expovariate(1 / pause))
        trouble.make()
    load.stopping.set()
    if not idle and not load.finished.wait(300):
        account.problems.append("not all accepted jobs ended within five minutes")
    trouble.settle()
    report = reckon(stack, account, time.monotonic() - start)
    report["problems"] += orphans(hosts.all)
    waits = trouble.interrupted
    report["interrupted jobs"] = len(waits)
    report["with no worker p50/p95/max, s"] = [round(percentile(waits, share), 2) for share in (0.5, 0.95, 1.0)]
    return report


def orphans(hosts: Sequence[OtherHost]) -> list[str]:
    """Tell of workers that are left on hosts after the stack's end."""

    def left(host: OtherHost) -> list[str]:
        return [line for line in host.processes() if "workers.runtime" in line and "fork_server" not in line]

    until = time.monotonic() + 15
    while time.monotonic() < until and any(map(left, hosts)):
        time.sleep(0.2)
    return [f"left on {host.name}: {line[:200]}" for host in hosts for line in left(host)]


@click.command()
@click.option("--minutes", type=float, default=10.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--pause", type=float, default=1.0, show_default=True, help="Seconds between two faults, on average.")
@click.option("--fault", "kinds", multiple=True, type=click.Choice([*FAULTS]), help="Faults of this kind alone.")
@click.option("--idle", is_flag=True, help="No jobs: what a recovery takes where nothing else is done.")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
def main(minutes: float, seed: int, pause: float, kinds: tuple[str, ...], idle: bool, as_json: bool) -> None:
    """Random load, random faults across hosts, and an account of what came of them."""
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, other_hosts(HOSTS) as network:
        report = soak(Path(folder), network, minutes * 60, seed, pause, kinds, idle)
    print(json.dumps(report) if as_json else "\n".join(f"{name}: {value}" for name, value in report.items()))
    if report["problems"] or report["lost"] or report["duplicated"] or report["differing"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
