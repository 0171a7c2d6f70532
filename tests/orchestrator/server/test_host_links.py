"""Hosts as the orchestrator knows them: what agents say, and what they are told, again where it was lost."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.dispatch.engine import Engine
from orchestrator.dispatch.outbox import Outbox
from orchestrator.server.host_links import HOST, SILENCE_SECONDS, TAKEOVER_SECONDS, HostLinks
from orchestrator.server.supervisor_link import SupervisorLink
from orchestrator.settings import AccountSettings, OrchestratorSettings
from orchestrator.state_folder import StackFolder
from orchestrator.storage.job_store import Store
from protocol.errors import Conflict, NotFound
from protocol.gpu_memory import GpuId
from protocol.host import HostFacts, HostGpu
from protocol.messages.common import Error, Message, Welcome
from protocol.messages.host import HostEnds, HostGoodbye, HostHello, HostLog, HostStatus, HostWorkers
from protocol.messages.supervisor import HostJoined, HostPlanned
from protocol.views import ProcessView
from protocol.worker_spec import WorkerSpec

GPU = HostGpu(index=0, name="RTX", total_bytes=24 << 30, free_bytes=20 << 30)
FACTS = HostFacts(hostname="vm", version="1", versions="torch 2", memory_bytes=1 << 34, cores=4, gpus=(GPU,))
SPECS = (WorkerSpec(stage="denoise", name="denoise-1@box"), WorkerSpec(stage="vae", name="vae-1@box"))
AGENT, SUPERVISOR = b"a", b"s"


class World:
    def __init__(self, folder: Path) -> None:
        self.folder, self.outbox = StackFolder(folder), Outbox()
        self.folder.create()
        self.store = Store(self.folder.database, self.folder.artifacts)
        self.start()

    def start(self) -> None:
        """Be another orchestrator on the same state."""
        self.engine = Engine(self.store, self.outbox, OrchestratorSettings(), {}, self.folder.artifacts)
        self.supervisor = SupervisorLink(self.outbox)
        self.supervisor.hello(SUPERVISOR)
        self.links = HostLinks(self.engine, self.supervisor, self.folder)

    def say(self, message: Message, agent: bytes = AGENT, name: str = "box") -> None:
        assert self.links.handle(agent, name, message)

    def told(self, identity: bytes = AGENT) -> list[Message]:
        letters = [*self.outbox.drain_tasks(), *self.outbox.drain()]
        return [letter.message for letter in letters if letter.identity == identity]

    def join(self, gpus: tuple[int, ...] = (0,)) -> int:
        """Let a host come and be planned for; return the number of the word about its workers."""
        self.say(HostHello(facts=FACTS, pid=1))
        accounts = {index: AccountSettings(budget=16 << 30).model_dump(mode="json") for index in gpus}
        self.links.planned(HostPlanned(host="box", workers=SPECS, gpus=json.dumps(accounts)))
        (word,) = [message for message in self.told() if isinstance(message, HostWorkers)]
        return word.number

    @property
    def gpus(self) -> list[GpuId]:
        return sorted(self.engine.leasing.ledger.accounts)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    found = World(tmp_path / "state")
    yield found
    found.store.close()


def test_a_host_is_planned_for_and_told_its_workers(world: World) -> None:
    world.say(HostHello(facts=FACTS, pid=1))
    assert [type(message) for message in world.told()] == [Welcome]
    assert world.links.views()[0].state == "planning"
    world.links.supervisor_came()
    assert world.told(SUPERVISOR) == [HostJoined(host="box", facts=FACTS)]
    world.join()
    assert (world.links.views()[0].state, world.links.views()[0].workers) == ("here", 2)
    assert world.gpus == [GpuId("box", 0)]


def test_a_word_that_was_lost_is_said_again(world: World) -> None:
    number = world.join()
    world.say(HostStatus(heard=number))
    assert not [message for message in world.told() if isinstance(message, HostWorkers)]
    world.links.place("box", "drained")  # which is lost
    assert world.told()
    world.say(HostStatus(heard=number))
    (word,) = [message for message in world.told() if isinstance(message, HostWorkers)]
    assert (word.workers, word.number > number) == ((), True)
    world.links.end()
    world.say(HostStatus(heard=word.number))
    assert [type(message) for message in world.told() if isinstance(message, HostEnds)] == [HostEnds] * 2


def test_what_a_host_has_and_whether_it_is_drained_outlives_the_orchestrator(world: World) -> None:
    world.join()
    world.links.place("box", "cordoned")
    world.start()
    assert world.gpus == [GpuId("box", 0)]
    assert world.engine.fleet.cordoned == {"box"}
    world.links.forget_all_but(lambda name: False)  # its key is revoked
    assert (world.gpus, world.engine.fleet.cordoned, world.links.views()) == ([], set(), ())
    with pytest.raises(NotFound):
        world.links.place("box", "")


def test_gpus_that_are_gone_are_shut_and_a_goodbye_frees_all(world: World) -> None:
    world.join(gpus=(0, 1))
    assert world.gpus == [GpuId("box", 0), GpuId("box", 1)]
    world.join(gpus=(1,))
    assert world.gpus == [GpuId("box", 1)]
    world.say(HostGoodbye())
    assert (world.gpus, world.links.views()[0].state) == ([], "gone")
    world.say(HostStatus())
    assert [message.code for message in world.told() if isinstance(message, Error)] == ["not_found"]


def test_another_agent_takes_over_once_the_first_is_silent(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.join()
    world.say(HostHello(facts=FACTS, pid=2), agent=b"b")
    assert world.told(b"b") == []
    world.say(HostHello(facts=FACTS, pid=1), agent=b"c")  # the same one, over another link
    assert [type(message) for message in world.told(b"c")] == [Welcome]
    world.say(HostHello(facts=FACTS, pid=3, after=1), agent=b"d")  # which has the folder of the first, so that is gone
    assert [type(message) for message in world.told(b"d")] == [Welcome]
    world.say(HostHello(facts=FACTS.model_copy(update={"hostname": "far"}), pid=4, after=3), agent=b"e")
    assert world.told(b"e") == []
    (link,) = world.links
    link.heard -= TAKEOVER_SECONDS + 1
    world.say(HostHello(facts=FACTS, pid=2), agent=b"b")
    assert [type(message) for message in world.told(b"b")] == [Welcome]


def test_a_host_is_heard_from_its_hello_on_and_anew_after_a_silence(world: World) -> None:
    assert world.links.heard_since == {}
    world.say(HostHello(facts=FACTS, pid=1))  # not yet planned for
    first = world.links.heard_since["box"]
    world.say(HostStatus())
    assert world.links.heard_since == {"box": first}
    (link,) = world.links
    link.heard -= SILENCE_SECONDS + 1
    assert world.links.heard_since == {}
    world.say(HostStatus())
    assert world.links.heard_since["box"] > first


def test_a_host_speaks_for_itself_alone(world: World) -> None:
    with pytest.raises(Conflict, match="stack's own host"):
        world.links.handle(AGENT, HOST, HostHello(facts=FACTS, pid=1))
    number = world.join()
    mine, other = (
        ProcessView(name=name, stage="vae", pid=7, state="running", restarts=0, reason="")
        for name in ("vae-1@box", "vae-1")
    )
    world.say(HostStatus(processes=(mine, other), heard=number))
    assert world.links.processes == (mine,)
    for name in ("vae-1@box", "orchestrator", "../x"):
        world.say(HostLog(name=name, text="a line\n"))
    assert [path.name for path in world.folder.logs.iterdir()] == ["vae-1@box.log"]


def test_a_refused_host_keeps_its_reason(world: World) -> None:
    world.say(HostHello(facts=FACTS, pid=1))
    world.links.planned(HostPlanned(host="box", code="conflict", reason="another torch", hint="install it"))
    assert [message.message for message in world.told() if isinstance(message, Error)] == ["another torch"]
    world.say(HostGoodbye())
    assert (world.links.views()[0].state, world.links.views()[0].reason) == ("refused", "another torch")


def test_a_drivers_count_from_before_a_change_in_the_book_counts_for_nothing(world: World) -> None:
    number = world.join()
    ledger, gpu = world.engine.leasing.ledger, GpuId("box", 0)
    world.say(HostStatus(heard=number, used_bytes=(5 << 30,)))
    assert ledger.accounts[gpu].used() == 5 << 30
    (link,) = world.links
    ledger.touched[gpu] = link.told
    assert ledger.accounts[gpu].used() is None
