"""Messages of workers, the describer and the supervisor, and what is done where they fall silent."""

import logging
import time
from collections.abc import Callable, Sequence

from orchestrator.dispatch.describer_link import DescriberLink, DescriberLinks
from orchestrator.dispatch.engine import Engine
from orchestrator.dispatch.fleet import Worker
from orchestrator.job import ModelKey
from orchestrator.principal import Host, KeyHolder, LocalUser, Principal
from orchestrator.server.client_requests import ClientRequests, error_message
from orchestrator.server.door_sockets import behind_a_door
from orchestrator.server.host_links import HOST, HostLinks
from orchestrator.server.model_rests import ModelRests
from orchestrator.server.supervisor_link import SupervisorLink
from protocol import wire
from protocol.errors import StateUnusable, TriptychError
from protocol.messages.common import Beat, Error, Heartbeat, Message, Welcome
from protocol.messages.describer import FROM_DESCRIBER, DescriberHello, FoundLora, KnownLoras, Looked, TokenCounts
from protocol.messages.host import FROM_HOST
from protocol.messages.supervisor import FROM_SUPERVISOR, EndHosts, HostPlanned, ModelAdded, Processes, SupervisorHello
from protocol.messages.worker import (
    FROM_WORKER,
    FetchLora,
    Leased,
    Lent,
    LoraPart,
    Part,
    PreviewFit,
    Progress,
    Ready,
    Result,
    TaskFailed,
    WorkerGoodbye,
    WorkerHello,
)
from protocol.tensors import Buffer, Tensor

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 0.5
BESIDE_AN_AGENT = 2.5  # the same of a host's workers, for which the host's agent gives a sign of life each second
LOOK_SECONDS = 0.25  # between two looks for silent workers: their cost is that of the time, not of what workers say
HERE = ("", HOST)  # the beginning of a ProcessId of this host's user
FROM_LOCAL = FROM_WORKER + FROM_SUPERVISOR + FROM_DESCRIBER


class WorkerRequests:
    def __init__(
        self,
        engine: Engine,
        describers: DescriberLinks,
        supervisor: SupervisorLink,
        clients: ClientRequests,
        rests: ModelRests,
        hosts: HostLinks,
        door_pids: Callable[[], Sequence[int]],
        lora_part: Callable[[str, int], tuple[int, bytes]] = lambda digest, offset: (0, b""),
    ) -> None:
        """`lora_part` gives how many bytes a LoRA's file has, 0 if it is gone, and some of them from an offset on."""
        self._door_pids, self._lora_part, self._rests, self._hosts = door_pids, lora_part, rests, hosts
        self._looked = 0.0  # monotonic seconds
        self._engine, self._describers, self._supervisor, self._clients = engine, describers, supervisor, clients

    def handle(self, identity: bytes, peer: Principal, frames: list[Buffer]) -> None:
        """Do what a message wants; whatever it is, the others go on."""
        try:
            envelope = wire.decode(frames, taken_from(peer))
            if not (isinstance(peer, Host) and self._hosts.handle(identity, peer.name, envelope.message)):
                self._take(identity, peer, envelope)
        except StateUnusable:
            raise
        except TriptychError as error:
            self._answer(identity, error_message(error))
        except Exception:
            log.exception("a worker's message could not be handled")
            if worker := self._engine.fleet.workers.get(identity):
                self._engine.lose_worker(worker, "sent what could not be handled")

    def _answer(self, identity: bytes, message: Message) -> None:
        self._engine.outbox.to_worker(identity, message)

    def _take(self, identity: bytes, peer: Principal, envelope: wire.Envelope) -> None:
        match envelope.message:
            case WorkerHello() as worker_hello:
                self._welcome(identity, peer, worker_hello)
            case SupervisorHello():
                if self._supervisor.hello(identity):
                    self._hosts.supervisor_came()
                self._answer(identity, Beat(proven=self._proven()))
            case DescriberHello() as hello:
                self._describers.hello(identity, hello)
                log.info("%s is whole: %s", hello.model.model, hello.model.pipeline)
                self._answer(identity, Welcome(heartbeat_seconds=HEARTBEAT_SECONDS))
                self._clients.unpark()
            case message if (link := self._describers.here(identity)) is not None:
                self._from_describer(link, message)
            case Processes() as processes if self._supervisor.is_here(identity):
                self._supervisor.keeps(processes)
                self._rests.told(processes.resting)
                self._bury(processes.exited_pids, processes.stopped_pids)
            case HostPlanned() as plan if self._supervisor.is_here(identity):
                self._hosts.planned(plan)
            case EndHosts() if self._supervisor.is_here(identity):
                self._hosts.end()
            case ModelAdded() as added if self._supervisor.is_here(identity):
                self._clients.model_added(added)
            case _:
                self._from_worker(identity, envelope)

    def _from_describer(self, link: DescriberLink, message: Message) -> None:
        match message:
            case TokenCounts() as counts:
                link.counted(counts)
            case Looked() as looked:
                link.looked(looked)
            case FoundLora() as found:
                link.found_lora(found)
            case KnownLoras() as known:
                link.listed_loras(known)
            case Heartbeat():
                self._answer(link.identity, Beat())
                return
        self._clients.unpark()

    def _from_worker(self, identity: bytes, envelope: wire.Envelope) -> None:
        engine = self._engine
        worker = engine.fleet.get(identity)
        if worker is None:
            self._answer(identity, Error(code="not_found", message="This worker has not said hello."))
            return
        match envelope.message:
            case Ready() as ready:
                engine.ready(worker, ready)
            case Leased() as leased:
                engine.leased(worker, leased)
            case Lent() as lent:
                engine.lent(worker, lent)
            case Heartbeat() as beat:
                engine.fleet.beat(worker, beat)
                self._answer(identity, Beat())
            case Progress() as task:
                engine.progress(worker, task, envelope.tensors)
            case PreviewFit() as fit:
                engine.preview_fit(worker, fit, envelope.tensors)
            case Part() as part:
                engine.part(worker, part, envelope.tensors)
            case Result() as result:
                engine.result(worker, result, envelope.tensors)
            case TaskFailed() as failure:
                engine.failed(worker, failure)
            case FetchLora(digest=digest, offset=offset):
                self._send_lora(worker, digest, offset)
            case WorkerGoodbye():
                if worker.task:
                    engine.fleet.trust.failed(worker.principal)
                engine.dismiss_worker(worker)

    def _send_lora(self, worker: Worker, digest: str, offset: int) -> None:
        """Send a part of the file of a LoRA that a worker's task names."""
        job = self._engine.job_queue.jobs.get(worker.task.job) if worker.task else None
        size, data = 0, b""
        if job and any(lora.digest == digest for lora in job.recipe.loras):
            size, data = self._lora_part(digest, offset)
            worker.moved = time.monotonic()  # it comes nearer to its first step
        tensors = (Tensor("part", "uint8", (len(data),), data),) if data else ()
        part = LoraPart(digest=digest, offset=offset, bytes=size)
        self._engine.outbox.to_worker(worker.identity, part, tensors)

    def _welcome(self, identity: bytes, peer: Principal, hello: WorkerHello) -> None:
        """Take in a worker. What a key's holder says of itself displaces nobody but that key's own workers."""
        engine = self._engine
        if identity in engine.fleet.workers:
            self._answer(identity, Error(code="conflict", message="This worker has said hello already."))
            return
        if isinstance(peer, Host) and not hello.name.endswith(f"@{peer.name}"):
            self._answer(
                identity, Error(code="protocol", message=f"{hello.name!r} is no name of a worker on {peer.name}.")
            )
            return
        if isinstance(peer, Host) and not self._hosts.knows_gpus(peer.name, hello.gpus):
            return  # it says hello again, and is taken once its host's plan is here
        if not engine.settings.describer and not isinstance(peer, KeyHolder):
            engine.catalogue.learn(hello)
        elif isinstance(peer, LocalUser):
            self._notice_change(hello)
        worker = engine.fleet.hello(identity, hello, peer)
        for old in engine.fleet.of_process(worker.process):
            if old is not worker and old.hello.part == hello.part:
                worker.owes = old.task is not None
                engine.dismiss_worker(old)  # which has lost its link, and names its task next
        engine.leasing.buried(worker.process)  # the same process again, which tells what it holds
        log.info("%s joined: %s on %s, process %d", hello.name, hello.stage, hello.device, hello.pid)
        pause = BESIDE_AN_AGENT if isinstance(peer, Host) else HEARTBEAT_SECONDS
        self._answer(identity, Welcome(heartbeat_seconds=pause))
        self._clients.unpark()

    def _notice_change(self, hello: WorkerHello) -> None:
        """Have a model described anew whose files have changed since: jobs that were accepted for them fail.

        It is known by its worker, which has another revision than its describer has told of.
        """
        catalogue = self._engine.catalogue
        if catalogue.of(ModelKey.of_worker(hello)) or len(catalogue.entries) < len(catalogue.models):
            return
        told = (hello.model.model, hello.dtype, hello.speedups)
        for entry in catalogue.entries:
            if (entry.description.model, entry.dtype, entry.speedups) == told:
                reason = f"the files of {entry.name} have changed since it was accepted; submit it again"
                self._engine.fail_waiting(entry.key, reason)
                if pid := self._describers.of(entry.name).pid:
                    self._supervisor.kill(pid, "the model's files have changed")

    def _proven(self) -> tuple[int, ...]:
        """Processes of this host that work."""
        pids = [worker.hello.pid for worker in self._engine.fleet if worker.process[:2] == HERE and worker.proven]
        describers = [link.pid for link in self._describers if link.pid]
        return (*pids, *describers, *self._door_pids())

    # -- those that are gone --------------------------------------------------------------------

    def _bury(self, pids: Sequence[int], stopped: Sequence[int]) -> None:
        """Take out the workers of processes that the supervisor saw end: their tasks need not wait for silence."""
        for pid in pids:
            self._engine.bury_process(HOST, pid, blameless=pid in stopped)
            self._describers.gone(pid)

    def unreachable(self, identity: bytes) -> None:
        """Count a peer as gone that a message could not be sent to: a worker that is gone loses its task."""
        if worker := self._engine.fleet.workers.get(identity):
            log.warning("%s can't be reached", worker.hello.name)
            self._engine.lose_worker(worker, "could not be reached")
        elif self._supervisor.is_here(identity):
            self._supervisor.gone()

    def begin_anew(self) -> None:
        """Let workers behind a door say anew what they are and have: what they said last may be lost."""
        for worker in [worker for worker in self._engine.fleet if behind_a_door(worker.identity)]:
            self._engine.dismiss_worker(worker)
        self._engine.dispatch.hold()

    def shut_out(self, identity: bytes) -> None:
        """Take out a worker whose key was revoked."""
        if worker := self._engine.fleet.workers.get(identity):
            log.warning("the key of %s was revoked", worker.hello.name)
            self._engine.lose_worker(worker, "lost its key")

    def let_go(self, principal: Principal) -> None:
        """Let go of a key's workers, which get no task for a while; their tasks wait again."""
        self._engine.fleet.trust.failed(principal)
        for worker in [worker for worker in self._engine.fleet if worker.principal == principal]:
            self._engine.dismiss_worker(worker)

    def notice_silence(self, heard_all: bool, heard_door: bool) -> None:
        """End by force what says nothing, or says that all is well and comes no further.

        Only those can be found silent whose words were all read: this machine's own, or those behind the door.
        """

        if (now := time.monotonic()) - self._looked < LOOK_SECONDS or not (heard_all or heard_door):
            return
        self._looked = now

        def heard(worker: Worker) -> bool:
            return heard_door if behind_a_door(worker.identity) else heard_all

        for worker in filter(heard, self._engine.fleet.silent(self._hosts.heard_since)):
            self._give_up(worker, "fell silent")
        for pid in filter(None, [link.silent() for link in self._describers]):
            self._supervisor.kill(pid, "fell silent")
        late = self._engine.deadlines.overdue(self._engine.fleet)
        for worker, seconds in ((worker, seconds) for worker, seconds in late if heard(worker)):
            self._give_up(worker, f"came no further for {seconds:.0f} s")

    def _give_up(self, worker: Worker, reason: str) -> None:
        log.warning("%s %s", worker.hello.name, reason)
        self._engine.lose_worker(worker, reason)
        if worker.process[:2] == HERE:
            self._supervisor.kill(worker.hello.pid, reason)
        elif isinstance(worker.principal, Host):
            self._hosts.kill(worker.host, worker.hello.pid, reason)


def taken_from(peer: Principal) -> tuple[type[Message], ...]:
    """Return the messages that are taken from a peer."""
    match peer:
        case LocalUser():
            return FROM_LOCAL
        case Host():
            return FROM_WORKER + FROM_HOST
        case KeyHolder():
            return FROM_WORKER
