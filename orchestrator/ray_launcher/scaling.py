"""As many hosts as the work is worth, by Ray's autoscaler: a reservation for each, which keeps a node in use.

A reservation is a small detached actor that takes one of a custom resource, which nodes of the kinds to be scaled
offer: while one waits, Ray brings a node for it; where it has ended, a node is idle for Ray, and goes.
"""

import contextlib
import logging
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray

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
LEAST_PATIENCE_SECONDS = 120.0  # with a node whose host does not get ready
STARTS_OF_PATIENCE = 3.0  # the same, in what a start takes
PAUSES = (0.0, 30.0, 60.0, 120.0, 300.0)  # seconds before another host is asked for, by how many failed in a row
FORGOTTEN_SECONDS = 600.0  # without a launcher, after which a reservation ends: its stack may be gone for good


class ReservationActor:
    """Keeps a node in use, as long as a launcher asks for it."""

    def __init__(self) -> None:
        self._asked = time.monotonic()
        threading.Thread(target=self._end_when_forgotten, daemon=True).start()

    def node(self) -> str:
        """Return Ray's id of the node."""
        self._asked = time.monotonic()
        return str(ray.get_runtime_context().get_node_id())

    def _end_when_forgotten(self) -> None:
        while time.monotonic() - self._asked < FORGOTTEN_SECONDS:
            time.sleep(1.0)
        os._exit(0)


@dataclass(slots=True)
class Reservation:
    actor: Any
    asked: Any  # reference of the node's id
    since: float = field(default_factory=time.monotonic)  # when it was made or found
    node: str = ""  # Ray's id; empty until there is one
    at_node: float = 0.0  # monotonic seconds, since when
    ready: float = 0.0  # monotonic seconds, when its host was last seen to work; 0: never
    found: bool = False  # it is of an earlier launcher


class Reservations:
    """The reservations of a stack in a cluster; those that an earlier launcher has made are found by their names."""

    def __init__(self, namespace: str, stack: str, resource: str) -> None:
        self._namespace, self._prefix, self._resource = namespace, f"{stack}/{RESERVED}/", resource
        self.all: dict[str, Reservation] = {}
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
        self.all[name] = Reservation(actor, actor.node.remote())
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
            if node and not reservation.node and node in self.nodes:  # it offers more than one
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
        self._scaler = Autoscaler(replace(terms, start_seconds=FIRST_START_SECONDS))
        self._client: Client | None = None
        self._said = ""  # what keeps it from scaling
        self._failed = 0  # hosts in a row that never got ready
        self._not_before = 0.0  # monotonic seconds, when another may be asked for

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
        there = {name: self._host_on(r.node) for name, r in self._reservations.all.items() if r.node}
        here = {name: host for name, host in there.items() if is_ready(host, hosts, workers)}
        self._learn(here)
        self._give_up({name: host for name, host in there.items() if name not in here}, hosts)
        if here:
            gpus = max(1, *(len(hosts[host].facts.gpus) for host in here.values()))
            self._scaler.terms = replace(self._scaler.terms, gpus=gpus)
        tasks = Counter(worker.host for worker in workers if worker.job)
        busy = {name: min(self._scaler.terms.gpus, tasks[host]) for name, host in here.items()}
        count = len(self._reservations.all)
        wanted = self._scaler.wanted(Work(waiting, [*busy.values()], count - len(here)), time.monotonic())
        leaving = [name for name, host in here.items() if hosts[host].placing == "leaving"]
        if wanted >= count:
            for name in leaving:
                client.place_on_host(here[name], "")
            if time.monotonic() >= self._not_before:
                for _ in range(wanted - count):
                    self._reservations.add()
            return
        self._let_go(client, count - wanted, here, leaving, {name for name in here if tasks[here[name]]}, busy)

    def _let_go(
        self,
        client: Client,
        surplus: int,
        here: Mapping[str, str],
        leaving: list[str],
        working: Container[str],
        busy: Mapping[str, int],
    ) -> None:
        """Let go of so many hosts: first of those that are yet to come, then of those with the least to do."""
        for name in [name for name in self._reservations.all if name not in here][:surplus]:
            self._reservations.end(name)
            surplus -= 1
        for name in leaving[surplus:]:
            client.place_on_host(here[name], "")
        for name in leaving[:surplus]:
            if name not in working:
                self._reservations.end(name)
        left = [name for name in here if name not in leaving]
        for _ in range(min(len(left), surplus - len(leaving))):
            client.place_on_host(here[left.pop(least_busy([busy[name] for name in left]))], "leaving")

    def _give_up(self, absent: Mapping[str, str], hosts: Mapping[str, HostView]) -> None:
        """Let go of nodes whose hosts don't get ready; the next ones are asked for later and later."""
        patience = max(LEAST_PATIENCE_SECONDS, STARTS_OF_PATIENCE * self._scaler.terms.start_seconds)
        now = time.monotonic()
        for name, host in absent.items():
            reservation = self._reservations.all[name]
            view = hosts.get(host)
            refused = view is not None and view.state == "refused"
            if refused or now - max(reservation.at_node, reservation.ready) > patience:
                self._failed += 1
                pause = PAUSES[min(self._failed, len(PAUSES) - 1)]
                self._not_before = now + pause
                reason = (view and view.reason) or f"its workers did not stand ready within {patience:.0f} s"
                log.warning("%s: %s; no other host is asked for within %g s", host or "a node", reason, pause)
                self._reservations.end(name)

    def _learn(self, ready: Iterable[str]) -> None:
        """Learn how long a host takes to come."""
        now = time.monotonic()
        for name in ready:
            reservation, terms = self._reservations.all[name], self._scaler.terms
            if not reservation.ready and not reservation.found:
                took = min(now - reservation.since, MOST_SLOWER * terms.start_seconds)
                seconds = terms.start_seconds + NEWEST * (took - terms.start_seconds)
                self._scaler.terms = replace(terms, start_seconds=seconds)
                log.info("a host has come within %.1f s; %.1f s are reckoned with", now - reservation.since, seconds)
            reservation.ready, self._failed = now, 0


def is_ready(host: str, hosts: Mapping[str, HostView], workers: Sequence[WorkerView]) -> bool:
    """Return whether all workers of a host stand ready."""
    view = hosts.get(host)
    if view is None or view.state != "here" or not view.workers:
        return False
    return sum(worker.host == host and worker.state != "loading" for worker in workers) >= view.workers
