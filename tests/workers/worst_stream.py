"""Stand-ins that are as unkind as can be: a copy stream, and forwards that are not all foreseen."""

import torch

from workers.stages.denoise import PipelineForwards
from workers.weights.copy_stream import Copies, HostCopyStream, Mark
from workers.weights.forward_trace import Call, Results
from workers.weights.host_weights import PageLocks


class WorstCopyStream(HostCopyStream):
    """Bytes are gone as soon as a copy over them is ordered, and there only once it is waited for."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.ordered: list[tuple[torch.Tensor, torch.Tensor]] = []

    def copy(self, copies: Copies, after: Mark) -> Mark:
        for place, source in copies:
            place.view(torch.uint8).fill_(255)  # NaN in every floating dtype
            self.ordered.append((place, source))
        return Mark(None)

    def wait(self, mark: Mark) -> None:
        for place, source in self.ordered:
            place.copy_(source)
        self.ordered = []


def worst_copy_stream(device: torch.device, locks: PageLocks | None) -> WorstCopyStream:
    return WorstCopyStream(device)


class OneForgotten(PipelineForwards):
    def foresee(self, results: Results) -> list[Call]:
        return super().foresee(results)[:-1]
