"""The ledger of each GPU's budget: contexts as measured, leases as given, and workspace as learned.

The sum never passes the budget. A worker's lease counts from before it is told until after it has given it back. A
worker on several GPUs has a holding of each.
"""

import contextlib
import json
import time
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.job import ModelKey
from orchestrator.memory.lease_sizes import Loan, Need
from orchestrator.memory.margins import (
    FIRST_HEADROOM,
    FIXED_PART,
    HEADROOM,
    MARGIN,
    MORE,
    ROUNDING,
    UNSEEN,
    WORTH_LEARNING,
    WORTH_TELLING,
)
from orchestrator.memory.task_keys import MEGAPIXEL, pixels_at_once, place_key, workspace_key
from protocol.gpu_memory import GpuId, Lease, WeightNeed
from protocol.job import Recipe
from protocol.stages import TRAITS, Stage


def no_driver() -> None:
    """Return None: no driver counts what is in use."""


@dataclass(slots=True)
class Account:
    """A GPU. `foreign` bytes were in use before the stack came; `used()` is its driver's count, None without one."""

    budget: int  # bytes, for those that work in leases
    foreign: int = 0
    used: Callable[[], int | None] = no_driver
    kept: int = 0  # bytes beside the budget, that other workers of the stack keep
    name: str = ""  # as its driver calls it


@dataclass(slots=True)
class Holding:
    """A worker's holding of a GPU."""

    gpu: GpuId
    needs: WeightNeed
    context: int
    worked: bool = False  # its context has grown as far as it will
    lease: int = 0
    weight_bytes: int = 0  # of it for weights
    asked: Lease | None = None  # a lease on the way
    loan: Loan | None = None  # of its lease
    kept: int = 0  # bytes beside context and lease that it holds whatever it gives back, as last measured
    grown: int = 0  # how often what it keeps has grown since it joined
    jobs: int = 1  # at once, each with a workspace of its own
    since: float = field(default_factory=time.monotonic)  # when its lease began

    @property
    def booked(self) -> int:
        lent = self.loan.bytes if self.loan and self.loan.given else 0
        return max(self.lease, self.asked.bytes if self.asked else 0) - lent

    def keeps(self, size: int) -> None:
        """Replace the last measurement of the bytes that it keeps."""
        self.grown += size > self.kept + WORTH_TELLING and self.kept > 0
        self.kept = size

    @property
    def room(self) -> int:
        """Bytes of its lease beside the weights, for each of its jobs."""
        return (self.lease - self.weight_bytes) // self.jobs

    @property
    def overhead(self) -> int:
        """Bytes that can be in no lease: its context, what that may grow by, and what it keeps."""
        if not self.needs.workspace:
            return self.context + self.kept  # a CPU that stands in for a GPU
        return self.context + self.kept + (HEADROOM if self.worked else FIRST_HEADROOM)


@dataclass(slots=True)
class Ledger:
    accounts: dict[GpuId, Account] = field(default_factory=dict)
    learned: dict[str, int] = field(default_factory=dict)  # workspace in bytes, see `workspace_key`
    holdings: dict[str, tuple[Holding, ...]] = field(default_factory=dict)  # by worker, one for each of its GPUs
    touched: dict[GpuId, float] = field(default_factory=dict)  # monotonic seconds of a GPU's last change in the book
    changes: int = 0  # of GPUs, and of who holds anything
    _on_gpu: dict[GpuId, dict[str, Holding]] = field(default_factory=dict)  # the same by GPU
    _spread: set[str] = field(default_factory=set)  # workers on several GPUs
    _seen: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)  # by stage and model: (pixels, bytes)
    _uncounted: dict[GpuId, int] = field(default_factory=dict)  # by GPU, see `as_measured`

    def __post_init__(self) -> None:
        for key, size in self.learned.items():
            self._note(key, size)

    def shut(self, gpu: GpuId) -> None:
        """Forget a GPU that is there no more, and who holds anything of it."""
        del self.accounts[gpu]
        for worker in [*self.on(gpu)]:
            self._drop(worker)
        self.changes += 1

    def close(self, host: str) -> None:
        """Forget a host's GPUs, and who holds what of them."""
        self.changes += 1
        for gpu in [gpu for gpu in self.accounts if gpu.host == host]:
            self.shut(gpu)

    def join(self, worker: str, holdings: Iterable[Holding]) -> None:
        self._put(worker, tuple(holdings))
        self._touch(worker)

    def _put(self, worker: str, holdings: tuple[Holding, ...]) -> None:
        self._drop(worker)
        self.holdings[worker] = holdings
        for holding in holdings:
            self._on_gpu.setdefault(holding.gpu, {})[worker] = holding
        if len(holdings) > 1:
            self._spread.add(worker)

    def _drop(self, worker: str) -> tuple[Holding, ...]:
        """Forget what a worker holds; return it."""
        holdings = self.holdings.pop(worker, ())
        for holding in holdings:
            self._on_gpu[holding.gpu].pop(worker, None)
        self._spread.discard(worker)
        return holdings

    def wants(self, worker: str, needs: Sequence[WeightNeed]) -> bool:
        """Take in what a worker needs from now on; return whether it is booked as holding so many GPUs."""
        holdings = self.holdings.get(worker, ())
        if len(holdings) != len(needs):
            return False
        for holding, need in zip(holdings, needs, strict=True):
            holding.needs = need
        return True

    def leave(self, worker: str) -> None:
        self._touch(worker)
        self._drop(worker)
        self.changes += 1

    def open(self, gpu: GpuId, account: Account) -> None:
        """Let a GPU's memory be leased."""
        self.accounts[gpu] = account
        self.changes += 1

    def orphan(self, worker: str, ghost: str) -> None:
        """Move the holdings of a worker that has left to `ghost`: its process may still hold its memory."""
        if holdings := self._drop(worker):
            self._put(ghost, holdings)

    def on(self, gpu: GpuId) -> Mapping[str, Holding]:
        """Return who holds what of a GPU."""
        return self._on_gpu.get(gpu, {})

    def together(self, gpus: Iterable[GpuId]) -> set[GpuId]:
        """Return GPUs with those that workers which lie on one of them lie on besides."""
        found = {*gpus}
        spread = [{holding.gpu for holding in self.holdings[worker]} for worker in self._spread]
        while more := [gpus for gpus in spread if gpus & found and not gpus <= found]:
            found |= set().union(*more)
        return found

    def available(self, gpu: GpuId) -> int:
        """Bytes for leases: the budget without contexts and what is kept beside them."""
        return self.accounts[gpu].budget - sum(h.overhead for h in self.on(gpu).values()) - self.uncounted(gpu)

    def free(self, gpu: GpuId) -> int:
        """Bytes in no lease. Negative where contexts have grown."""
        held = sum(h.overhead + h.booked for h in self.on(gpu).values())
        return self.accounts[gpu].budget - held - self._uncounted.get(gpu, 0)

    def uncounted(self, gpu: GpuId) -> int:
        """Bytes in use by the driver's count that the book can't explain; 0 but within `as_measured`."""
        changing = any(h.asked for h in self.on(gpu).values())  # which may explain it
        return 0 if changing else self._uncounted.get(gpu, 0)

    @contextlib.contextmanager
    def as_measured(self, gpus: Iterable[GpuId]) -> Iterator[None]:
        """Ask the drivers; within this, bytes that the book has free and a driver has not are nobody's to have."""
        self._uncounted = {gpu: max(0, self.free(gpu) - found) for gpu in gpus if (found := self._found_free(gpu)) >= 0}
        try:
            yield
        finally:
            self._uncounted = {}

    def _found_free(self, gpu: GpuId) -> int:
        """Bytes of the budget that the driver finds free; -1 where it tells nothing."""
        account = self.accounts[gpu]
        if (used := account.used()) is None:
            return -1
        pending = sum(h.booked for h in self.on(gpu).values() if h.asked)  # may or may not be in the driver's count yet
        return max(0, account.budget + account.kept - (used - account.foreign) - pending)

    def passing(self, gpu: GpuId, workers: Container[str]) -> int:
        """Bytes in leases of others than these workers, which will be free."""
        return sum(holding.booked for worker, holding in self.on(gpu).items() if worker not in workers)

    def lend(self, worker: str, leases: Sequence[Lease]) -> None:
        """Book a lease that is about to be told, of each of a worker's GPUs."""
        for holding, lease in zip(self.holdings[worker], leases, strict=True):
            if lease.bytes > holding.booked + max(0, self.free(holding.gpu)):
                raise AssertionError(f"a lease of {lease.bytes} bytes would pass the budget of GPU {holding.gpu}")
            holding.asked = lease
        self._touch(worker)

    def _touch(self, worker: str) -> None:
        """Note that a driver's earlier count of a worker's GPUs is not as the book has it now."""
        now = time.monotonic()
        self.touched.update((holding.gpu, now) for holding in self.holdings.get(worker, ()))

    def settled(self, worker: str, leases: Sequence[Lease], kept: Sequence[int]) -> None:
        """Book that a worker has what `leases` say, and holds `kept` beside it; no `kept` is nothing."""
        holdings = self.holdings[worker]
        for holding, lease, left in zip(holdings, leases, kept or [0] * len(holdings), strict=True):
            holding.lease, holding.weight_bytes, holding.asked = lease.bytes, lease.weight_bytes, None
            holding.keeps(left)
            holding.since = time.monotonic()
        self._touch(worker)

    def borrow(self, worker: str, size: int) -> None:
        """Note that a worker on one GPU is asked to lend; the bytes are its own until it has."""
        (holding,) = self.holdings[worker]
        holding.loan = Loan(size)

    def lent(self, worker: str, size: int) -> bool:
        """Book what a worker has lent, 0 if it couldn't; return False for more than it has."""
        holdings = self.holdings.get(worker, ())
        if len(holdings) != 1 or size > holdings[0].lease:
            return False
        holdings[0].loan = Loan(size, given=True) if size else None
        self._touch(worker)
        return True

    def return_loan(self, worker: str, missing: int) -> int:
        """Book that a worker has again what it lent, before it is told; return the bytes of its lease.

        What is `missing` of the loan is in its lease no more.
        """
        (holding,) = self.holdings[worker]
        size = max(0, holding.loan.bytes - missing) if holding.loan else 0
        if size > max(0, self.free(holding.gpu)):
            raise AssertionError(f"a loan of {size} bytes is not free on GPU {holding.gpu} yet")
        holding.loan, holding.lease = None, holding.lease - missing
        self._touch(worker)
        return holding.lease

    def has_worked(self, worker: str, contexts: Sequence[int]) -> None:
        """Book a worker's contexts, measured anew after a task."""
        for holding, context in zip(self.holdings.get(worker, ()), contexts, strict=False):
            if context:
                holding.worked, holding.context = True, context

    # -- workspace ------------------------------------------------------------------------------

    def workspace(self, stage: Stage, model: ModelKey, recipe: Recipe, needs: WeightNeed) -> int:
        """Bytes of a GPU that a task takes beside its stage's weights: as seen, or else an estimate that errs high."""
        if not needs.workspace:
            return 0
        seen = self.learned.get(workspace_key(stage, model, recipe))
        if seen is not None:
            return int(seen * MARGIN) + ROUNDING
        size = pixels_at_once(stage, recipe)
        if others := self._sizes(stage, model):
            pixels, bytes_ = max(others)
            return int(bytes_ * max(FIXED_PART, size / pixels) * UNSEEN) + ROUNDING
        return int(needs.workspace * max(0.25, size / MEGAPIXEL))

    def _sizes(self, stage: Stage, model: ModelKey) -> Collection[tuple[int, int]]:
        return self._seen.get(place_key(stage, model), {}).values()

    def _note(self, key: str, size: int) -> None:
        *place, _, pixels = json.loads(key)
        self._seen.setdefault(json.dumps(place), {})[key] = pixels, size

    def learn(self, stage: Stage, model: ModelKey, recipe: Recipe, size: int) -> str | None:
        """Remember what a task took; its key where that is news."""
        key = workspace_key(stage, model, recipe)
        if size <= self.learned.get(key, 0) * WORTH_LEARNING:
            return None
        self.learned[key] = size
        self._note(key, size)
        return key

    def after_shortage(self, worker: str) -> int:
        """Bytes to be learned of a task that found too little: it shall have MORE next time."""
        room = min(holding.room for holding in self.holdings[worker])
        return max(1, int((room * MORE - ROUNDING) / MARGIN))

    def need(self, worker: str, holding: Holding, stage: Stage, model: ModelKey) -> Need:
        """Return a worker's need of a GPU, with the largest workspace that was seen, or else with what it has now."""
        needs = holding.needs
        if needs.workspace and (sizes := self._sizes(stage, model)):
            workspace = int(max(size for _, size in sizes) * MARGIN) + ROUNDING
        elif holding.lease and not holding.asked:
            workspace = holding.room
        else:
            workspace = needs.workspace
        if stage == "vae":
            workspace = min(workspace, max(0, self.most_workspace(worker)))
        spread = len(self.holdings[worker]) > 1
        alone = not spread and holding.jobs == 1
        lends, momentary = alone and TRAITS[stage].lends, alone and TRAITS[stage].momentary
        return Need(needs.weights, needs.least, workspace * holding.jobs, spread, lends, momentary)

    def most_workspace(self, worker: str) -> int:
        """Bytes for a task beside a worker's weights with as much of them streamed as can be, its GPUs to itself."""
        return min((self.available(h.gpu) - h.needs.least) // h.jobs for h in self.holdings[worker])

    def certain(self, stage: Stage, model: ModelKey, recipe: Recipe) -> int:
        """Bytes of workspace that a task takes for certain: as much as one of its size or smaller took."""
        size = pixels_at_once(stage, recipe)
        return max((bytes_ for pixels, bytes_ in self._sizes(stage, model) if pixels <= size), default=0)
