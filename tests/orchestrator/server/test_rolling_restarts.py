"""Rolling restarts: one worker after the other, each once the one before is back."""

from dataclasses import dataclass, field

from orchestrator.dispatch.fleet import Fleet
from orchestrator.server.rolling_restarts import RollingRestarts
from protocol.views import ProcessView
from tests.orchestrator.dispatch.test_fleet import hello


def view(name: str, pid: int | None) -> ProcessView:
    return ProcessView(name=name, stage="denoise", pid=pid, state="running", restarts=0, reason="")


@dataclass
class World:
    processes: list[ProcessView]
    fleet: Fleet = field(default_factory=Fleet)
    restarted: list[str] = field(default_factory=list)
    nobody_keeps: set[str] = field(default_factory=set)

    def restarts(self) -> RollingRestarts:
        return RollingRestarts(self.fleet, lambda: self.processes, self.restart)

    def restart(self, name: str) -> bool:
        self.restarted.append(name)
        return name not in self.nobody_keeps


def test_workers_are_restarted_one_after_the_other() -> None:
    world = World([view("denoise-1", 1), view("denoise-2@box", 2)])
    restarts = world.restarts()
    restarts.stage("denoise")
    restarts.stage("denoise")  # twice is once
    restarts.roll()
    assert world.restarted == ["denoise-1"]
    restarts.roll()
    world.processes = [view("denoise-1", None), view("denoise-2@box", 2)]
    restarts.roll()
    world.processes = [view("denoise-1", 11), view("denoise-2@box", 2)]
    worker = world.fleet.hello(b"1", hello("denoise-1", pid=11))
    restarts.roll()
    assert world.restarted == ["denoise-1"]  # it is still loading
    world.fleet.ready(worker)
    restarts.roll()
    assert world.restarted == ["denoise-1", "denoise-2@box"]


def test_the_worker_that_is_to_go_does_not_count_as_back() -> None:
    world = World([view("denoise-1", 1), view("denoise-2", 2)])
    restarts = world.restarts()
    world.fleet.ready(world.fleet.hello(b"1", hello("denoise-1", pid=1)))
    restarts.stage("denoise")
    restarts.roll()
    restarts.roll()
    assert world.restarted == ["denoise-1"]  # it has not ended yet
    world.fleet.ready(world.fleet.hello(b"2", hello("denoise-1", pid=11)))
    restarts.roll()
    assert world.restarted == ["denoise-1", "denoise-2"]


def test_a_worker_that_is_gone_or_kept_by_nobody_holds_up_no_other() -> None:
    world = World([view("denoise-3", 3), view("denoise-2", 2)], nobody_keeps={"denoise-3"})
    restarts = world.restarts()
    restarts.add(["denoise-9", "denoise-3", "denoise-2"])
    restarts.roll()
    assert world.restarted == ["denoise-3", "denoise-2"]
