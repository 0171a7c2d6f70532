"""As many hosts as the work is worth, by Ray's autoscaler: a reservation for each, which keeps a node in use.

A reservation is a small detached actor that takes one of a custom resource, which nodes of the kinds to be scaled
offer: while one waits, Ray brings a node for it; where it has ended, a node is idle for Ray, and goes.
"""

import contextlib
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray

from orchestrator.ray_launcher.asked import Asked
from orchestrator.scheduling.autoscaling import Autoscaler, ScalingTerms, Work, least_busy
from protocol.client.client import Client
from protocol.errors import TriptychError
from protocol.views import HostView, WorkerView

log = logging.getLogger(__name__)

RESERVED = "+"  # in the names of reservations' actors, where others have a host's name
CLIENT_SECONDS = 2.0  # for an answer of the stack's
FIRST_START_SECONDS = 60.0  # that a host takes to come, until one has
NEWEST = 0.5  # weight of the newest start
MOST_SLOWER = 4.0  # times as long as was reckoned with, that a start counts for
LEAST_PATIENCE_SECONDS = 180.0  # with a node whose host does not get ready; twice as many after each that did not
STARTS_OF_PATIENCE = 3.0  # the same, in what a start takes
LONGEST_START_SECONDS = 3600.0
HELD = ("cordoned", "drained")  # by a person, who is left to decide
PAUSES = (0.0, 30.0, 60.0, 120.0, 300.0)  # seconds before another host is asked for, by how many failed in a row


class ReservationActor:
    """Keeps a node in use, as long as a launcher asks for it."""

    def __init__(self) -> None:
        self._asked = Asked()

    def node(self) -> str:
        """Return Ray's id of the node."""
        self._asked.again()
        return str(ray.get_runtime_context().get_node_id())


@dataclass(slots=True)
class Reservation:
    actor: Any
    asked: Any  # reference of the node's id
    since: float = field(default_factory=time.monotonic)  # when it was made or found
    node: str = ""  # Ray's id; empty until there is one
    at_node: float = 0.0  # monotonic seconds, since when
    ready: float = 0.0  # monotonic seconds, when its host was last seen to work; 0: never
    found: bool = False  # it is of an earlier launcher
    known: frozenset[str] = frozenset()  # nodes that were there already when it was made


class Reservations:
    """The reservations of a stack in a cluster; those that an earlier launcher has made are found by their names."""

    def __init__(self, namespace: str, stack: str, resource: str) -> None:
        self._namespace, self._prefix, self._resource = namespace, f"{stack}/{RESERVED}/", resource
        self.all: dict[str, Reservation] = {}
        self.doubled = False  # a node offers the resource more than once; until somebody has looked
        for row in ray.util.list_named_actors(all_namespaces=True):
            if row["namespace"] == namespace and str(row["name"]).startswith(self._prefix):
                with contextlib.suppress(ValueError):  # it has ended meanwhile
                    actor = ray.get_actor(row["name"], namespace=namespace)
                    self.all[row["name"]] = Reservation(actor, actor.node.remote(), found=True)

    @property
    def nodes(self) -> set[str]:
        """The nodes that are reserved."""
        return {reservation.node for reservation in self.all.values() if reservation.node}

    def add(self) -> None:
        """Ask for a host."""
        name = f"{self._prefix}{uuid.uuid4().hex[:12]}"
        options = {"name": name, "namespace": self._namespace, "lifetime": "detached"}
        actor = ray.remote(ReservationActor).options(num_cpus=0, resources={self._resource: 1}, **options).remote()
        known = frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])
        self.all[name] = Reservation(actor, actor.node.remote(), known=known)
        log.info("one more host is asked for: %d in all", len(self.all))

    def end(self, name: str) -> None:
        """Let a node go, or what waits for one."""
        ray.kill(self.all.pop(name).actor, no_restart=True)
        log.info("a host is let go: %d are left", len(self.all))

    def end_all(self) -> None:
        for name in list(self.all):
            self.end(name)

    def look(self) -> None:
        """Take in where reservations are, and which are no more."""
        for name, reservation in list(self.all.items()):
            if not ray.wait([reservation.asked], timeout=0)[0]:
                continue
            try:
                node = ray.get(reservation.asked)
            except (ray.exceptions.ActorUnavailableError, ray.exceptions.ActorUnschedulableError):
                node = reservation.node
            except ray.exceptions.RayError:  # its node has gone
                del self.all[name]
                continue
            if node and not reservation.node and node in self.nodes:
                log.warning("a node offers %s more than once, and is one host all the same", self._resource)
                self.doubled = True
                self.end(name)
                continue
            if node and not reservation.node:
                reservation.node, reservation.at_node = node, time.monotonic()
            reservation.asked = reservation.actor.node.remote()


class Scaling:
    """Asks for hosts and lets them go, by what waits in the stack. `host_on` gives the name of the host on a node."""

    def __init__(
        self, reservations: Reservations, terms: ScalingTerms, folder: Path, host_on: Callable[[str], str]
    ) -> None:
        self._reservations, self._folder, self._host_on = reservations, folder, host_on
        self._scaler, self._limits = Autoscaler(replace(terms, start_seconds=FIRST_START_SECONDS)), terms
        self._client: Client | None = None
        self._said = ""  # what keeps it from scaling
        self._failed = 0  # hosts in a row that never got ready
        self._not_before = 0.0  # monotonic seconds, when another may be asked for
        self._waits = False  # Ray has brought no node for long, which was said

    def look(self) -> None:
        """Ask for as many hosts as are wanted, and let go of what is too many; do nothing without the stack."""
        self._reservations.look()
        try:
            self._client = self._client or Client(self._folder, timeout=CLIENT_SECONDS)
            hosts = {host.name: host for host in self._client.hosts()}
            self._scale(self._client, self._client.stack().waiting_seconds, hosts, self._client.workers().workers)
            self._said = ""
        except TriptychError as error:
            self.close()
            if str(error) != self._said:
                self._said = str(error)
                log.info("no hosts are asked for or let go: %s", error)

    def close(self) -> None:
        if self._client:
            self._client.close()
        self._client = None

    def _scale(
        self, client: Client, waiting: float, hosts: Mapping[str, HostView], workers: Sequence[WorkerView]
    ) -> None:
        names = {name: self._host_on(r.node) for name, r in self._reservations.all.items() if r.node}
        held = {name for name, host in names.items() if host in hosts and hosts[host].placing in HELD}
        mine = {name: r for name, r in self._reservations.all.items() if name not in held}
        self._learn(name for name in mine if name in names and is_ready(names[name], hosts, workers))
        here = {
            n: names[n] for n, r in mine.items() if r.ready and names[n] in hosts and hosts[names[n]].state == "here"
        }
        self._give_up({name: names[name] for name in mine if name in names and name not in here}, hosts)
        mine = {name: r for name, r in mine.items() if name in self._reservations.all}
        self._complain(mine)
        gpus = max([1, *(len(hosts[host].facts.gpus) for host in here.values())]) if here else self._scaler.terms.gpus
        least, most = (max(0, limit - len(held)) for limit in (self._limits.least, self._limits.most))
        self._scaler.terms = replace(self._scaler.terms, gpus=gpus, least=least, most=most)
        tasks = Counter(worker.host for worker in workers if worker.job)
        busy = {name: min(gpus, tasks[host]) for name, host in here.items()}
        wanted = self._scaler.wanted(Work(waiting, [*busy.values()], len(mine) - len(here)), time.monotonic())
        leaving = [name for name, host in here.items() if hosts[host].placing == "leaving"]
        if wanted >= len(mine):
            for name in leaving:
                client.place_on_host(here[name], "")
            if time.monotonic() >= self._not_before:
                missing = wanted - len(mine)
                for _ in range(min(missing, 1) if self._failed else missing):
                    self._reservations.add()
            return
        to_come = [name for name in mine if name not in here and not tasks[names.get(name, "")]]
        self._let_go(client, len(mine) - wanted, to_come, here, leaving, busy)

    def _let_go(
        self,
        client: Client,
        surplus: int,
        to_come: Sequence[str],
        here: Mapping[str, str],
        leaving: Sequence[str],
        busy: Mapping[str, int],
    ) -> None:
        """Let go of so many hosts: first of those that are yet to come, then of those with the least to do."""
        for name in to_come[:surplus]:
            self._reservations.end(name)
        surplus -= min(surplus, len(to_come))
        for name in leaving[surplus:]:
            client.place_on_host(here[name], "")
        for name in leaving[:surplus]:
            if not busy[name]:
                self._reservations.end(name)
        left = [name for name in here if name not in leaving]
        for _ in range(min(len(left), surplus - len(leaving))):
            client.place_on_host(here[left.pop(least_busy([busy[name] for name in left]))], "leaving")

    def _give_up(self, absent: Mapping[str, str], hosts: Mapping[str, HostView]) -> None:
        """Let go of nodes whose hosts don't get ready, or are silent; after the former others are asked for later."""
        now, start = time.monotonic(), self._scaler.terms.start_seconds
        patience = max(LEAST_PATIENCE_SECONDS, STARTS_OF_PATIENCE * start) * 2 ** min(self._failed, len(PAUSES))
        for name, host in absent.items():
            reservation, view = self._reservations.all[name], hosts.get(host)
            refused = view is not None and view.state == "refused"
            if not refused and now - max(reservation.at_node, reservation.ready) <= patience:
                continue
            self._reservations.end(name)
            if reservation.ready:
                log.warning("%s: it has been silent for too long", host)
                continue
            if not refused:
                longer = min(2 * start, LONGEST_START_SECONDS)
                self._scaler.terms = replace(self._scaler.terms, start_seconds=longer)
            reason = (view and view.reason) or f"its workers did not stand ready within {patience:.0f} s"
            self._pause(f"{host or 'a node'}: {reason}")

    def _complain(self, mine: Mapping[str, Reservation]) -> None:
        """Say what keeps hosts from coming."""
        if self._reservations.doubled:
            self._reservations.doubled = False
            self._pause("a node offers more than one of the resource, of which a host takes one")
        late = STARTS_OF_PATIENCE * self._scaler.terms.start_seconds
        waits = any(not r.node and time.monotonic() - r.since > late for r in mine.values())
        if waits and not self._waits:
            log.warning("Ray has brought no node for %.0f s: is there a kind that offers the resource, and room?", late)
        self._waits = waits

    def _pause(self, reason: str) -> None:
        """Ask for no host for a while, for a longer one each time."""
        self._failed += 1
        pause = PAUSES[min(self._failed, len(PAUSES) - 1)]
        self._not_before = time.monotonic() + pause
        log.warning("%s; no other host is asked for within %g s", reason, pause)

    def _learn(self, ready: Iterable[str]) -> None:
        """Learn how long a host takes to come."""
        now = time.monotonic()
        for name in ready:
            reservation, terms = self._reservations.all[name], self._scaler.terms
            if not reservation.ready:
                self._failed = 0
            if not reservation.ready and not reservation.found and reservation.node not in reservation.known:
                took = min(now - reservation.since, MOST_SLOWER * terms.start_seconds)
                seconds = terms.start_seconds + NEWEST * (took - terms.start_seconds)
                self._scaler.terms = replace(terms, start_seconds=seconds)
                log.info("a host has come within %.1f s; %.1f s are reckoned with", now - reservation.since, seconds)
            reservation.ready = now


def is_ready(host: str, hosts: Mapping[str, HostView], workers: Sequence[WorkerView]) -> bool:
    """Return whether all workers of a host stand ready."""
    view = hosts.get(host)
    if view is None or view.state != "here" or not view.workers:
        return False
    return sum(worker.host == host and worker.state != "loading" for worker in workers) >= view.workers
