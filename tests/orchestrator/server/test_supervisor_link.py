"""Rolling restarts: one worker after the other, each once the one before is back."""

import pytest

from orchestrator.dispatch.fleet import Fleet
from orchestrator.dispatch.outbox import Outbox
from orchestrator.server.supervisor_link import SupervisorLink
from protocol.errors import NotFound
from protocol.messages.supervisor import KillProcess, Processes, RestartProcess, SetScale
from protocol.views import ProcessView
from tests.orchestrator.dispatch.test_fleet import hello


def view(name: str, pid: int | None) -> ProcessView:
    return ProcessView(name=name, stage="denoise", pid=pid, state="running", restarts=0, reason="")


def told(outbox: Outbox) -> list[object]:
    return [letter.message for letter in outbox.drain()]


def test_workers_are_restarted_one_after_the_other() -> None:
    outbox, fleet = Outbox(), Fleet()
    link = SupervisorLink(outbox, fleet)
    link.hello(b"s")
    link.keeps(Processes(processes=(view("denoise-1", 1), view("denoise-2", 2))))
    link.restart("denoise")
    link.restart("denoise")  # twice is once
    link.roll()
    assert told(outbox) == [RestartProcess(name="denoise-1")]
    link.roll()
    link.keeps(Processes(processes=(view("denoise-1", None), view("denoise-2", 2))))
    link.roll()
    link.keeps(Processes(processes=(view("denoise-1", 11), view("denoise-2", 2))))
    worker = fleet.hello(b"1", hello("denoise-1", pid=11))
    link.roll()
    assert told(outbox) == []  # it is still loading
    fleet.ready(worker)
    link.roll()
    assert told(outbox) == [RestartProcess(name="denoise-2")]


def test_the_worker_that_is_to_go_does_not_count_as_back() -> None:
    outbox, fleet = Outbox(), Fleet()
    link = SupervisorLink(outbox, fleet)
    link.hello(b"s")
    link.keeps(Processes(processes=(view("denoise-1", 1), view("denoise-2", 2))))
    fleet.ready(fleet.hello(b"1", hello("denoise-1", pid=1)))
    link.restart("denoise")
    link.roll()
    assert told(outbox) == [RestartProcess(name="denoise-1")]
    link.roll()
    assert told(outbox) == []  # it has not ended yet
    fleet.ready(fleet.hello(b"2", hello("denoise-1", pid=11)))
    link.roll()
    assert told(outbox) == [RestartProcess(name="denoise-2")]


def test_a_worker_that_is_gone_holds_up_no_other() -> None:
    outbox = Outbox()
    link = SupervisorLink(outbox, Fleet())
    names = ["denoise-9", "denoise-2"]
    link.replace(names)
    assert names == ["denoise-9", "denoise-2"]  # it waits for a supervisor
    link.hello(b"s")
    link.keeps(Processes(processes=(view("denoise-2", 2),)))
    link.replace(names)
    link.roll()
    assert names == []
    assert told(outbox) == [RestartProcess(name="denoise-2")]


def test_without_a_supervisor_it_is_said_and_nothing_is_sent() -> None:
    outbox = Outbox()
    link = SupervisorLink(outbox, Fleet())
    with pytest.raises(NotFound, match="without a supervisor"):
        link.check("text")
    link.kill(1, "why")
    assert told(outbox) == []
    link.hello(b"s")
    link.check("text")
    link.scale("m", "text", 2)
    link.kill(1, "why")
    assert told(outbox) == [SetScale(model="m", stage="text", count=2), KillProcess(pid=1, reason="why")]
    link.gone()
    assert not link.is_here(b"s")
