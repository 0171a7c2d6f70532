"""Stand-ins that are as unkind as can be: a copy stream, and forwards that are not all foreseen."""

import threading

import torch

from workers.stages.denoise import PipelineForwards
from workers.weights.copy_stream import Copies, HostCopyStream, Mark
from workers.weights.forward_trace import Call, Results
from workers.weights.page_locks import PageLocks


class Ordered(Mark):
    """The moment when a copy, and all that were ordered before it, are done."""

    __slots__ = ("count",)

    def __init__(self, count: int) -> None:
        super().__init__(None)
        self.count = count


class WorstCopyStream(HostCopyStream):
    """Bytes are gone as soon as a copy over them is ordered, and there only once it is waited for."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.ordered: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.done = 0
        self._lock = threading.Lock()  # one thread copies, another waits

    def copy(self, copies: Copies, after: Mark) -> Mark:
        with self._lock:
            for place, source in copies:
                place.view(torch.uint8).fill_(255)  # NaN in every floating dtype
                self.ordered.append((place, source))
            return Ordered(self.done + len(self.ordered))

    def wait(self, mark: Mark) -> None:
        assert isinstance(mark, Ordered)
        with self._lock:
            count = max(0, mark.count - self.done)
            for place, source in self.ordered[:count]:
                place.copy_(source)
            self.ordered, self.done = self.ordered[count:], self.done + count

    def synchronize(self) -> None:
        self.wait(Ordered(self.done + len(self.ordered)))


def worst_copy_stream(device: torch.device, locks: PageLocks | None) -> WorstCopyStream:
    return WorstCopyStream(device)


class OneForgotten(PipelineForwards):
    def foresee(self, results: Results) -> list[Call]:
        return super().foresee(results)[:-1]
