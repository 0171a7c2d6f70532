"""Puts an agent on each node of a Ray cluster, as detached actors: Ray launches and places, Triptych judges.

Actors are known by their names, so that another launcher of the same stack adopts them. A node that Ray calls dead is
no news: whether a host works the orchestrator hears from its agent. Longer than other files: a host's life, from its
node to its end, is read in one place.
"""

import contextlib
import hashlib
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ray
from ray.util import get_node_ip_address
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.access import KeyFolder
from orchestrator.ray_launcher.actor import HostActor
from orchestrator.ray_launcher.scaling import RESERVED, Reservations, Scaling
from orchestrator.scheduling.autoscaling import ScalingTerms
from orchestrator.settings import RaySettings
from orchestrator.state_folder import StackFolder
from protocol.client.endpoints import PUBLISHED
from protocol.errors import BadRequest, NotFound, TriptychError

log = logging.getLogger(__name__)

NAMESPACE = "triptych"
LOOK_SECONDS = 2.0  # between two looks at the cluster
MOST_PAUSE_SECONDS = 300.0  # before another actor where one can't live
ANSWER_SECONDS = 60.0  # for an actor to be there: its node imports what it needs
STOP_SECONDS = 6.0  # for all agents to end, less than the supervisor waits for this process
NICE = 0  # that workers should be run at


@dataclass(slots=True)
class Placed:
    """A host, and its actor."""

    name: str
    node: str  # Ray's id
    address: str  # of the machine
    actor: Any
    asked: Any  # reference of the answer that is waited for
    comes_and_goes: bool  # with the work
    what: Literal["public", "join", "state"] = "public"  # that was asked
    since: float = field(default_factory=time.monotonic)
    told: str = ""  # endpoint that it was told last


class RayLauncher:
    def __init__(self, folder: StackFolder, settings: RaySettings, beat: Callable[[], None] = lambda: None) -> None:
        """`beat` is called in each turn: it works."""
        self._beat = beat
        self._folder, self._settings = folder, settings
        self._keys = KeyFolder(folder.keys)
        self._stack = stack_id(folder)
        self._hosts: dict[str, Placed] = {}  # by node
        self._replaced: set[str] = set()  # nodes whose machines have come again as others, whatever Ray says of them
        self._failures: dict[str, int] = {}  # in a row, by node
        self._not_before: dict[str, float] = {}  # monotonic seconds of the next try, by node
        self._said: dict[str, str] = {}  # troubles by host: what lasts is said once
        self._reservations: Reservations | None = None  # of hosts that come and go with the work
        self._ending: list[tuple[Placed, Any, float]] = []  # hosts, what tells that they have stopped, the latest time
        self._swept = False  # what an earlier launcher has left on nodes that come and go is known
        self._scaling: Scaling | None = None
        self._stop = threading.Event()

    def stop(self) -> None:
        self._stop.set()

    def run(self) -> None:
        """Look after the cluster, to which this process is connected, until told to stop; then end the actors."""
        log.info("the Ray cluster has %d nodes", len(alive()))
        self._check_alone()
        if self._settings.ray_scale:
            least, most = self._settings.scale_limits
            self._reservations = Reservations(NAMESPACE, self._stack, self._settings.ray_resource)
            terms = ScalingTerms(gpus=1, least=least, most=most)
            self._scaling = Scaling(self._reservations, terms, self._folder.path, self._host_on)
        while not self._stop.wait(LOOK_SECONDS if self._hosts or self._scaling else 0.1):
            self._beat()
            if self._scaling:
                self._scaling.look()
                self._end_unreserved()
            for node in self._wanted():
                if node["NodeID"] not in self._hosts and time.monotonic() > self._not_before.get(node["NodeID"], 0.0):
                    self._place(node)
            for host in list(self._hosts.values()):
                self._look_after(host)
        self._end()

    def _check_alone(self) -> None:
        """Raise BadRequest where another stack has hosts that this one is to have: each would plan for the whole."""
        rows = [row for row in ray.util.list_named_actors(all_namespaces=True) if row["namespace"] == NAMESPACE]
        taken = {str(row["name"]).split("/")[2] for row in rows if not of_stack(row, self._stack)}
        if both := sorted(node["NodeManagerHostname"] for node in self._wanted() if node["NodeID"][:8] in taken):
            raise BadRequest(
                f"Another stack has the host {both[0]!r} of this Ray cluster.",
                "Choose others with --ray-host or --ray-label, or end that stack: triptych down --ray ADDRESS.",
            )

    # -- which nodes ----------------------------------------------------------------------------

    def _wanted(self) -> Iterator[dict[str, Any]]:
        """Yield the nodes that are to be hosts: by name and label, and not the stack's own host.

        Of those that come and go with the work the ones that are reserved.
        """
        for node in alive():
            if self._comes_and_goes(node):
                ending = any(host.node == node["NodeID"] for host, _, _ in self._ending)
                if self._reservations and node["NodeID"] in self._reservations.nodes and not ending:
                    yield node
                continue
            name, labels = node["NodeManagerHostname"], node.get("Labels") or {}
            chosen = not self._settings.ray_hosts or name in self._settings.ray_hosts
            fits = all(labels.get(label) == value for label, value in self._settings.ray_labels.items())
            if chosen and fits and not is_this_machine(node) and node["NodeID"] not in self._replaced:
                yield node

    def _comes_and_goes(self, node: Mapping[str, Any]) -> bool:
        return bool(self._settings.ray_scale and node["Resources"].get(self._settings.ray_resource))

    def _host_on(self, node: str) -> str:
        """Return the name of the host on a node; empty where there is none yet."""
        return self._hosts[node].name if node in self._hosts else ""

    def _end_unreserved(self) -> None:
        """End the agents of hosts that were let go, or whose node has gone, and let them in no more."""
        assert self._reservations
        now, reserved = time.monotonic(), self._reservations.nodes
        for host in [host for host in self._hosts.values() if host.comes_and_goes and host.node not in reserved]:
            del self._hosts[host.node]
            self._ending.append((host, host.actor.stop.remote(), now + STOP_SECONDS))
        for host in self._left_behind(reserved | {host.node for host, _, _ in self._ending}):
            self._ending.append((host, host.actor.stop.remote(), now + STOP_SECONDS))
        for ending in list(self._ending):
            host, stopped, until = ending
            if now >= until or ray.wait([stopped], timeout=0)[0]:
                self._ending.remove(ending)
                ray.kill(host.actor, no_restart=True)
                with contextlib.suppress(NotFound):
                    self._keys.revoke(host.name)

    def _left_behind(self, but: Collection[str]) -> Iterator[Placed]:
        """Yield hosts of an earlier launcher on nodes that come and go, `but` those on some of them.

        What it has reserved is known once all that it has left has answered.
        """
        assert self._reservations
        if self._swept or any(r.found and not r.node for r in self._reservations.all.values()):
            return
        self._swept = True
        nodes = {n["NodeID"][:8]: n for n in alive() if self._comes_and_goes(n) and n["NodeID"] not in but}
        for name in actors_of(self._stack):
            if not is_reservation(name) and (node := nodes.get(name.split("/")[2])):
                with contextlib.suppress(ValueError):  # it has ended meanwhile
                    actor = ray.get_actor(name, namespace=NAMESPACE)
                    yield Placed(name.split("/")[1], node["NodeID"], node["NodeManagerAddress"], actor, None, True)

    def _name_of(self, node: Mapping[str, Any]) -> str:
        """Return a host's name for a node: that of its actor if there is one, else its machine's.

        With a part of the node's id where that is taken.
        """
        for known in actors_of(self._stack):
            if known.endswith(f"/{node['NodeID'][:8]}"):
                return known.split("/")[1]
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", str(node["NodeManagerHostname"])).strip("-_.")[:40] or "node"
        others = {host.name for host in self._hosts.values()} | {socket.gethostname()}
        others |= {entry.name for entry in self._keys.entries() if entry.role != "host"}
        return f"{name}-{node['NodeID'][:8]}" if name in others else name

    # -- actors ---------------------------------------------------------------------------------

    def _place(self, node: Mapping[str, Any]) -> None:
        where, address = str(node["NodeID"]), str(node["NodeManagerAddress"])
        comes_and_goes = self._comes_and_goes(node)
        known_there = [h for h in self._hosts.values() if h.address == address and not comes_and_goes]
        for known in known_there:
            self._replaced.add(known.node)  # Ray may hold it for alive for minutes
            del self._hosts[known.node]
            ray.kill(known.actor, no_restart=True)
        name = self._name_of(node)
        actor = (
            ray.remote(HostActor)
            .options(
                name=actor_name(self._stack, name, where),
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                max_restarts=0 if comes_and_goes else -1,
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(where, soft=False),
            )
            .remote(name, self._stack, comes_and_goes)
        )
        self._hosts[where] = Placed(name, where, address, actor, actor.public.remote(), comes_and_goes)
        log.info("%s: an actor on node %s", name, where)

    def _look_after(self, host: Placed) -> None:
        """Take a host's answer if it has come, and ask it the next thing: nobody waits for a node that is silent."""
        try:
            if not ray.wait([host.asked], timeout=0)[0]:
                if time.monotonic() - host.since > ANSWER_SECONDS:
                    self._say(host.name, "its actor does not answer")
                return
            answer = ray.get(host.asked)
            if host.what == "public":
                self._let_in(host.name, answer)
            elif host.what == "state":
                self._tell(host.name, answer)
                self._failures.pop(host.node, None)
            self._ask(host)
        except (ray.exceptions.ActorUnavailableError, ray.exceptions.ActorUnschedulableError) as error:
            self._say(host.name, f"its actor can't be reached: {first_line(error)}")  # which isn't its death
            self._ask_again(host)
        except ray.exceptions.RayError as error:
            self._say(host.name, f"its actor has died: {first_line(error)}")
            del self._hosts[host.node]
            failures = self._failures[host.node] = self._failures.get(host.node, 0) + 1
            self._not_before[host.node] = time.monotonic() + min(MOST_PAUSE_SECONDS, LOOK_SECONDS * 2**failures)

    def _ask(self, host: Placed) -> None:
        """Tell a host where the stack is, if that is news; else ask how it is."""
        endpoint = self._endpoint()
        if endpoint and endpoint != host.told:
            host.what, host.told = "join", endpoint
            host.asked = host.actor.join.remote(endpoint, self._keys.server().public)
        else:
            host.what, host.asked = "state", host.actor.state.remote()
        host.since = time.monotonic()

    def _ask_again(self, host: Placed) -> None:
        """Ask what was not answered."""
        if host.what == "public":
            host.asked, host.since = host.actor.public.remote(), time.monotonic()
            return
        if host.what == "join":
            host.told = ""
        self._ask(host)

    def _let_in(self, name: str, public: str) -> None:
        for entry in self._keys.entries():
            if entry.name == name and entry.public == public:
                return
            if name == entry.name or public == entry.public:
                self._keys.revoke(entry.name)  # of an earlier life of that machine
        self._keys.add(name, "host", public)

    def _tell(self, name: str, state: Mapping[str, Any]) -> None:
        if state["reason"]:
            self._say(name, f"its agent has ended: {state['reason']}")
        elif state["niceness"] > NICE:
            self._say(
                name,
                f"its workers run at nice {state['niceness']}, behind others: start Ray with RAY_worker_niceness=0",
            )
        else:
            self._said.pop(name, None)

    def _say(self, name: str, trouble: str) -> None:
        if self._said.get(name) != trouble:
            self._said[name] = trouble
            log.warning("%s: %s", name, trouble)

    def _endpoint(self) -> str:
        """Return where hosts find the stack; empty while it is not there yet."""
        try:
            published = json.loads((self._folder.path / PUBLISHED).read_text())
            port = str(published["remote"]["worker"]).rpartition(":")[2]
        except (OSError, ValueError, KeyError, TypeError):
            return ""
        return f"tcp://{get_node_ip_address()}:{port}"

    def _end(self) -> None:
        """End the actors in good order, and let their hosts in no more."""
        if self._scaling and self._reservations:
            self._scaling.close()
            self._reservations.end_all()
        names = [host.name for host in (*self._hosts.values(), *(host for host, _, _ in self._ending))]
        end_actors(self._stack)
        for name in names:
            try:
                self._keys.revoke(name)
            except (NotFound, TriptychError) as error:
                log.warning("%s", error)


def connect(address: str) -> None:
    """Connect this process to a cluster; BadRequest where there is none, or it is not for us."""
    try:
        ray.init(address=address, namespace=NAMESPACE, logging_level=logging.ERROR, log_to_driver=False)
    except Exception as error:  # of many kinds: no cluster, another version, another token
        raise BadRequest(
            f"The Ray cluster at {address!r} can't be used: {first_line(error)}",
            "Is it up (ray status), of the same versions of Ray and Python, and with the same token?",
        ) from error


def alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def is_this_machine(node: Mapping[str, Any]) -> bool:
    return bool(node["NodeManagerAddress"] == get_node_ip_address())


def stack_id(folder: StackFolder) -> str:
    """Return a stack's name in a cluster, the same for each of its lives."""
    return hashlib.sha256(f"{socket.gethostname()}:{folder.path.resolve()}".encode()).hexdigest()[:12]


def actor_name(stack: str, host: str, node: str) -> str:
    return f"{stack}/{host}/{node[:8]}"


def end_actors(stack: str) -> list[str]:
    """End all actors of a stack's, in good order where they do it in time; return their names."""
    found = actors_of(stack)
    actors = []
    for name in found:
        try:
            actors.append((name, ray.get_actor(name, namespace=NAMESPACE)))
        except ValueError:  # it has ended meanwhile
            continue
    stops = [actor.stop.remote() for name, actor in actors if not is_reservation(name)]
    if stops:
        ray.wait(stops, num_returns=len(stops), timeout=STOP_SECONDS)
    for _, actor in actors:
        ray.kill(actor, no_restart=True)
    return found


def is_reservation(name: str) -> bool:
    """Return whether an actor's name is a reservation's."""
    return name.split("/")[1] == RESERVED


def actors_of(stack: str) -> list[str]:
    """Return the names of a stack's actors in the cluster."""
    return [str(row["name"]) for row in ray.util.list_named_actors(all_namespaces=True) if of_stack(row, stack)]


def of_stack(row: Mapping[str, Any], stack: str) -> bool:
    return row["namespace"] == NAMESPACE and str(row["name"]).startswith(f"{stack}/")


def first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]


def end_leftovers(state: Path, address: str) -> list[str]:
    """End what a stack that is no more has left in a cluster; return the names of its actors."""
    connect(address)
    try:
        return end_actors(stack_id(StackFolder(state)))
    finally:
        ray.shutdown()
