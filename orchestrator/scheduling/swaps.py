"""Swaps of leases on GPUs whose workers can't all be in at once. Pure, as the scheduler is.

The worker that is in goes on until its queue is empty, unless another's task and its own turn have lasted for longer
than `patience`. None is sent away where there is room. One that streams more than it has to gets more room, where
several tasks wait for it and no other worker wants that. What fits beside all others for good comes in before there is
work. What is needed for a moment is borrowed from a worker that lends, and goes back when no task waits for it.
"""

from collections.abc import Collection, Mapping, Sequence

from orchestrator.memory.lease_sizes import LeaseSize, Need, lease_sizes
from orchestrator.scheduling.snapshot import (
    NOTHING,
    ChangeLease,
    GpuSpace,
    LeasedWorker,
    ReturnLoan,
    Snapshot,
    TakeLoan,
    Want,
    stand_in,
    waiting_at,
)
from protocol.gpu_memory import GpuId, Lease

WORTH_A_SWAP = 0.1  # of a worker's weights in place, more than before
MANY = 3  # tasks that share a loan, for all weights to come in for them rather than to be streamed for each


class Swaps:
    """The swaps on GPUs that belong together.

    The outcome: leases `lent`, `loans` taken and returned, and workers `yielding`, which get no more tasks.
    """

    def __init__(
        self,
        spaces: Mapping[GpuId, GpuSpace],
        holders: Sequence[LeasedWorker],
        wants: Sequence[Want],
        idle: Collection[str],
        working: Collection[str],
        busiest: Collection[str],
        snapshot: Snapshot,
    ) -> None:
        self.holders, self.idle, self.patience, self.snapshot = holders, {*idle}, snapshot.patience, snapshot
        self.working, self.busiest = working, busiest
        self.lenders = [holder for holder in holders if holder.loan and holder.loan.given]
        self.available = {gpu: room.available for gpu, room in spaces.items()}
        self.passing = {gpu: room.passing for gpu, room in spaces.items()}
        self.wants = sorted(wants, key=self._urgency)
        self.needs: dict[GpuId, dict[str, Need]] = {gpu: {} for gpu in spaces}
        stand_ins = {holder.id: other for holder in holders if (other := self._stand_in(holder))}
        for holder in holders:
            for gpu, demand in holder.demands.items():
                if holder.id not in stand_ins:
                    self.needs[gpu][holder.id] = demand.need
        for want in wants:
            for gpu in want.holder.demands:
                self.needs[gpu][want.holder.id] = want.need(gpu)
        self.lease_sizes = {gpu: lease_sizes(room.available, self.needs[gpu]) for gpu, room in spaces.items()}
        for holder in holders:
            if other := stand_ins.get(holder.id):  # it takes no room of its own
                for gpu in holder.demands:
                    sizes = self.lease_sizes[gpu]
                    sizes.setdefault(holder.id, sizes.get(other.id, LeaseSize(0, 0)))
        self.lent_free = {gpu: self._lent_free(gpu, room) for gpu, room in spaces.items()}  # only for those that borrow
        self.free = {gpu: room.free - self.lent_free[gpu] for gpu, room in spaces.items()}
        self.lent: list[ChangeLease] = []
        self.loans: list[TakeLoan | ReturnLoan] = []
        self.yielding: set[str] = set()

    def _lent_free(self, gpu: GpuId, space: GpuSpace) -> int:
        """Return the free bytes of a GPU that are a loan's."""
        here = [holder for holder in self.holders if gpu in holder.demands]
        lent = sum(holder.loan.bytes for holder in here if holder.loan and holder.loan.given)
        borrowed = sum(holder.demands[gpu].lease for holder in here if self._size(holder, gpu).borrows)
        return max(0, min(space.free, lent - borrowed))

    def _free_for(self, holder: LeasedWorker, gpu: GpuId) -> int:
        """Return the bytes of a GPU that a worker may have beside its lease."""
        return self.free[gpu] + (self.lent_free[gpu] if self._size(holder, gpu).borrows else 0)

    def _take(self, gpu: GpuId, size: int) -> None:
        """Count bytes as taken, those of a loan first."""
        of_loan = min(size, self.lent_free[gpu])
        self.lent_free[gpu] -= of_loan
        self.free[gpu] -= size - of_loan

    def plan(self) -> None:
        for want in self.wants:
            if self._called_back(want.holder):
                continue  # what it has borrowed was lent for long enough
            if not self._grant(want) and not self._borrow(want):
                self._make_room(want)
        wanting = {want.holder.id for want in self.wants}
        for holder in self._idle_holders():
            if holder.expired and holder.id not in wanting and holder.id not in self.working:
                self._take_back(holder)
        self._return_loans()
        if not self.wants:
            self._widen()
            self._settle_down()
        for gpu in [gpu for gpu, free in self.free.items() if free < 0]:  # contexts have grown
            there = [holder for holder in self._idle_holders() if gpu in holder.demands]
            if there and not any(self._lies_on(lend.worker, gpu) for lend in self.lent):
                self._take_back(max(there, key=lambda holder: holder.demands[gpu].lease))

    def _widen(self) -> None:
        """Lend more room to workers that have streamed more than they would have to, before their next task.

        That takes a copy of their weights, which several tasks share; or nobody waits for it, and all come in.
        """
        for holder in self._idle_holders():
            sizes = {gpu: self._size(holder, gpu).exclusive for gpu in holder.demands}
            weights = {gpu: min(s.need.weights, sizes[gpu] - s.need.workspace) for gpu, s in holder.demands.items()}
            more = sum(weights[gpu] - demand.weight_bytes for gpu, demand in holder.demands.items())
            whole = all(weights[gpu] == demand.need.weights for gpu, demand in holder.demands.items())
            if holder.id in self.busiest:
                worth = more >= WORTH_A_SWAP * holder.weights or (more > 0 and whole)
            else:
                worth = more > 0 and whole and holder.id not in self.working and not holder.expired
            untried = holder.refused is None or sum(sizes.values()) < holder.refused
            if worth and untried and self._fits(holder, sizes):
                self._lend(holder, sizes, weights)
                self.yielding.add(holder.id)

    def _settle_down(self) -> None:
        """Lend at once to workers that will never have to go."""
        moved = {lend.worker for lend in self.lent}
        for holder in self.holders:
            waits = holder.lasting and holder.id in self.idle and not holder.lease and holder.id not in moved
            if waits and not self._stand_in(holder) and all(self._for_good(holder, gpu) for gpu in holder.demands):
                sizes = {gpu: self._size(holder, gpu).shared for gpu in holder.demands}
                if self._fits(holder, sizes):
                    self._lend(holder, sizes, {gpu: demand.need.weights for gpu, demand in holder.demands.items()})

    def _stand_in(self, holder: LeasedWorker) -> LeasedWorker | None:
        """Return another model's worker that does what a worker would do, if it is in or comes in first."""
        place = self.snapshot.place
        if place(holder) not in self.snapshot.common:
            return None
        there = [other for other in self.holders if place(other) == place(holder)]
        return stand_in(holder, there, lambda other: other.refused is None)

    def _for_good(self, holder: LeasedWorker, gpu: GpuId) -> bool:
        size = self._size(holder, gpu).shared
        turns = [self.lease_sizes[gpu][other].exclusive for other in self.needs[gpu] if other != holder.id]
        return size == self.needs[gpu][holder.id].whole and size + max(turns, default=0) <= self.available[gpu]

    def _urgency(self, want: Want) -> tuple[bool, float, int]:
        """Return a sort key: tasks that waited too long first, else those nearest to their end.

        Of those that waited too long first the one whose worker has been out for longest meanwhile: no model or stage
        comes behind all the jobs of another that came before its own.
        """
        late = self._overdue(want)
        return not late, -min(want.task.waited, want.holder.held) if late else 0.0, want.task.distance

    def _overdue(self, want: Want) -> bool:
        return want.task.waited > self.patience

    def _grant(self, want: Want) -> bool:
        """Lend as much as there is for it; at most its exclusive size, at least its shared one."""
        holder, sizes = want.holder, {}
        for gpu, demand in holder.demands.items():
            lease_size = self._size(holder, gpu)
            least = lease_size.shared
            if lease_size.borrows:  # all that there is, if it is enough
                there = min(lease_size.exclusive, demand.lease + self._free_for(holder, gpu))
                least = there if there >= want.need(gpu).small else 0
            for size in (lease_size.exclusive, least):
                if size and size - demand.lease <= self._free_for(holder, gpu):
                    sizes[gpu] = size
                    break
            else:
                return False
        if holder.id not in self.idle:
            self.yielding.add(holder.id)  # until its other jobs are done
            return False
        space = want.task.workspace * holder.jobs
        weights = {gpu: min(demand.need.weights, sizes[gpu] - space) for gpu, demand in holder.demands.items()}
        self._lend(holder, sizes, weights)
        return True

    def _borrow(self, want: Want) -> bool:
        """Borrow what is missing for a task that takes a moment; return whether that is how it gets it.

        One that is not nearer to its job's end than what the lender does next waits, until nothing waits for the
        lender: then many share a loan, which is large.
        """
        for gpu, demand in want.holder.demands.items():
            if not self._size(want.holder, gpu).borrows:
                return False
            there = [holder for holder in self.holders if gpu in holder.demands]
            if loans := [holder.loan for holder in there if holder.loan]:
                if demand.lease and all(loan.given for loan in loans):  # too small a loan goes back first
                    self._take_back(want.holder)
                return True
            if {loan.worker for loan in self.loans} & {holder.id for holder in there}:
                return True  # another's comes first
            has, need = demand.lease + self._free_for(want.holder, gpu), want.need(gpu)
            lenders = [holder for holder in self._in_lease() if holder in there and holder.lendable >= need.small - has]
            if not lenders:
                return False
            lender = max(lenders, key=lambda holder: (holder.id not in self.working, holder.lendable, holder.id))
            if self._goes_first(lender, want):
                return True
            many = waiting_at(self.snapshot.place(want.task), self.snapshot) >= MANY
            size = max(need.small, min(need.whole, has + lender.lendable)) if many else need.small
            self.loans.append(TakeLoan(lender.id, size - has))
            self.yielding.add(lender.id)
            self.idle.discard(lender.id)
        return True

    def _goes_first(self, lender: LeasedWorker, want: Want) -> bool:
        """Return whether a lender can do its next task before a task for which it would lend.

        That is one no further from its end; or one of another model, where the lender has had nothing to do for too
        long, and for longer than the borrower: however many jobs wait for it, a lender that is at work is not late. One
        that was called back in the middle of a task goes on with it for as long as it had lent, before it lends to
        other models.
        """
        waiting = self.snapshot.waiting.get(self.snapshot.place(lender), ())
        tasks = [task for task in waiting[:1] if lender.covers(task)]
        nearer = any(task.distance <= want.task.distance for task in tasks) and not self._overdue(want)
        out = min(want.task.waited, want.holder.held)
        late = any(min(task.waited, lender.idle_for) > max(self.patience, out) for task in tasks)
        goes_on = lender.busy and lender.back_for < self.patience
        return nearer or (lender.model != want.task.model and (late or goes_on))

    def _called_back(self, holder: LeasedWorker) -> bool:
        """Return whether what a borrower works in was lent for longer than patience, after which it goes back once."""
        return any(
            lender.lent_for > self.patience and self._size(holder, gpu).borrows
            for lender in self.lenders if lender.id != holder.id
            for gpu in lender.demands if gpu in holder.demands
        )  # fmt: skip

    def _return_loans(self) -> None:
        """Return what nobody needs any more, once it is free again.

        What borrowers' processes keep, and what other programs took meanwhile, the lender does without. Where borrowers
        always have more to do, they give it back all the same once the lender's patience has ended.
        """
        for lender in self.lenders:
            for gpu in lender.demands:
                size = lender.loan.bytes if lender.loan else 0
                missing = size - min(size, max(0, self.free[gpu] + self.lent_free[gpu]))
                changing = any(self._lies_on(lend.worker, gpu) for lend in self.lent)
                borrowers = [h for h in self.holders if h.id != lender.id and self._above(h, gpu)]
                if not missing or not (changing or borrowers or self.passing[gpu]):
                    self._take(gpu, size - missing)
                    self.loans.append(ReturnLoan(lender.id, missing))
                    continue
                rest = {want.holder.id for want in self.wants} | (self.idle - {*self.working})
                for holder in self._in_lease():
                    if holder not in borrowers:
                        continue
                    if holder.id in self.idle and (holder.id in rest or self._called_back(holder)):
                        self._take_back(holder)  # or the loan is too small for what it has to do
                    elif self._called_back(holder):
                        self.yielding.add(holder.id)

    def _above(self, holder: LeasedWorker, gpu: GpuId) -> bool:
        """Return whether a worker holds more of a GPU than it may keep whatever others do."""
        return gpu in holder.demands and holder.demands[gpu].lease > self._size(holder, gpu).shared

    def _make_room(self, want: Want) -> None:
        """Take back what others don't need now; for an overdue task what they need, too, once they are free."""
        missing: dict[GpuId, int] = {}
        for gpu, demand in want.holder.demands.items():
            lease_size = self._size(want.holder, gpu)
            if not lease_size.exclusive:
                return
            missing[gpu] = (lease_size.shared or lease_size.exclusive) - demand.lease - self.free[gpu]
        givers = {gpu: self._givers(want, gpu, size) for gpu, size in missing.items() if size > 0}
        if not all(givers.values()):
            return
        gone: set[str] = set()
        for gpu, there in givers.items():
            for holder in sorted(there, key=lambda h: (h.id in self.working, -h.demands[gpu].lease, h.id)):
                if missing[gpu] <= 0:
                    break
                if holder.id in gone:
                    continue
                gone.add(holder.id)
                for other, demand in holder.demands.items():
                    missing[other] = missing.get(other, 0) - demand.lease
                if holder.id in self.idle:
                    self._take_back(holder)
                else:
                    self.yielding.add(holder.id)

    def _givers(self, want: Want, gpu: GpuId, missing: int) -> list[LeasedWorker]:
        """Return workers whose leases of a GPU are enough together; none where none are."""
        lease_size = self._size(want.holder, gpu)
        others = [h for h in self._in_lease() if h.id != want.holder.id and gpu in h.demands]
        resting = [h for h in others if h.id not in self.working]
        above = [h for h in others if self._above(h, gpu)]
        both = [h for h in above if h in resting]
        tired = [h for h in others if h in resting or (self._overdue(want) and h.held > self.patience)]
        above_tired = [h for h in above if h in tired]
        choices = [both, resting, above_tired, tired]
        shared = sum(self.lease_sizes[gpu][other].shared for other in self.needs[gpu] if other != want.holder.id)
        enough = sum(holder.demands[gpu].lease for holder in above) >= missing
        if (lease_size.shared or lease_size.exclusive) + shared <= self.available[gpu] and enough:
            choices = [both, above_tired]  # there is room beside those that stay, once the others are done
        for givers in choices:
            if sum(holder.demands[gpu].lease for holder in givers) >= missing:
                return givers
        return []

    def _size(self, holder: LeasedWorker, gpu: GpuId) -> LeaseSize:
        return self.lease_sizes[gpu][holder.id]

    def _lies_on(self, worker: str, gpu: GpuId) -> bool:
        return any(holder.id == worker and gpu in holder.demands for holder in self.holders)

    def _in_lease(self) -> list[LeasedWorker]:
        moved = {lend.worker for lend in self.lent}
        return [holder for holder in self.holders if holder.id not in moved and holder.lease]

    def _idle_holders(self) -> list[LeasedWorker]:
        return [holder for holder in self._in_lease() if holder.id in self.idle]

    def _fits(self, holder: LeasedWorker, sizes: Mapping[GpuId, int]) -> bool:
        return all(size and size - holder.demands[gpu].lease <= self.free[gpu] for gpu, size in sizes.items())

    def _lend(self, holder: LeasedWorker, sizes: Mapping[GpuId, int], weights: Mapping[GpuId, int]) -> None:
        for gpu, size in sizes.items():
            more = max(0, size - holder.demands[gpu].lease)
            if self._size(holder, gpu).borrows:
                self._take(gpu, more)
            else:
                self.free[gpu] -= more
        leases = tuple(Lease(bytes=sizes[gpu], weight_bytes=weights[gpu]) for gpu in holder.demands)
        self.lent.append(ChangeLease(holder.id, leases))

    def _take_back(self, holder: LeasedWorker) -> None:
        """Take back a worker's lease; the memory is free only once it has given it back."""
        self.lent.append(ChangeLease(holder.id, (NOTHING,) * len(holder.demands)))
        self.yielding.add(holder.id)
