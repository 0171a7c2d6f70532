"""Accounts of GPU memory, for when nothing moves: which worker holds what, which keep what no lease gives back."""

from collections.abc import Container, Mapping

from orchestrator.dispatch.fleet import Fleet, Worker
from orchestrator.job import LiveJob, ModelKey
from orchestrator.memory.ledger import Ledger
from protocol.gpu_memory import GpuId
from protocol.stages import Stage
from protocol.units import format_bytes

MOST_GROWN = 3  # times that what a worker keeps may grow before it is started anew


class MemoryAccounts:
    def __init__(self, ledger: Ledger, fleet: Fleet) -> None:
        self._ledger, self._fleet = ledger, fleet

    def leaking(self) -> list[Worker]:
        """Workers that keep more and more of a GPU whatever they give back."""
        rows = self._ledger.holdings.items()
        names = {worker for worker, holdings in rows if any(holding.grown >= MOST_GROWN for holding in holdings)}
        return [worker for worker in self._fleet if worker.id in names]

    def keeping(self, stage: Stage, model: ModelKey) -> list[Worker]:
        """Workers on a stage's GPUs that keep memory which no lease gives back."""
        mine = {worker.id for worker in self._fleet if (worker.hello.stage, worker.model) == (stage, model)}
        gpus = self.concerned(mine)
        rows = self._ledger.holdings.items()
        names = {worker for worker, holdings in rows if any(h.kept and h.gpu in gpus for h in holdings)}
        return [worker for worker in self._fleet if worker.id in names]

    def account(self, stage: Stage, model: ModelKey, job: LiveJob) -> str:
        """Say why a stage's task can't have the GPU memory it needs: what each worker holds, and what is missing."""
        mine = {worker.id for worker in self._fleet if (worker.hello.stage, worker.model) == (stage, model)}
        names = {worker.id: worker.hello.name for worker in self._fleet}
        told: list[str] = []
        for worker in sorted(mine & self._ledger.holdings.keys(), key=lambda worker: names[worker]):
            for holding in self._ledger.holdings[worker]:
                space = self._ledger.workspace(stage, model, job.recipe, holding.needs) * holding.jobs
                told.append(
                    f"{names[worker]} needs at least {format_bytes(holding.needs.least)} for weights and "
                    f"{format_bytes(space)} to work in, of GPU {holding.gpu}"
                )
        for gpu in sorted(self.concerned(mine)):
            told.append(self._account_of(gpu, names))
        return "it can't have the GPU memory that it needs. " + "; ".join(told)

    def _account_of(self, gpu: GpuId, names: Mapping[str, str]) -> str:
        """Describe a GPU's budget, by what each worker has of it."""
        account, rows = self._ledger.accounts[gpu], self._ledger.holdings.items()
        here = [
            (names.get(worker, "an ended process"), h) for worker, holdings in rows for h in holdings if h.gpu == gpu
        ]
        held = ", ".join(
            f"{name} {format_bytes(h.booked)} leased and {format_bytes(h.overhead)} beside it" for name, h in here
        )
        with self._ledger.as_measured([gpu]):
            free, others = max(0, self._ledger.free(gpu)), self._ledger.uncounted(gpu)
        told = f"GPU {gpu}: of {format_bytes(account.budget)} {held}; {format_bytes(free)} are free"
        if others:
            told += f", and {format_bytes(others)} are in use by other programs, by its driver's count"
        return told

    def concerned(self, holders: Container[str]) -> set[GpuId]:
        """Return the GPUs of these holders, and of all holders that lie on one of those and on others."""
        everybody = [{holding.gpu for holding in holdings} for holdings in self._ledger.holdings.values()]
        gpus = {h.gpu for worker, holdings in self._ledger.holdings.items() if worker in holders for h in holdings}
        spread = [demands for demands in everybody if len(demands) > 1]
        while more := [demands for demands in spread if demands & gpus and not demands <= gpus]:
            gpus |= set().union(*more)
        return gpus
