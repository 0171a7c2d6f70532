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
from orchestrator.dispatch.describer_link import DescriberLink
from orchestrator.dispatch.engine import Engine
from orchestrator.dispatch.outbox import Letter, Outbox
from orchestrator.memory.ledger import Account
from orchestrator.server.client_requests import ClientRequests
from orchestrator.server.housekeeping import Housekeeping
from orchestrator.server.sockets import Sockets
from orchestrator.server.supervisor_link import SupervisorLink
from orchestrator.server.worker_requests import HEARTBEAT_SECONDS, WorkerRequests
from orchestrator.settings import OrchestratorSettings
from orchestrator.state_folder import StackFolder
from orchestrator.storage.job_store import Store
from protocol import wire
from protocol.client.endpoints import Endpoints
from protocol.errors import StateUnusable
from protocol.gpu_memory import GpuId

log = logging.getLogger(__name__)


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
        self.store = Store(folder.database if settings.keep else None, folder.artifacts)
        keys = KeyFolder(folder.keys)
        own_key = keys.server() if keys.exists else None
        allowed = AllowedKeys(keys)
        self.engine = Engine(self.store, self.outbox, settings, accounts, folder.artifacts, weight_of=allowed.weight)
        describer = DescriberLink(self.outbox, self.engine.catalogue, settings.describer)
        self._supervisor = SupervisorLink(self.outbox, self.engine.fleet)
        self._clients = ClientRequests(self.engine, describer, self._supervisor)
        self._workers = WorkerRequests(self.engine, describer, self._supervisor, self._clients)
        self._sockets = Sockets(endpoints, settings.remote(), own_key, allowed)
        remote: dict[str, str] = {**dict(self._sockets.remote)}
        self._housekeeping = Housekeeping(folder, self.engine, self._sockets.local, remote)
        self._stopping = False

    def stop(self, signal_number: int, frame: FrameType | None) -> None:
        self._stopping = True

    def run(self) -> None:
        self._housekeeping.publish()
        for endpoint in (*astuple(self._sockets.local), *(endpoint for _, endpoint in self._sockets.remote)):
            log.info("listening at %s", endpoint)
        try:
            while not self._stopping:
                self._sockets.wait(self._pause())
                self._shut_out()
                self._sockets.take(self._clients.handle, self._workers.handle)
                self._workers.notice_silence()
                self._supervisor.replace(self.engine.dispatch.to_restart)
                self._supervisor.roll()
                self._settle()
                self._housekeeping.see_to_it()
        finally:
            self._close()

    def _pause(self) -> int:
        """Milliseconds until there is something to do without a message."""
        due = self.engine.dispatch.next_due()
        left = HEARTBEAT_SECONDS if due is None else min(HEARTBEAT_SECONDS, max(0.0, due - time.monotonic()))
        return math.ceil(left * 1000)

    def _shut_out(self) -> None:
        """Shut out peers whose keys were revoked: they get nothing more, and their word counts for nothing."""
        for peer in self._sockets.shut_out():
            self.engine.subscriptions.forget_client(peer)
            self._workers.shut_out(peer)

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
            self._sockets.send(letter.identity, wire.encode(letter.message, letter.tensors))
        except zmq.ZMQError as error:
            if error.errno not in (errno.EHOSTUNREACH, errno.EAGAIN):
                raise
            if letter.to_worker:
                self._workers.unreachable(letter.identity)
            else:  # a client that is gone or doesn't read asks again if it cares
                self.engine.subscriptions.forget_client(letter.identity)

    def _close(self) -> None:
        self.folder.withdraw()
        with contextlib.suppress(StateUnusable):  # it has been said, and what was not committed was promised to nobody
            self.store.close()
        self._sockets.close()
        log.info("stopped")
