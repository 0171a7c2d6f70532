"""The scaling of hosts, with a stack and a cluster that are only told of: no Ray, no sockets."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from orchestrator.ray_launcher import scaling
from orchestrator.ray_launcher.scaling import Reservation, Scaling
from orchestrator.scheduling.autoscaling import ScalingTerms
from protocol.errors import NoStack
from protocol.host import HostFacts
from protocol.views import HostView, WorkerView

FACTS = HostFacts(hostname="box", version="1", versions="", memory_bytes=1, cores=1)


def worker_on(host: str, job: str | None) -> WorkerView:
    return WorkerView(
        id="00", name=f"denoise-1@{host}", stage="denoise", state="busy" if job else "idle", pid=1, host=host,
        device="cpu", device_kind="cpu", versions="", dtype="float32", model="m", revision="r", speedups=(), job=job,
        done=0, rss_bytes=0, gpu_bytes=0, device_map=(), residency=(), gpus=(), lease_bytes=(), context_bytes=(),
        lends=False, since=0.0,
    )  # fmt: skip


@dataclass
class Cluster:
    """Reservations, of which each gets a node as soon as `nodes` allow it."""

    nodes: int = 0
    all: dict[str, Reservation] = field(default_factory=dict)
    made: int = 0
    clock: Any = None
    doubled: bool = False

    def look(self) -> None:
        for reservation in list(self.all.values())[: self.nodes]:
            if not reservation.node:
                reservation.node, reservation.at_node = f"node{id(reservation)}", self.clock()

    def add(self) -> None:
        self.made += 1
        self.all[f"r{self.made}"] = Reservation(None, None, since=self.clock())

    def end(self, name: str) -> None:
        del self.all[name]


@dataclass
class World:
    """A stack as its client tells of it; the hosts on reserved nodes are `state`."""

    scaling: Scaling
    cluster: Cluster
    now: float = 1000.0
    waiting: float = 0.0
    state: str = "here"
    placing: dict[str, str] = field(default_factory=dict)
    busy: set[str] = field(default_factory=set)
    broken: bool = False
    states: dict[str, str] = field(default_factory=dict)  # of hosts, where they aren't `state`
    start: float = 0.0  # seconds until a host's worker is loaded
    loading: set[str] = field(default_factory=set)  # hosts that have one

    @property
    def names(self) -> list[str]:
        return [f"h-{r.node}" for r in self.cluster.all.values() if r.node]

    def hosts(self) -> list[HostView]:
        if self.broken:
            raise NoStack("It is not there.")
        return [
            HostView(
                name=name, state=self.states.get(name, self.state), placing=self.placing.get(name, ""),
                reason="other versions", facts=FACTS, workers=1, heard=0.0,
            )
            for name in self.names
        ]  # fmt: skip

    def workers(self) -> Any:
        class Found:
            workers: tuple[WorkerView, ...] = tuple(
                worker_on(f"h-{r.node}", "j" if f"h-{r.node}" in self.busy else None)
                for r in self.cluster.all.values()
                if r.node and self.now - r.at_node >= self.start and f"h-{r.node}" not in self.loading
            )

        return Found()

    def stack(self) -> Any:
        class Found:
            waiting_seconds = self.waiting

        return Found()

    def place_on_host(self, name: str, placing: str) -> None:
        self.placing[name] = placing

    def close(self) -> None:
        pass

    def run(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1.0
            self.scaling.look()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    cluster = Cluster()
    found = World(Scaling(cluster, ScalingTerms(gpus=1, most=8), Path(), lambda node: f"h-{node}"), cluster)
    cluster.clock = lambda: found.now
    monkeypatch.setattr("orchestrator.ray_launcher.scaling.time.monotonic", cluster.clock)
    found.scaling._client = found  # type: ignore[assignment]
    return found


def test_a_host_comes_for_work_and_goes_without(world: World) -> None:
    world.run(100)
    assert not world.cluster.all
    world.waiting = 5.0
    world.run(20)
    assert len(world.cluster.all) == 1  # which is yet to come
    world.cluster.nodes = 1
    world.run(1)
    world.waiting, world.busy = 0.0, {*world.names}
    world.run(300)
    assert len(world.cluster.all) == 1
    world.busy = set()
    world.run(200)
    assert not world.cluster.all
    assert world.cluster.made == 1


def test_one_that_works_is_let_go_once_it_has_done_what_it_has(world: World) -> None:
    world.cluster.nodes, world.waiting = 8, 5.0
    world.run(2)
    world.waiting = 4000.0
    world.run(3)
    first, *others = world.names
    assert others
    world.waiting, world.busy = 0.0, {first}
    world.run(200)
    assert world.names == [first]
    assert world.placing.get(first, "") == ""


def test_a_persons_cordon_is_left_alone(world: World) -> None:
    world.cluster.nodes, world.waiting = 8, 5.0
    world.run(2)
    (name,) = world.names
    world.placing[name], world.busy = "cordoned", {name}
    world.run(10)
    assert world.placing[name] == "cordoned"


def test_hosts_that_never_get_ready_are_let_go_and_asked_for_less_and_less_often(world: World) -> None:
    world.cluster.nodes, world.waiting, world.state = 8, 5.0, "refused"
    world.run(1000)
    assert 2 <= world.cluster.made <= 7
    world.state = "silent"
    made = world.cluster.made
    world.run(3000)
    assert made < world.cluster.made <= made + 12
    world.state, world.waiting = "here", 5.0
    world.run(400)
    assert world.names


def test_what_an_earlier_launcher_asked_for_teaches_nothing_of_how_long_a_start_takes(world: World) -> None:
    world.cluster.all["old"] = Reservation(None, None, since=world.now, node="n", at_node=world.now, found=True)
    world.busy = {"h-n"}
    world.run(3)
    assert world.scaling._scaler.terms.start_seconds == scaling.FIRST_START_SECONDS


def test_without_the_stack_nothing_is_done(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.broken = True
    monkeypatch.setattr(scaling, "Client", lambda *_, **__: world)
    world.run(5)
    assert not world.cluster.all
    world.broken, world.waiting = False, 5.0
    world.run(2)
    assert len(world.cluster.all) == 1


def test_a_host_that_works_is_not_let_go_while_one_of_its_workers_loads(world: World) -> None:
    world.cluster.nodes, world.waiting = 8, 5.0
    world.run(2)
    (name,) = world.names
    world.waiting, world.loading = 0.0, {name}
    world.workers = lambda found=world.workers: Together(found(), worker_on(name, "j"))  # type: ignore[method-assign]
    world.run(1000)
    assert world.names == [name]
    assert name not in world.placing


@dataclass
class Together:
    found: Any
    other: WorkerView

    @property
    def workers(self) -> tuple[WorkerView, ...]:
        return (*self.found.workers, self.other)


def test_hosts_that_take_long_to_come_come_in_the_end(world: World) -> None:
    world.cluster.nodes, world.waiting, world.start = 8, 5.0, 400.0
    world.run(3000)
    assert any(reservation.ready for reservation in world.cluster.all.values())
    assert world.cluster.made <= 4


def test_a_cordoned_host_does_nothing_so_another_one_comes(world: World) -> None:
    world.cluster.nodes, world.waiting = 8, 5.0
    world.run(2)
    (name,) = world.names
    world.placing[name] = "cordoned"
    world.run(30)
    assert len(world.names) == 2
    world.waiting = 0.0
    world.run(300)
    assert world.names == [name]
    assert world.placing[name] == "cordoned"


def test_a_good_host_does_not_make_up_for_those_that_are_refused(world: World) -> None:
    world.cluster.nodes, world.waiting = 8, 5.0
    world.run(2)
    (good,) = world.names
    world.states, world.state, world.waiting, world.busy = {good: "here"}, "refused", 1e6, {good}
    world.run(3000)
    assert world.cluster.made < 8 + 16
    made = world.cluster.made
    world.run(600)
    assert world.cluster.made - made <= 3


def test_a_node_that_offers_more_than_one_is_no_reason_to_ask_again_and_again(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.waiting = 5.0
    for _ in range(300):
        world.cluster.doubled = bool(world.cluster.all)
        world.cluster.all.clear()
        world.run(1)
    assert world.cluster.made < 12
    assert "offers more than one" in caplog.text
