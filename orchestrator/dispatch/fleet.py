"""The workers that have said hello, and what each is doing. A worker has one task at a time."""

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from orchestrator.dispatch.key_trust import KeyTrust
from orchestrator.job import ModelKey
from orchestrator.principal import LOCAL_USER, Host, LocalUser, Principal, to_column
from orchestrator.scheduling.snapshot import IdleWorker, Place
from protocol.gpu_memory import GpuId
from protocol.messages.common import Heartbeat, TaskKey
from protocol.messages.worker import WorkerHello
from protocol.stages import Stage
from protocol.views import ComponentView, WorkerView

SILENCE_SECONDS = 5.0  # a worker's loop beats twice a second, even while it computes
VOUCHED_SECONDS = 10.0  # of a worker that says less, since its host's agent tells when its process ends
PROVEN_SECONDS = 2.0
LOADING_SECONDS = 60.0  # while it loads, libraries may hold its interpreter for long


class ProcessId(NamedTuple):
    """A worker's process. What a worker's key says of hosts and processes concerns no process but that key's own."""

    key: str  # that its word came with; empty: this machine's user
    host: str
    pid: int


@dataclass(slots=True)
class Worker:
    """One incarnation of a worker process; `id` is its socket's identity in hex."""

    identity: bytes
    hello: WorkerHello
    since: float  # seconds since the epoch
    heard: float  # monotonic seconds
    principal: Principal = LOCAL_USER  # on whose behalf it works
    state: Literal["loading", "idle", "busy", "swapping"] = "loading"
    joined: float = field(default_factory=time.monotonic)
    idle_since: float = 0.0  # monotonic seconds
    task: TaskKey | None = None
    owes: bool = False  # the one that it has come in place of had a task, which it must name
    along: tuple[str, ...] = ()  # jobs that it may be doing along with its task
    pace: tuple[Stage, ModelKey, int] | None = None  # what its task's steps are like
    step: int = 0  # of its task, as far as it was told
    moved: float = 0.0  # monotonic seconds, when it last came further
    done: int = 0
    rss_bytes: int = 0
    gpu_bytes: int = 0
    device_map: tuple[tuple[str, str], ...] = ()
    residency: tuple[ComponentView, ...] = ()
    lease_bytes: tuple[int, ...] = ()  # of each of its GPUs
    context_bytes: tuple[int, ...] = ()
    refused: int | None = None  # bytes of the smallest lease that it could not take
    loan: Literal["", "asked", "given"] = ""  # of its lease
    lent_at: float = 0.0  # monotonic seconds, when it was given
    called_back_at: float = -math.inf  # monotonic seconds, when one came back that had lasted for too long
    lendable_bytes: int = 0  # of weights that it can let go between two steps, as it has told
    refused_loan: int | None = None  # bytes of the smallest loan that it could not give

    @property
    def id(self) -> str:
        return self.identity.hex()

    @property
    def proven(self) -> bool:
        """Return whether it is known to work: it has done a task, or has been ready for a while."""
        return self.done > 0 or (self.state != "loading" and time.monotonic() - self.joined > PROVEN_SECONDS)

    @property
    def host(self) -> str:
        """The host that it runs on: by the name of its key where that is a host's, else as it says itself."""
        return self.principal.name if isinstance(self.principal, Host) else self.hello.host

    @property
    def process(self) -> ProcessId:
        return ProcessId(to_column(self.principal), self.host, self.hello.pid)

    @property
    def gpus(self) -> tuple[GpuId, ...]:
        """The GPUs whose memory is leased to its process, if they are this stack's; a key's holder has none."""
        host = f"{self.process.key}@{self.host}" if self.process.key else self.host
        return tuple(GpuId(host, number) for number in self.hello.gpus)

    @property
    def model(self) -> ModelKey:
        return ModelKey.of_worker(self.hello)

    @property
    def place(self) -> Place:
        return self.hello.stage, self.model

    def view(self) -> WorkerView:
        return WorkerView(
            id=self.id, name=self.hello.name, stage=self.hello.stage, state=self.state, pid=self.hello.pid,
            host=self.host, device=self.hello.device, device_kind=self.hello.device_kind,
            versions=self.hello.versions, dtype=self.hello.dtype, model=self.hello.model.model,
            revision=self.hello.model.revision, speedups=self.hello.speedups,
            job=self.task.job if self.task else None, done=self.done, rss_bytes=self.rss_bytes,
            gpu_bytes=self.gpu_bytes, device_map=self.device_map, residency=self.residency, since=self.since,
            gpus=self.hello.gpus, lease_bytes=self.lease_bytes, context_bytes=self.context_bytes,
            lends=self.loan == "given",
        )  # fmt: skip


@dataclass(slots=True)
class Fleet:
    clock: Callable[[], float] = time.monotonic
    workers: dict[bytes, Worker] = field(default_factory=dict)
    trust: KeyTrust = field(default_factory=KeyTrust)
    cordoned: set[str] = field(default_factory=set)  # hosts whose workers get nothing to do
    elsewhere: int = 0  # workers of other hosts and of keys' holders
    changes: int = 0  # that may change what is to be done next
    _idle: dict[Place, dict[bytes, Worker]] = field(default_factory=dict)  # of each the one that waits longest first
    _lenders: dict[bytes, Worker] = field(default_factory=dict)
    _accompanied: dict[bytes, Worker] = field(default_factory=dict)  # that may do other jobs along with their tasks

    def __iter__(self) -> Iterator[Worker]:
        return iter(self.workers.values())

    def hello(self, identity: bytes, hello: WorkerHello, principal: Principal = LOCAL_USER) -> Worker:
        self.changes += 1
        worker = Worker(identity, hello, time.time(), self.clock(), principal)
        self.workers[identity] = worker
        self.elsewhere += not isinstance(principal, LocalUser)
        return worker

    def get(self, identity: bytes) -> Worker | None:
        """The worker behind an identity; hearing from it counts as a sign of life."""
        worker = self.workers.get(identity)
        if worker:
            worker.heard = self.clock()
        return worker

    def beat(self, worker: Worker, beat: Heartbeat) -> None:
        worker.rss_bytes, worker.gpu_bytes = beat.rss_bytes, beat.gpu_bytes

    def ready(self, worker: Worker) -> None:
        self.changes += 1
        worker.state, worker.task, worker.along, worker.idle_since = "idle", None, (), self.clock()
        self._accompanied.pop(worker.identity, None)
        self._idle.setdefault(worker.place, {})[worker.identity] = worker

    def swap(self, worker: Worker) -> None:
        """Mark a worker whose lease changes as swapping; it says when it is done."""
        self.changes += 1
        self._leave_idle(worker)
        worker.state, worker.pace, worker.moved = "swapping", None, self.clock()

    def borrow(self, worker: Worker) -> None:
        """Note that a worker is to lend of its memory, before anything else."""
        self.changes += 1
        worker.loan = "asked"
        self._lenders[worker.identity] = worker
        if worker.state == "idle":
            worker.moved = self.clock()

    def lent(self, worker: Worker, size: int) -> None:
        self.changes += 1
        worker.loan, worker.lent_at = "given" if size else "", self.clock()
        if size:
            self._lenders[worker.identity] = worker
        else:
            self._lenders.pop(worker.identity, None)
        worker.moved = worker.lent_at

    def return_loan(self, worker: Worker, patience: float) -> None:
        """Note that a worker has back what it lent; after more than `patience` seconds it keeps that for a while."""
        self.changes += 1
        worker.loan, worker.moved = "", self.clock()
        self._lenders.pop(worker.identity, None)
        if worker.moved - worker.lent_at > patience:
            worker.called_back_at = worker.moved

    def give(
        self, worker: Worker, task: TaskKey, pace: tuple[Stage, ModelKey, int] | None, along: tuple[str, ...] = ()
    ) -> None:
        self.changes += 1
        self._leave_idle(worker)
        worker.state, worker.task, worker.pace, worker.along = "busy", task, pace, along
        if along:
            self._accompanied[worker.identity] = worker
        worker.step, worker.moved = 0, self.clock()

    def taken_along(self) -> set[str]:
        """Return the jobs that workers may be doing along with their tasks; they wait for those."""
        return {job for worker in self._accompanied.values() for job in worker.along}

    def cordon(self, host: str, on: bool) -> None:
        """Give a host's workers nothing to do, or let them have something again."""
        self.changes += 1
        (self.cordoned.add if on else self.cordoned.discard)(host)

    def remove(self, worker: Worker) -> None:
        self.changes += 1
        if self.workers.pop(worker.identity, None):
            self.elsewhere -= not isinstance(worker.principal, LocalUser)
        self._leave_idle(worker)
        self._lenders.pop(worker.identity, None)
        self._accompanied.pop(worker.identity, None)

    def _leave_idle(self, worker: Worker) -> None:
        there = self._idle.get(worker.place, {})
        there.pop(worker.identity, None)
        if not there:
            self._idle.pop(worker.place, None)

    def idle(self, most: Callable[[Place], int | None] = lambda place: None) -> list[IdleWorker]:
        """Return the idle workers that may get something to do; of a place those that wait longest, `most` of them.

        Not those whose key rests, whose host is cordoned, or whose process's lease is being changed or lent of.
        """
        found: list[IdleWorker] = []
        for place, there in self._idle.items():
            able = (worker for worker in there.values() if self._may_work(worker))
            found += [
                IdleWorker(worker.id, *place, first.id if (first := self.first(worker)) else worker.id)
                for worker in itertools.islice(able, most(place))
            ]
        return found

    def _may_work(self, worker: Worker) -> bool:
        first = self.first(worker)
        able = first is not None and first.state in ("idle", "busy") and not first.loan
        return able and not self.trust.rests(worker.principal) and worker.host not in self.cordoned

    @property
    def lenders(self) -> Collection[Worker]:
        """The workers that lend of their lease, or are asked to."""
        return self._lenders.values()

    def first(self, worker: Worker) -> Worker | None:
        """Return the one of its process's workers that has their lease."""
        if not worker.hello.part:
            return worker
        return next((w for w in self.of_process(worker.process) if not w.hello.part), None)

    def resting_since(self, worker: Worker) -> float | None:
        """Monotonic seconds since all workers of its process are idle; None if one isn't."""
        if worker.hello.parts == 1:
            return worker.idle_since if worker.state == "idle" else None
        all_of_it = self.of_process(worker.process)
        resting = all(w.state == "idle" for w in all_of_it)
        return max(w.idle_since for w in all_of_it) if resting else None

    def silent(self, vouched: Mapping[str, float] | None = None) -> list[Worker]:
        """Return the workers that have said nothing for too long.

        `vouched` are hosts whose agents are heard, with the monotonic seconds since when: after a cut of a host's link
        its agent may be back sooner than its workers, which have as long again, once.
        """
        vouched = vouched or {}
        now, limits = self.clock(), {"loading": LOADING_SECONDS}

        def is_silent(worker: Worker) -> bool:
            back = vouched.get(worker.host) if isinstance(worker.principal, Host) else None
            limit = limits.get(worker.state, SILENCE_SECONDS if back is None else VOUCHED_SECONDS)
            heard = min(max(worker.heard, back or 0.0), worker.heard + limit)
            return now - heard > limit

        return [worker for worker in self if is_silent(worker)]

    def of_process(self, process: ProcessId) -> list[Worker]:
        return [worker for worker in self if worker.process == process]
