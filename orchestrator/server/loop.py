"""The orchestrator's loop: take what has come, decide, commit, then answer.

One thread. All messages that wait are handled before one commit, so a busy stack pays for few;
nothing is promised before the commit that it depends on. Whatever a peer sends, the loop goes on.
"""

import contextlib
import errno
import logging
import math
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from types import FrameType

import zmq

from orchestrator.access import AllowedKeys, KeyFolder
from orchestrator.dispatch.describer_link import DescriberLink
from orchestrator.dispatch.engine import Engine
from orchestrator.dispatch.fleet import Worker
from orchestrator.dispatch.outbox import Letter, Outbox
from orchestrator.memory.ledger import Account
from orchestrator.removal import Ground
from orchestrator.server.client_requests import MOST_FORGOTTEN, Desk, Peer, error_message
from orchestrator.server.sockets import Sockets
from orchestrator.settings import OrchestratorSettings
from orchestrator.state_folder import StackFolder
from orchestrator.storage.job_store import Store
from protocol import wire
from protocol.client.endpoints import PUBLISHED, Endpoints
from protocol.errors import StateUnusable, TriptychError
from protocol.gpu_memory import GpuId
from protocol.messages.client import FROM_CLIENT
from protocol.messages.common import Beat, Error, Heartbeat, Welcome
from protocol.messages.describer import FROM_DESCRIBER, DescriberHello, TokenCounts
from protocol.messages.supervisor import FROM_SUPERVISOR, Processes, SupervisorHello
from protocol.messages.worker import (
    FROM_WORKER,
    Leased,
    Progress,
    Ready,
    Result,
    TaskFailed,
    WorkerGoodbye,
    WorkerHello,
)
from protocol.tensors import Buffer

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 0.5
KEEP_HOUSE_SECONDS = 60.0
LOOK_SECONDS = 1.0
BACKUP_SECONDS = 3600.0
HOST = socket.gethostname()


class Server:
    def __init__(
        self,
        folder: StackFolder,
        endpoints: Endpoints,
        settings: OrchestratorSettings,
        accounts: Mapping[GpuId, Account],
    ) -> None:
        self.folder = folder
        self.outbox = Outbox()
        self.settings = settings
        self.store = Store(folder.database if settings.keep else None, folder.artifacts)
        self.engine = Engine(self.store, self.outbox, settings, accounts, folder.artifacts)
        self.describer_link = DescriberLink(self.outbox, self.engine.admission, settings.describer)
        self.desk = Desk(self.engine, self.describer_link)
        keys = KeyFolder(folder.keys)
        self._doors = Sockets(endpoints, settings.remote(), keys.server() if keys.exists else None, AllowedKeys(keys))
        self._stopping = False
        self._kept_house = self._backed_up = self._looked_down = 0.0  # monotonic seconds
        local = [Path(endpoint.removeprefix("ipc://")) for endpoint in astuple(self._doors.local)]
        self._ground = Ground([*([folder.database] if settings.keep else []), *local])
        self._epoch = time.time() - time.monotonic()  # a clock that is set anew must not make jobs old

    def stop(self, signal_number: int, frame: FrameType | None) -> None:
        self._stopping = True

    def run(self) -> None:
        self.folder.publish(self._doors.local, dict(self._doors.remote))
        for endpoint in (*astuple(self._doors.local), *(endpoint for _, endpoint in self._doors.remote)):
            log.info("listening at %s", endpoint)
        try:
            while not self._stopping:
                self._doors.wait(self._pause())
                self._shut_out()
                self._doors.take(self._from_client, self._from_worker)
                self._notice_silence()
                self.desk.start_anew(self.engine.to_restart)
                self.desk.roll()
                self._settle()
                self._look_down()
                self._keep_house()
        finally:
            self._close()

    def _pause(self) -> int:
        """Milliseconds until there is something to do without a message."""
        due = self.engine.next_due()
        left = HEARTBEAT_SECONDS if due is None else min(HEARTBEAT_SECONDS, max(0.0, due - time.monotonic()))
        return math.ceil(left * 1000)

    def _shut_out(self) -> None:
        """Those whose keys were revoked get nothing more, and their word counts for nothing."""
        for peer in self._doors.shut_out():
            self.engine.subscriptions.forget_client(peer)
            if worker := self.engine.fleet.workers.get(peer):
                log.warning("the key of %s was revoked", worker.hello.name)
                self.engine.lose_worker(worker, "lost its key")

    def _settle(self) -> None:
        """Commit, then send. Tasks alone go first: they promise nothing, and their workers need not wait for a disk."""
        self.engine.assign()
        for letter in self.outbox.drain_tasks():
            self._post(letter)
        self.store.commit()
        for letter in self.outbox.drain():
            self._post(letter)

    def _post(self, letter: Letter) -> None:
        try:
            self._doors.send(letter.identity, wire.encode(letter.message, letter.tensors))
        except zmq.ZMQError as error:
            if error.errno not in (errno.EHOSTUNREACH, errno.EAGAIN):
                raise
            self._unreachable(letter)

    def _unreachable(self, letter: Letter) -> None:
        """A client that is gone or doesn't read asks again if it cares; a worker that is gone loses its task."""
        if not letter.to_worker:
            self.engine.subscriptions.forget_client(letter.identity)
        elif worker := self.engine.fleet.workers.get(letter.identity):
            log.warning("%s can't be reached", worker.hello.name)
            self.engine.lose_worker(worker, "could not be reached")
        elif letter.identity == self.desk.supervisor:
            self.desk.supervisor = None

    def _notice_silence(self) -> None:
        """Who says nothing, or says that all is well and comes no further, is ended by force."""
        for worker in self.engine.fleet.silent():
            self._give_up(worker, "fell silent")
        if pid := self.describer_link.silent():
            self.desk.kill(pid, "fell silent")
        for worker, seconds in self.engine.pace.overdue(self.engine.fleet):
            self._give_up(worker, f"came no further for {seconds:.0f} s")

    def _give_up(self, worker: Worker, reason: str) -> None:
        log.warning("%s %s", worker.hello.name, reason)
        self.engine.lose_worker(worker, reason)
        if worker.hello.host == HOST:
            self.desk.kill(worker.hello.pid, reason)

    def _look_down(self) -> None:
        """Once a second: where the ground was removed beneath it, save what can be saved, and begin anew."""
        now = time.monotonic()
        if now - self._looked_down < LOOK_SECONDS:
            return
        self._looked_down = now
        if not (self.folder.path / PUBLISHED).exists():
            self.folder.make_parts()
            self.folder.publish(self._doors.local, dict(self._doors.remote))
        if gone := self._ground.gone():
            if self.folder.database in gone:
                self.folder.make_parts()
                self.store.write_anew()
            names = ", ".join(str(path) for path in gone)
            raise StateUnusable(f"Somebody has removed {names}.", "It is made again.")

    def _keep_house(self) -> None:
        """Now and then: let go of old jobs, and keep a copy of the others."""
        now = time.monotonic()
        if now - self._kept_house < KEEP_HOUSE_SECONDS:
            return
        self._kept_house = now
        if self.settings.keep_jobs is not None:
            gone = self.engine.forget_old(self._epoch + now - self.settings.keep_jobs, MOST_FORGOTTEN)
            if gone:
                self.store.reclaim()
        if self.settings.keep and now - self._backed_up >= BACKUP_SECONDS:
            self._backed_up = now
            self._back_up()

    def _back_up(self) -> None:
        try:
            self.store.back_up(self.folder.backup)
        except (StateUnusable, OSError) as error:
            log.error("no backup could be made: %s", error)

    # -- clients --------------------------------------------------------------------------------

    def _from_client(self, client: bytes, owner: str, frames: list[Buffer]) -> None:
        try:
            question = wire.decode(frames, FROM_CLIENT).message
            self.desk.answer(Peer(client, owner), question)
        except StateUnusable:
            raise
        except TriptychError as error:
            self.outbox.to_client(client, error_message(error))
        except Exception:  # whatever a peer sends, the others go on
            log.exception("a client's question could not be answered")
            self.outbox.to_client(client, Error(code="error", message="The orchestrator failed at this question."))

    # -- workers and the supervisor -------------------------------------------------------------

    def _from_worker(self, identity: bytes, key: str, frames: list[Buffer]) -> None:
        try:
            envelope = wire.decode(frames, FROM_WORKER if key else FROM_WORKER + FROM_SUPERVISOR + FROM_DESCRIBER)
            self._take(identity, envelope)
        except StateUnusable:
            raise
        except TriptychError as error:
            self.outbox.to_worker(identity, error_message(error))
        except Exception:
            log.exception("a worker's message could not be handled")
            if worker := self.engine.fleet.workers.get(identity):
                self.engine.lose_worker(worker, "sent what could not be handled")

    def _take(self, identity: bytes, envelope: wire.Envelope) -> None:
        engine = self.engine
        match envelope.message:
            case WorkerHello() as worker_hello:
                self._welcome(identity, worker_hello)
                return
            case SupervisorHello():
                self.desk.supervisor = identity
                proven = [w.hello.pid for w in engine.fleet if w.hello.host == HOST and w.proven]
                proven += [self.describer_link.pid] if self.describer_link.pid else []
                self.outbox.to_worker(identity, Beat(proven=tuple(proven)))
                return
            case DescriberHello() as hello:
                self.describer_link.hello(identity, hello)
                log.info("%s is whole: %s", hello.model.model, hello.model.pipeline)
                self.outbox.to_worker(identity, Welcome(heartbeat_seconds=HEARTBEAT_SECONDS))
                self.desk.unpark()
                return
            case TokenCounts() as counts if self.describer_link.is_here(identity):
                self.describer_link.counted(counts)
                self.desk.unpark()
                return
            case Heartbeat() if self.describer_link.is_here(identity):
                self.outbox.to_worker(identity, Beat())
                return
            case Processes(processes=processes, exited_pids=pids, stopped_pids=stopped) if (
                identity == self.desk.supervisor
            ):
                self.desk.processes = processes
                self._bury(pids, stopped)
                return
        worker = engine.fleet.get(identity)
        if worker is None:
            self.outbox.to_worker(identity, Error(code="not_found", message="This worker has not said hello."))
            return
        match envelope.message:
            case Ready() as ready:
                engine.ready(worker, ready)
            case Leased() as leased:
                engine.leased(worker, leased)
            case Heartbeat() as beat:
                engine.fleet.beat(worker, beat)
                self.outbox.to_worker(identity, Beat())
            case Progress() as task:
                engine.progress(worker, task, envelope.tensors)
            case Result() as result:
                engine.result(worker, result, envelope.tensors)
            case TaskFailed() as failure:
                engine.failed(worker, failure)
            case WorkerGoodbye():
                engine.dismiss_worker(worker)

    def _welcome(self, identity: bytes, hello: WorkerHello) -> None:
        if identity in self.engine.fleet.workers:
            self.outbox.to_worker(identity, Error(code="conflict", message="This worker has said hello already."))
            return
        if not self.settings.describer:
            self.engine.admission.learn_model(hello)
        for old in self.engine.fleet.of_process(hello.host, hello.pid):
            if old.hello.part != hello.part:
                continue
            self.engine.dismiss_worker(old)  # which has lost its link, and says next what it has in hand
        self.engine.leasing.buried(hello.host, hello.pid)  # the same process again, which tells what it holds
        worker = self.engine.fleet.hello(identity, hello)
        log.info("%s joined: %s on %s, process %d", hello.name, hello.stage, hello.device, hello.pid)
        self.outbox.to_worker(worker.identity, Welcome(heartbeat_seconds=HEARTBEAT_SECONDS))
        self.desk.unpark()

    def _bury(self, pids: Sequence[int], stopped: Sequence[int]) -> None:
        """The supervisor saw these processes end: their tasks need not wait for silence."""
        for pid in pids:
            for worker in self.engine.fleet.of_process(HOST, pid):
                self.engine.bury(worker, blameless=pid in stopped)
            self.engine.leasing.buried(HOST, pid)
            self.describer_link.gone(pid)

    def _close(self) -> None:
        self.folder.withdraw()
        with contextlib.suppress(StateUnusable):  # it has been said, and what was not committed was promised to nobody
            self.store.close()
        self._doors.close()
        log.info("stopped")
