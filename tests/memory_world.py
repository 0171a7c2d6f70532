"""An engine with its ledger and scheduler, driven without sockets by workers that are only bytes."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.dispatch.engine import Engine
from orchestrator.dispatch.fleet import ProcessId, Worker
from orchestrator.dispatch.outbox import Outbox
from orchestrator.dispatch.retry_delays import RetryDelays
from orchestrator.dispatch.standstill import TICK_SECONDS, Standstill
from orchestrator.job import LiveJob
from orchestrator.memory.ledger import Account
from orchestrator.principal import LOCAL_USER
from orchestrator.settings import ModelSettings, OrchestratorSettings
from orchestrator.storage.job_store import Store
from protocol.gpu_memory import GpuId, Lease, WeightNeed
from protocol.job import JobRequest
from protocol.messages.describer import DescriberHello
from protocol.messages.worker import (
    Borrow,
    Leased,
    Lent,
    Ready,
    Result,
    Returned,
    SetLease,
    Task,
    TaskFailed,
    WorkerHello,
)
from protocol.model import ModelDescription
from protocol.stages import USUAL_NEXT, Stage
from tests.fakes import MODEL, OUTPUTS

NOTHING = Lease(bytes=0, weight_bytes=0)


@dataclass
class Sim:
    """A worker's process as it really is, whatever the stack thinks of it."""

    stage: Stage
    needs: WeightNeed
    takes: int  # bytes of workspace that its tasks really take
    context: int
    keeps: list[int] = field(default_factory=list)  # bytes, one more each time that all is given back; then the last
    refuses: int = 0  # leases, the first ones
    lends: bool = True
    dies: int = 0  # times, with something lent
    dies_at_work: int = 0  # times
    model: ModelDescription = MODEL
    gpu: int = 0
    lent: int = 0
    asked: int = 0  # to be lent in the next round
    lease: Lease = NOTHING
    kept: int = 0
    worker: Worker | None = None

    def give_back(self) -> None:
        assert not self.lent, "a lease is taken back in a loan"
        self.lease = NOTHING
        self.kept = self.keeps.pop(0) if len(self.keeps) > 1 else (self.keeps or [self.kept])[0]


@dataclass
class World:
    """GPUs, one unless said, an engine, and its workers; a round is half a second."""

    budget: int
    sims: list[Sim]
    folder: Path
    driver: bool = False
    others: Sequence[int] = (0,)  # bytes of other programs, in turn at each question to the driver
    gpus: int = 1
    now: float = 0.0
    orders: int = 0
    restarts: int = 0
    rested: int = 0  # workers of models that others found no room beside
    asleep: list[Sim] = field(default_factory=list)  # these, until there is a job of their model
    questions: int = 0
    dead: list[ProcessId] = field(default_factory=list)  # processes that are known to have ended in the next round
    _identities: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def __post_init__(self) -> None:
        store = Store(None, self.folder)
        self.outbox = Outbox()
        used = self.used if self.driver else lambda: None
        accounts = {GpuId("h", gpu): Account(self.budget, used=used) for gpu in range(self.gpus)}
        names = list(dict.fromkeys(sim.model.model for sim in self.sims))
        models = tuple(ModelSettings(name=name, model=name) for name in names)
        settings = OrchestratorSettings(queue_limit=100_000, models=models)
        at_once = RetryDelays((0.0,))
        self.engine = Engine(store, self.outbox, settings, accounts, self.folder, at_once)
        self.engine.leasing._standstill = Standstill(lambda: self.now)
        self.engine.dispatch.clock = lambda: self.now
        for sim in self.sims:
            self.join(sim)

    def used(self) -> int:
        """As the driver counts."""
        self.questions += 1
        others = self.others[self.questions % len(self.others)]
        return others + sum(sim.context + sim.kept + sim.lease.bytes - sim.lent for sim in self.sims)

    def join(self, sim: Sim) -> None:
        number = next(self._identities)
        hello = WorkerHello(
            name=f"{'' if sim.model is MODEL else sim.model.model}{sim.stage}-{sim.gpu + 1}", stage=sim.stage,
            pid=1000 + number, host="h", device="cuda", dtype="float32", model=sim.model, gpus=(sim.gpu,),
        )  # fmt: skip
        self.engine.catalogue.learn(DescriberHello(name=sim.model.model, pid=1, model=sim.model, dtype="float32"))
        sim.worker = self.engine.fleet.hello(bytes([number // 256, number % 256]), hello)
        sim.lease, sim.kept, sim.lent, sim.asked = NOTHING, 0, 0, 0
        self.engine.ready(sim.worker, Ready(needs=(sim.needs,), context_bytes=(sim.context,)))

    def submit(self, count: int, width: int = 1024, models: Sequence[str | None] = (None,)) -> list[LiveJob]:
        """Submit jobs of these models in turns."""
        requests = tuple(
            JobRequest(prompt=f"a {n}", seed=n, width=width, height=1024, model=models[n % len(models)])
            for n in range(count)
        )
        return self.engine.accept(requests, LOCAL_USER)

    def round(self) -> None:
        self.now += TICK_SECONDS
        while self.dead:
            self.engine.leasing.buried(self.dead.pop())
        for each in [s for s in self.asleep if s.worker and self.engine.job_queue.by_model[s.worker.model]]:
            self.asleep.remove(each)
            self.sims.append(each)
            self.join(each)
        for each in self.sims:
            self.lend(each)
        self.engine.assign()
        by_identity = {sim.worker.identity: sim for sim in self.sims if sim.worker}
        for letter in [*self.outbox.drain_tasks(), *self.outbox.drain()]:
            sim = by_identity.get(letter.identity)
            if sim and isinstance(letter.message, SetLease):
                self.orders += 1
                self.obey(sim, letter.message)
            elif sim and isinstance(letter.message, Task):
                self.orders += 1
                self.work(sim, letter.message)
            elif sim and isinstance(letter.message, Borrow):
                self.orders += 1
                assert not sim.lent
                assert not sim.asked
                sim.asked = letter.message.bytes
            elif sim and isinstance(letter.message, Returned):
                assert sim.lent
                assert sim.lease.bytes >= letter.message.bytes >= sim.lease.bytes - sim.lent
                sim.lease, sim.lent = sim.lease.model_copy(update={"bytes": letter.message.bytes}), 0
        on_gpus = Counter[int]({0: 0})
        for sim in self.sims:
            on_gpus[sim.gpu] += sim.lease.bytes - sim.lent
        assert max(on_gpus.values()) <= self.budget
        for name in self.engine.dispatch.to_restart:
            self.restarts += 1
            self.start_anew(next(s for s in self.sims if s.worker and s.worker.hello.name == name))
        self.engine.dispatch.to_restart.clear()
        for model in self.engine.dispatch.to_rest:
            for sim in [s for s in self.sims if s.worker and s.worker.model == model]:
                self.rested += 1
                assert sim.worker
                self.engine.dismiss_worker(sim.worker)
                self.engine.leasing.buried(sim.worker.process)
                self.sims.remove(sim)
                self.asleep.append(sim)
        self.engine.dispatch.to_rest.clear()

    def start_anew(self, sim: Sim) -> None:
        assert sim.worker
        self.engine.dismiss_worker(sim.worker)
        self.engine.leasing.buried(sim.worker.process)
        self.join(sim)

    def lend(self, sim: Sim) -> None:
        """Lend what a worker was asked for in the round before."""
        if not sim.asked or not sim.worker:
            return
        assert sim.asked <= sim.lease.bytes - sim.needs.least
        sim.lent, sim.asked = sim.asked if sim.lends else 0, 0
        self.engine.lent(sim.worker, Lent(bytes=sim.lent))
        if sim.dies:
            sim.dies -= 1
            self.start_anew(sim)

    def obey(self, sim: Sim, order: SetLease) -> None:
        (lease,) = order.leases
        reason = ""
        if lease.bytes and sim.refuses:
            sim.refuses -= 1
            reason, lease = "there was less than that", NOTHING
        if lease.bytes:
            sim.lease = lease
        else:
            sim.give_back()
        assert sim.worker
        leased = Leased(
            leases=(sim.lease,), kept_bytes=(sim.kept,), context_bytes=(sim.context,), reason=reason,
            lendable_bytes=max(0, sim.lease.weight_bytes - sim.needs.least),
        )  # fmt: skip
        self.engine.leased(sim.worker, leased)

    def work(self, sim: Sim, task: Task) -> None:
        assert sim.worker
        assert not sim.lent, "a task comes in a loan"
        if sim.dies_at_work:
            sim.dies_at_work -= 1
            self.engine.lose_worker(sim.worker, "died")
            self.dead.append(sim.worker.process)
            self.join(sim)
            return
        key = {"job": task.job, "stage": task.stage, "attempt": task.attempt}
        if sim.lease.bytes - sim.lease.weight_bytes < sim.takes and not (sim.stage == "vae" and task.allow_tiling):
            told = TaskFailed(**key, reason="out of memory", retry=True, out_of_memory=True)
            self.engine.failed(sim.worker, told)
        else:
            self.engine.result(
                sim.worker,
                Result(**key, seconds=1.0, next=USUAL_NEXT[sim.stage], workspace_bytes=sim.takes),
                (OUTPUTS[sim.stage],),
            )
        self.engine.ready(sim.worker, Ready(context_bytes=(sim.context,)))

    def as_they_are(self, jobs: list[LiveJob]) -> list[LiveJob]:
        """The jobs as they have become."""
        return [self.engine.job_queue.known(job.id) for job in jobs]

    def run(self, jobs: list[LiveJob], rounds: int) -> list[LiveJob]:
        """Until all have ended."""
        for _ in range(rounds):
            if not any(job.id in self.engine.job_queue.jobs for job in jobs):
                break
            self.round()
        return self.as_they_are(jobs)
