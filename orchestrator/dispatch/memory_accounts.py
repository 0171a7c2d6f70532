"""Accounts of GPU memory, for when nothing moves: which worker holds what, which keep what no lease gives back."""

from collections.abc import Iterable, Mapping, Sequence

from orchestrator.dispatch.fleet import Fleet, Worker
from orchestrator.job import LiveJob
from orchestrator.memory.ledger import Ledger
from protocol.gpu_memory import GpuId
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

    def keeping(self, able: Sequence[Worker]) -> list[Worker]:
        """Workers that keep memory which no lease gives back, on the GPUs of those that are `able` to do a task."""
        gpus = self.concerned({worker.id for worker in able})
        rows = self._ledger.holdings.items()
        names = {worker for worker, holdings in rows if any(h.kept and h.gpu in gpus for h in holdings)}
        return [worker for worker in self._fleet if worker.id in names]

    def account(self, able: Sequence[Worker], job: LiveJob) -> str:
        """Say why a task can't have the GPU memory it needs: what each `able` worker holds, and what is missing."""
        mine = {worker.id: worker for worker in able}
        names = {worker.id: worker.hello.name for worker in self._fleet}
        told: list[str] = []
        for worker in sorted(mine.keys() & self._ledger.holdings.keys(), key=lambda worker: names[worker]):
            for holding in self._ledger.holdings[worker]:
                stage, model = mine[worker].place
                space = self._ledger.workspace(stage, model, job.recipe, holding.needs) * holding.jobs
                told.append(
                    f"{names[worker]} needs at least {format_bytes(holding.needs.least)} for weights and "
                    f"{format_bytes(space)} to work in, of GPU {holding.gpu}"
                )
        for gpu in sorted(self.concerned({*mine})):
            told.append(self._account_of(gpu, names))
        return "it can't have the GPU memory that it needs. " + "; ".join(told)

    def _account_of(self, gpu: GpuId, names: Mapping[str, str]) -> str:
        """Describe a GPU's budget, by what each worker has of it."""
        account = self._ledger.accounts[gpu]
        here = [(names.get(worker, "an ended process"), holding) for worker, holding in self._ledger.on(gpu).items()]
        held = ", ".join(
            f"{name} {format_bytes(h.booked)} leased and {format_bytes(h.overhead)} beside it" for name, h in here
        )
        with self._ledger.as_measured([gpu]):
            free, others = max(0, self._ledger.free(gpu)), self._ledger.uncounted(gpu)
        told = f"GPU {gpu}: of {format_bytes(account.budget)} {held}; {format_bytes(free)} are free"
        if others:
            told += f", and {format_bytes(others)} are in use by other programs, by its driver's count"
        return told

    def concerned(self, holders: Iterable[str]) -> set[GpuId]:
        """Return the GPUs of these holders, and of all holders that lie on one of those and on others."""
        holdings = self._ledger.holdings
        return self._ledger.together(holding.gpu for holder in holders for holding in holdings.get(holder, ()))
