"""The orchestrator's loop: take what has come, decide, commit, then answer.

One thread. All messages that wait are handled before one commit, so a busy stack pays for few;
nothing is promised before the commit that it depends on. Whatever a peer sends, the loop goes on.
"""

import contextlib
import errno
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import astuple
from types import FrameType

import zmq

from orchestrator.access import AllowedKeys, KeyFolder
from orchestrator.dispatch.describer_link import DescriberLinks
from orchestrator.dispatch.engine import Engine
from orchestrator.dispatch.outbox import Letter, Outbox
from orchestrator.memory.ledger import Account
from orchestrator.principal import LOCAL_USER, Principal, name_of
from orchestrator.pulse import Pulse
from orchestrator.server.client_requests import ClientRequests
from orchestrator.server.host_links import HostLinks
from orchestrator.server.housekeeping import Housekeeping
from orchestrator.server.inbox import Inbox, Received
from orchestrator.server.lora_uploads import LoraUploads
from orchestrator.server.model_rests import ModelRests
from orchestrator.server.rolling_restarts import RollingRestarts
from orchestrator.server.sockets import Sockets
from orchestrator.server.supervisor_link import SupervisorLink
from orchestrator.server.worker_requests import HEARTBEAT_SECONDS, WorkerRequests
from orchestrator.settings import OrchestratorSettings
from orchestrator.state_folder import StackFolder
from orchestrator.storage.job_store import Store
from orchestrator.token_bucket import TokenBucket
from protocol import wire
from protocol.client.endpoints import Endpoints
from protocol.curve_keys import DoorRole
from protocol.errors import StateUnusable
from protocol.gpu_memory import GpuId

log = logging.getLogger(__name__)

TOLD_A_SECOND, TOLD_AT_ONCE = 1.0, 5.0  # refusals of questions that are let go, to one key
TURN_SECONDS = 0.02  # for clients and keys' holders, before this machine's workers are heard again
PROBE_SECONDS, PROBE_ROUNDS = 1.0, 10  # in so many looks, one a second, each client that watches is heard of


class Server:
    def __init__(
        self,
        folder: StackFolder,
        endpoints: Endpoints,
        settings: OrchestratorSettings,
        accounts: Mapping[GpuId, Account],
        doors: Mapping[DoorRole, str],
        guarded: bool = False,
    ) -> None:
        """`doors` are the private endpoints where doors for others come to, by role; with `guarded` they want keys."""
        self.folder = folder
        self.outbox = Outbox()
        self.store = Store(folder.database if settings.keep else None, folder.artifacts)
        keys = KeyFolder(folder.keys)
        allowed = self._allowed = AllowedKeys(keys)
        self.engine = Engine(self.store, self.outbox, settings, accounts, folder.artifacts, weight_of=allowed.weight)
        describers = DescriberLinks(self.outbox, self.engine.catalogue, settings.describer)
        self._supervisor = SupervisorLink(self.outbox)
        self._hosts = HostLinks(self.engine, self._supervisor, folder)
        self._restarts = RollingRestarts(
            self.engine.fleet,
            lambda: (*self._supervisor.processes, *self._hosts.processes),
            lambda name: self._hosts.restart(name) or self._supervisor.restart(name),
        )
        self._uploads = LoraUploads(folder.loras, settings.lora_cache, settings.disk_floor)
        self._rests = ModelRests(self.engine, self._supervisor)
        self._clients = ClientRequests(
            self.engine, describers, self._supervisor, self._hosts, self._restarts, self._uploads, self._rests
        )
        self._sockets = Sockets(endpoints, settings.remote(), doors, allowed if guarded else None)
        door_pids = self._sockets.doors.pids
        self._workers = WorkerRequests(
            self.engine,
            describers,
            self._supervisor,
            self._clients,
            self._rests,
            self._hosts,
            door_pids,
            self._uploads.part,
        )
        self._housekeeping = Housekeeping(folder, self.engine, self._sockets)
        self._inbox = Inbox(self._sockets.takes_answers)
        self._told: dict[Principal, TokenBucket] = {}  # those who were told that they ask too much
        self._probed = 0.0  # monotonic seconds
        self._pulse = Pulse.inherited()
        self._stopping = False

    def stop(self, signal_number: int, frame: FrameType | None) -> None:
        self._stopping = True

    def run(self) -> None:
        self._housekeeping.publish()
        for endpoint in astuple(self._sockets.local):
            log.info("listening at %s", endpoint)
        try:
            while not self._stopping:
                self._sockets.wait(self._pause())
                self._pulse.beat()
                self._shut_out()
                self._take()
                self._end_floods()
                self._replace(self.engine.dispatch.to_restart)
                self._restarts.roll()
                self._rests.let_rest(self.engine.dispatch.to_rest)
                self._rests.see_to_it()
                self._probe()
                self._settle()
                self._sockets.counted.tell()
                self._housekeeping.see_to_it()
        finally:
            self._close()

    def _replace(self, names: list[str]) -> None:
        """Have workers replaced, one after the other, once there is a supervisor; the list is emptied then."""
        if self._supervisor.there:
            self._restarts.add(names)
            names.clear()

    def _pause(self) -> int:
        """Milliseconds until there is something to do without a message."""
        due, waiting = self.engine.dispatch.next_due(), self._inbox.next_due()
        left = HEARTBEAT_SECONDS if due is None else min(HEARTBEAT_SECONDS, max(0.0, due - time.monotonic()))
        return math.ceil((left if waiting is None else min(left, waiting)) * 1000)

    def _take(self) -> None:
        """Handle what this machine's workers and supervisor say, then for a moment what all others do, in turns.

        Silent is who has said nothing, not who was not yet heard.
        """
        for received in self._sockets.received("worker", takes=lambda: True):
            self._workers.handle(received.peer, received.principal, received.frames)
        for received in self._sockets.doors.received("worker", takes=self._inbox.has_room):
            self.engine.fleet.get(received.peer)  # it is a sign of life, however long it waits
            self._let_wait(received)
        heard_all, heard_door = self._sockets.heard_all, self._sockets.doors.heard_all
        for received in self._sockets.received("client", takes=lambda: not self._inbox.full(LOCAL_USER)):
            self._let_wait(received)
        for received in self._sockets.doors.received("client", takes=lambda: True):
            self._let_wait(received)
        self._inbox.serve(self._handle, TURN_SECONDS)
        self._workers.notice_silence(heard_all, heard_door)

    def _end_floods(self) -> None:
        """Let go of keys' workers that say more than can be heard, and of doors that say nothing."""
        for principal in self._inbox.floods():
            self._sockets.counted.warn(f"the workers of {name_of(principal)} say more than can be heard")
            self._workers.let_go(principal)
        for pid in self._sockets.doors.silent():
            self._supervisor.kill(pid, "fell silent")

    def _let_wait(self, received: Received) -> None:
        if not self._inbox.put(received):
            name = name_of(received.principal)
            self._sockets.counted.warn(f"{name} sends more than it is answered in its turn, which is let go")
            told = self._told.setdefault(received.principal, TokenBucket(TOLD_A_SECOND, TOLD_AT_ONCE))
            if received.role == "client" and told.take():
                self._clients.refuse(received.peer, received.frames)

    def _handle(self, received: Received) -> None:
        handler = self._workers if received.role == "worker" else self._clients
        handler.handle(received.peer, received.principal, received.frames)

    def _shut_out(self) -> None:
        """Shut out peers whose keys were revoked: they get nothing more, and their word counts for nothing."""
        for peer in self._sockets.doors.shut_out():
            self._forget_client(peer)
            self._workers.shut_out(peer)
        for peer in self._sockets.doors.gone():
            self._forget_client(peer)
            self._workers.unreachable(peer)
        if "worker" in self._sockets.doors.lost():
            self._workers.begin_anew()

    def _forget_client(self, peer: bytes) -> None:
        """Let go of all that is kept for a client that is gone, or doesn't read; it asks again if it cares."""
        self.engine.subscriptions.forget_client(peer)
        self._clients.forget(peer)
        self._inbox.forget(peer)

    def _probe(self) -> None:
        """Tell some of those who watch jobs how one stands, to find out who is gone without a word."""
        now = time.monotonic()
        if now - self._probed < PROBE_SECONDS:
            return
        self._probed = now
        self._uploads.end_idle()
        self._hosts.forget_all_but(self._allowed.is_host)
        for client, job_id in self.engine.subscriptions.probe(PROBE_ROUNDS):
            job, known_as = self.engine.job_queue.jobs.get(job_id), self.engine.subscriptions.of(job_id).get(client)
            if job and known_as:
                self.outbox.to_client(client, self.engine.event(job, known_as))

    def _settle(self) -> None:
        """Commit, then send. Tasks alone go first: they promise nothing, and their workers need not wait for a disk."""
        self.engine.assign()
        for letter in self.outbox.drain_tasks():
            self._post(letter)
        self.store.commit()
        for letter in self.outbox.drain():
            self._post(letter)

    def _post(self, letter: Letter) -> None:
        begun = time.monotonic()
        try:
            self._sockets.send(letter.identity, wire.encode(letter.message, letter.tensors))
            if not letter.to_worker and (principal := self._sockets.principal_of(letter.identity)) is not None:
                self._inbox.spend(principal, time.monotonic() - begun)
        except zmq.ZMQError as error:
            if error.errno not in (errno.EHOSTUNREACH, errno.EAGAIN):
                raise
            if letter.to_worker:
                self._workers.unreachable(letter.identity)
            else:
                self._forget_client(letter.identity)

    def _close(self) -> None:
        self.folder.withdraw()
        self._uploads.close()
        with contextlib.suppress(StateUnusable):  # it has been said, and what was not committed was promised to nobody
            self.store.close()
        self._sockets.close()
        log.info("stopped")
