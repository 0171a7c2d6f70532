"""As many hosts as the work is worth, by Ray's autoscaler: a place for each, which keeps a node in use.

A place is a small detached actor that takes one of a custom resource, which nodes of the kinds to be scaled offer:
while one waits, Ray brings a node for it; where its place has ended, a node is idle for Ray, and goes.
"""

import contextlib
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray

from orchestrator.scheduling.autoscaling import Autoscaler, ScalingTerms, Work, least_busy
from protocol.client.client import Client
from protocol.errors import TriptychError
from protocol.views import HostView, WorkerView

log = logging.getLogger(__name__)

PLACE = "+"  # in the names of places' actors, where others have a host's name
CLIENT_SECONDS = 2.0  # for an answer of the stack's
FIRST_START_SECONDS = 60.0  # that a host takes to come, until one has
NEWEST = 0.5  # weight of the newest start


class PlaceActor:
    """Keeps a node in use."""

    def node(self) -> str:
        """Return Ray's id of the node."""
        return str(ray.get_runtime_context().get_node_id())

    def stop(self) -> None:
        """Do nothing: it ends with its process."""


@dataclass(slots=True)
class Place:
    actor: Any
    asked: Any  # reference of the node's id
    since: float = field(default_factory=time.monotonic)  # when it was made or found
    node: str = ""  # Ray's id; empty until there is one
    ready: bool = False  # its host has worked


class Places:
    """The places of a stack in a cluster; those that an earlier launcher has made are found by their names."""

    def __init__(self, namespace: str, stack: str, resource: str) -> None:
        self._namespace, self._prefix, self._resource = namespace, f"{stack}/{PLACE}/", resource
        self.all: dict[str, Place] = {}
        for row in ray.util.list_named_actors(all_namespaces=True):
            if row["namespace"] == namespace and str(row["name"]).startswith(self._prefix):
                with contextlib.suppress(ValueError):  # it has ended meanwhile
                    actor = ray.get_actor(row["name"], namespace=namespace)
                    self.all[row["name"]] = Place(actor, actor.node.remote())

    @property
    def nodes(self) -> dict[str, str]:
        """The names of places by their nodes."""
        return {place.node: name for name, place in self.all.items() if place.node}

    def add(self) -> None:
        """Ask for a host."""
        name = f"{self._prefix}{uuid.uuid4().hex[:12]}"
        options = {"name": name, "namespace": self._namespace, "lifetime": "detached", "max_restarts": -1}
        actor = ray.remote(PlaceActor).options(num_cpus=0, resources={self._resource: 1}, **options).remote()
        self.all[name] = Place(actor, actor.node.remote())
        log.info("one more host is asked for: %d in all", len(self.all))

    def end(self, name: str) -> None:
        """Let a host go."""
        ray.kill(self.all.pop(name).actor, no_restart=True)
        log.info("a host is let go: %d are left", len(self.all))

    def look(self) -> None:
        """Take in where places are; one whose node has gone is put on another one by Ray."""
        for name, place in list(self.all.items()):
            if not ray.wait([place.asked], timeout=0)[0]:
                continue
            try:
                place.node = ray.get(place.asked)
            except (ray.exceptions.ActorUnavailableError, ray.exceptions.ActorUnschedulableError):
                place.node = ""
            except ray.exceptions.RayError:  # it is no more, without our doing
                del self.all[name]
                continue
            place.asked = place.actor.node.remote()


class Scaling:
    """Asks for hosts and lets them go, by what waits in the stack. `host_on` gives the name of the host on a node."""

    def __init__(
        self,
        places: Places,
        terms: ScalingTerms,
        folder: Any,
        host_on: Callable[[str], str],
        end: Callable[[str], None],
    ) -> None:
        self._places, self._folder, self._host_on, self._end = places, folder, host_on, end
        self._scaler = Autoscaler(replace(terms, start_seconds=FIRST_START_SECONDS))
        self._client: Client | None = None

    def look(self) -> None:
        """Make it so; nothing where the stack does not answer."""
        self._places.look()
        try:
            self._client = self._client or Client(self._folder, timeout=CLIENT_SECONDS)
            client = self._client
            waiting, hosts = client.stack().waiting_seconds, {host.name: host for host in client.hosts()}
            workers = client.workers().workers
        except TriptychError as error:
            log.info("the stack does not answer: %s", error)
            self.close()
            return
        self._scale(client, waiting, hosts, workers)

    def close(self) -> None:
        if self._client:
            self._client.close()
        self._client = None

    def _scale(
        self, client: Client, waiting: float, hosts: Mapping[str, HostView], workers: Sequence[WorkerView]
    ) -> None:
        there = {name: self._host_on(place.node) for name, place in self._places.all.items() if place.node}
        here = {name: host for name, host in there.items() if is_ready(host, hosts, workers)}
        self._learn(here)
        gpus = max([1, *(len(hosts[host].facts.gpus) for host in here.values())])
        self._scaler.terms = replace(self._scaler.terms, gpus=gpus)
        tasks = Counter(worker.host for worker in workers if worker.job)
        busy = {name: min(gpus, tasks[host]) for name, host in here.items()}
        work = Work(waiting, [*busy.values()], len(self._places.all) - len(here))
        surplus = len(self._places.all) - self._scaler.wanted(work, time.monotonic())
        cordoned = [name for name, host in here.items() if hosts[host].placing == "cordoned"]
        for _ in range(-surplus):
            self._places.add()
        if surplus <= 0:
            for name in cordoned:
                client.place_on_host(here[name], "")
            return
        for name in [name for name in self._places.all if name not in there][:surplus]:
            self._places.end(name)
            surplus -= 1
        left = [name for name in here if name not in cordoned]
        for _ in range(min(len(left), surplus - len(cordoned))):
            spared = left.pop(least_busy([busy[name] for name in left]))
            client.place_on_host(here[spared], "cordoned")
        for name in cordoned[: max(0, surplus)]:
            if not tasks[here[name]]:
                client.place_on_host(here[name], "")  # whichever machine has that name next
                self._end(here[name])
                self._places.end(name)

    def _learn(self, ready: Iterable[str]) -> None:
        """Learn how long a host takes to come."""
        for name in ready:
            place = self._places.all[name]
            if not place.ready:
                place.ready, took = True, time.monotonic() - place.since
                terms = self._scaler.terms
                seconds = terms.start_seconds + NEWEST * (took - terms.start_seconds)
                self._scaler.terms = replace(terms, start_seconds=seconds)
                log.info("a host has come within %.1f s; %.1f s are reckoned with", took, seconds)


def is_ready(host: str, hosts: Mapping[str, HostView], workers: Sequence[WorkerView]) -> bool:
    """Return whether all workers of a host stand ready."""
    view = hosts.get(host)
    if view is None or view.state != "here" or not view.workers:
        return False
    return sum(worker.host == host and worker.state != "loading" for worker in workers) >= view.workers
