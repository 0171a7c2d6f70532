"""The other hosts of the stack as the orchestrator knows them: what each has, runs and is to run."""

import functools
import json
import logging
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from orchestrator.dispatch.engine import Engine
from orchestrator.log_files import append
from orchestrator.memory.ledger import Account, no_driver
from orchestrator.server.supervisor_link import SupervisorLink
from orchestrator.settings import AccountSettings
from orchestrator.state_folder import StackFolder
from protocol.errors import Conflict, NotFound
from protocol.gpu_memory import GpuId
from protocol.host import HostFacts
from protocol.messages.common import Beat, Error, Message, Welcome
from protocol.messages.host import HostEnds, HostGoodbye, HostHello, HostLog, HostStatus, HostWorkers
from protocol.messages.supervisor import HostJoined, HostPlanned, KillProcess, RestartProcess
from protocol.views import HostView, Placing, ProcessView
from protocol.worker_spec import WorkerSpec

log = logging.getLogger(__name__)

HOST = socket.gethostname()
HEARTBEAT_SECONDS = 1.0
STATUS_SECONDS = 0.5  # that a driver's count may be old when it is told
SILENCE_SECONDS = 5.0
TAKEOVER_SECONDS = 3.0  # without a word of an agent, after which another one with its key takes its place


@dataclass(slots=True)
class HostLink:
    """A host, by the name of its key, and its agent."""

    name: str
    identity: bytes  # of the agent's socket
    hello: HostHello
    heard: float = field(default_factory=time.monotonic)
    heard_since: float = field(default_factory=time.monotonic)  # without a silence since
    state: Literal["planning", "here", "refused", "gone"] = "planning"
    reason: str = ""  # why it was refused
    workers: tuple[WorkerSpec, ...] = ()  # that it is to have
    processes: tuple[ProcessView, ...] = ()
    used: dict[int, int] = field(default_factory=dict)  # bytes by GPU, as its driver told last
    told: float = 0.0  # monotonic seconds, when it did
    number: int = 0  # of the last word about workers

    @property
    def facts(self) -> HostFacts:
        return self.hello.facts

    @property
    def silent(self) -> bool:
        return time.monotonic() - self.heard > SILENCE_SECONDS

    def hear(self) -> None:
        """Note a word of its agent."""
        now = time.monotonic()
        if self.silent:
            self.heard_since = now
        self.heard = now

    def view(self, placing: Placing) -> HostView:
        state: Literal["planning", "here", "silent", "refused", "gone"] = self.state
        if self.state in ("planning", "here") and self.silent:
            state = "silent"
        return HostView(
            name=self.name, state=state, placing=placing, reason=self.reason, facts=self.facts,
            workers=len(self.workers), heard=time.monotonic() - self.heard,
        )  # fmt: skip


class HostLinks:
    """What a host's GPUs may be used for is kept: its workers come back sooner than their agent's next word."""

    def __init__(self, engine: Engine, supervisor: SupervisorLink, folder: StackFolder) -> None:
        self._engine, self._supervisor, self._folder = engine, supervisor, folder
        self._links: dict[str, HostLink] = {}
        self._placing: dict[str, Placing] = json.loads(engine.store.setting("placing") or "{}")
        self._accounts: dict[str, dict[str, dict[str, object]]] = json.loads(engine.store.setting("hosts") or "{}")
        self._ending = False
        self._next_number = time.time_ns() // 1000  # so that no word of an earlier orchestrator has it
        engine.fleet.cordoned.update(self._placing)
        for name, gpus in self._accounts.items():
            self._open(name, {int(index): AccountSettings.model_validate(gpu) for index, gpu in gpus.items()})

    def __iter__(self) -> Iterator[HostLink]:
        return iter(self._links.values())

    @property
    def heard_since(self) -> dict[str, float]:
        """The hosts whose agents are there and not silent, with the monotonic seconds since when they are heard."""
        return {link.name: link.heard_since for link in self if link.state in ("planning", "here") and not link.silent}

    @property
    def processes(self) -> tuple[ProcessView, ...]:
        """The processes of hosts that are heard."""
        return tuple(process for link in self if not link.silent for process in link.processes)

    def knows_gpus(self, name: str, gpus: Sequence[int]) -> bool:
        """Return whether the memory of these GPUs of a host can be leased."""
        return all(GpuId(name, gpu) in self._engine.leasing.ledger.accounts for gpu in gpus)

    def views(self) -> tuple[HostView, ...]:
        return tuple(link.view(self._placing.get(link.name, "")) for link in sorted(self, key=lambda link: link.name))

    # -- what agents say ------------------------------------------------------------------------

    def handle(self, identity: bytes, name: str, message: Message) -> bool:
        """Do what a host's agent wants; return False where the message is none of an agent's."""
        if isinstance(message, HostHello):
            self._welcome(identity, name, message)
            return True
        if not isinstance(message, HostStatus | HostLog | HostGoodbye):
            return False
        link = self._links.get(name)
        if link is None or link.identity != identity or link.state == "gone":
            self._answer(identity, Error(code="not_found", message="This host has not said hello."))
            return True
        link.hear()
        match message:
            case HostStatus():
                self._take_status(link, message)
            case HostLog(name=worker, text=text):
                if any(spec.name == worker for spec in link.workers):
                    append(self._folder.log(worker), text)
            case HostGoodbye():
                log.info("the host %s has left", name)
                self._bury_all_but(name, ())
                self._close(name)
                link.state = "refused" if link.state == "refused" else "gone"
                link.workers, link.processes = (), ()
        return True

    def _welcome(self, identity: bytes, name: str, hello: HostHello) -> None:
        if name == HOST:
            raise Conflict(
                f"The key {name!r} is called as the stack's own host.", "Make one with another name for this host."
            )
        if self._is_taken(name, hello):
            log.warning("another agent comes with the key of the host %s, which is here", name)
            return  # it says hello again, and is heard once the first is silent
        log.info("the host %s has come: %s, %d GPUs", name, hello.facts.hostname, len(hello.facts.gpus))
        link = self._links[name] = HostLink(name, identity, hello)
        self._answer(identity, Welcome(heartbeat_seconds=HEARTBEAT_SECONDS))
        self._bury_all_but(name, hello.pids)
        self._supervisor.tell(HostJoined(host=name, facts=link.facts))

    def _is_taken(self, name: str, hello: HostHello) -> bool:
        """Return whether another agent is here with the key of the one that comes."""
        known = self._links.get(name)
        if known is None or known.state in ("refused", "gone"):
            return False
        if known.facts.hostname == hello.facts.hostname and known.hello.pid in (hello.pid, hello.after):
            return False
        return time.monotonic() - known.heard < TAKEOVER_SECONDS

    def _take_status(self, link: HostLink, status: HostStatus) -> None:
        link.processes = tuple(process for process in status.processes if process.name.endswith(f"@{link.name}"))
        link.told = link.heard
        link.used = {gpu.index: used for gpu, used in zip(link.facts.gpus, status.used_bytes, strict=False)}
        for pid in status.exited_pids:
            self._engine.bury_process(link.name, pid, blameless=pid in status.stopped_pids)
        mine = [w for w in self._engine.fleet if w.process[:2] == ("", link.name) and w.proven]
        self._answer(link.identity, Beat(proven=tuple({worker.hello.pid for worker in mine})))
        if self._ending:
            self._answer(link.identity, HostEnds())
        elif link.state == "here" and status.heard != link.number:
            self._tell_workers(link)  # the last word was lost

    def _bury_all_but(self, name: str, pids: tuple[int, ...]) -> None:
        """Take out what is known of a host's processes that are no more."""
        for pid in self._engine.pids_of(name) - {*pids}:
            self._engine.bury_process(name, pid, blameless=True)

    # -- what is wanted of hosts ----------------------------------------------------------------

    def supervisor_came(self) -> None:
        """Have a supervisor that knows nothing plan for all hosts."""
        for link in self:
            if link.state != "gone":
                self._supervisor.tell(HostJoined(host=link.name, facts=link.facts))

    def planned(self, plan: HostPlanned) -> None:
        """Let a host have the workers that were planned for it, or refuse it."""
        link = self._links.get(plan.host)
        if link is None or link.state == "gone":
            return
        if plan.reason:
            log.error("the host %s is refused: %s", link.name, plan.reason)
            link.state, link.reason, link.workers = "refused", plan.reason, ()
            self._answer(link.identity, Error(code=plan.code, message=plan.reason, hint=plan.hint))
            return
        gpus = json.loads(plan.gpus)
        if self._accounts.get(link.name) != gpus:
            self._accounts[link.name] = gpus
            self._engine.store.set("hosts", json.dumps(self._accounts))
            self._open(link.name, {int(index): AccountSettings.model_validate(gpu) for index, gpu in gpus.items()})
        link.state, link.reason, link.workers = "here", "", plan.workers
        self._tell_workers(link)

    def end(self) -> None:
        """Let no host have workers any more: the stack ends."""
        self._ending = True
        for link in self:
            if link.state != "gone":
                self._answer(link.identity, HostEnds())

    def place(self, name: str, placing: Placing) -> None:
        """Give a host's workers nothing new, end them, or let them work; it outlives a restart. NotFound."""
        if name not in self._links and name not in self._accounts:
            raise NotFound(f"There is no host {name!r}.", "'triptych hosts' lists those that there are.")
        self._engine.fleet.cordon(name, bool(placing))
        if placing:
            self._placing[name] = placing
        else:
            self._placing.pop(name, None)
        self._engine.store.set("placing", json.dumps(self._placing))
        if link := self._links.get(name):
            self._tell_workers(link)

    def restart(self, process: str) -> bool:
        """Have a worker's process replaced; return False where it is no host's."""
        return self._tell_keeper(process, RestartProcess(name=process))

    def kill(self, name: str, pid: int, reason: str) -> None:
        """Have a host's process ended that hangs."""
        if link := self._links.get(name):
            self._answer(link.identity, KillProcess(pid=pid, reason=reason))

    def forget_all_but(self, is_let_in: Callable[[str], bool]) -> None:
        """Forget hosts whose keys were revoked: their workers, their GPUs, and whether they were cordoned."""
        for name in [name for name in {*self._links, *self._accounts, *self._placing} if not is_let_in(name)]:
            log.info("the host %s is forgotten: its key was revoked", name)
            self._links.pop(name, None)
            self._bury_all_but(name, ())
            self._close(name)
            if self._placing.pop(name, None):
                self._engine.fleet.cordon(name, False)
                self._engine.store.set("placing", json.dumps(self._placing))

    def _tell_keeper(self, process: str, message: Message) -> bool:
        for link in self:
            if any(spec.name == process for spec in link.workers):
                self._answer(link.identity, message)
                return True
        return False

    def _tell_workers(self, link: HostLink) -> None:
        if link.state == "here" and not self._ending:
            none, workers = self._placing.get(link.name) == "drained", link.workers
            link.number = self._next_number = self._next_number + 1
            self._answer(link.identity, HostWorkers(number=link.number, workers=() if none else workers))

    # -- its GPUs -------------------------------------------------------------------------------

    def _open(self, name: str, gpus: dict[int, AccountSettings]) -> None:
        """Let the memory of a host's GPUs be leased, and of no others."""
        ledger = self._engine.leasing.ledger
        for known in [known for known in ledger.accounts if known.host == name and known.number not in gpus]:
            ledger.shut(known)
        for index, gpu in gpus.items():
            used = functools.partial(self._used, name, index) if gpu.driver else no_driver
            account = Account(gpu.budget, gpu.foreign, used, gpu.kept, gpu.name)
            ledger.open(GpuId(name, index), account)

    def _close(self, name: str) -> None:
        self._engine.leasing.ledger.close(name)
        if self._accounts.pop(name, None) is not None:
            self._engine.store.set("hosts", json.dumps(self._accounts))

    def _used(self, name: str, index: int) -> int | None:
        """Return a GPU's bytes in use by its driver, as last told; None where the book has changed since."""
        link, changed = self._links.get(name), self._engine.leasing.ledger.touched.get(GpuId(name, index), 0.0)
        return link.used.get(index) if link and link.told > changed + STATUS_SECONDS else None

    def _answer(self, identity: bytes, message: Message) -> None:
        self._engine.outbox.to_worker(identity, message)
