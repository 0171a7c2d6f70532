"""Where a component's weights are: in (all on the device), streamed (a part, the rest passing through), or out.

The device holds copies of what lies in host memory, so letting go of them copies nothing back. A result has the same
bits in every residency: only where weights lie changes, never what is computed.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch

from protocol.errors import DoesNotFit
from protocol.units import format_bytes
from workers.lanes import lane_for
from workers.mapped import host_weights, page_lock
from workers.modulation import Call, Modulation, Results, Watch
from workers.streaming import Block, Ring, StreamPlan, plan_stream, room, view_of

State = Literal["in", "streamed", "out"]
Foresee = Callable[[Results], Sequence[Call]]


class Residency:
    """The weights of one component, which was loaded into host memory. `device` is where it runs."""

    def __init__(self, name: str, module: torch.nn.Module, device: torch.device) -> None:
        self.name, self.module, self.device = name, module, device
        self.state: State = "out"
        self.seconds = 0.0  # of the last swap
        weights = host_weights(module, name)
        locked = device.type == "cuda" and page_lock(weights)
        self._host = weights.tensors
        self._parameters = dict(module.named_parameters())
        self._lane = lane_for(device, locked)
        self._rows = block_rows(module)
        self.blocks = streamable(module, self._rows)
        self.total_bytes = sum(room(tensor.nbytes) for tensor in self._host.values())  # that it takes to be in
        self._slab: torch.Tensor | None = None
        self._ring: Ring | None = None
        self.modulation: Modulation | None = None  # once a job has shown it
        self._seen: Watch | None = None  # the first job, to learn from
        self._learned = False
        self.plan: StreamPlan | None = None  # of the last swap-in, if it streams
        self._budget = 0

    @property
    def device_bytes(self) -> int:
        """Of weights on the device now, the ring included."""
        if self.state == "out":
            return 0
        ring = self._ring.memory.nbytes if self._ring else 0
        buffer = self.modulation.buffer_bytes if self.modulation and self.state == "streamed" else 0
        return (0 if self._slab is None else self._slab.nbytes) + ring + buffer

    def swap_in(self, budget: int) -> None:
        """Bring the weights to the device in at most `budget` bytes, streaming as little as that allows; DoesNotFit."""
        self.swap_out()
        start = time.perf_counter()
        self._budget = budget
        streamed: set[str] = set()
        self.plan = self._plan(budget) if self.total_bytes > budget else None
        if self.plan:
            streamed = {name for piece in self.plan.pieces for name in piece}
            if self.modulation:
                streamed |= self.modulation.weights
                self.modulation.swap_in()
        self._copy_in([name for name in self._host if name not in streamed])
        self._move_buffers()
        if self.plan:
            blocks = [self.module.get_submodule(row) for row in self._rows]
            self._ring = Ring(self.plan, blocks, self._parameters, self._host, self._lane)
        self._lane.synchronize()
        self.state = "streamed" if self.plan else "in"
        self.seconds = time.perf_counter() - start

    def _plan(self, budget: int) -> StreamPlan:
        plan = self._plan_with(self.modulation, budget)
        if plan is None:
            raise DoesNotFit(
                f"{self.name} has {format_bytes(self.total_bytes)} of weights, and {format_bytes(budget)} are too few "
                "even to stream them through.",
                "Give it more memory, more GPUs, or the CPU.",
            )
        return plan

    def _plan_with(self, modulation: Modulation | None, budget: int) -> StreamPlan | None:
        blocks, total = self.blocks, self.total_bytes
        if modulation:
            once = modulation.weights
            blocks = [Block(b.name, {n: size for n, size in b.weights.items() if n not in once}) for b in blocks]
            total += modulation.buffer_bytes - sum(room(self._host[name].nbytes) for name in once)
        return plan_stream(blocks, total, budget)

    def swap_out(self) -> None:
        """Let go of the device's copies; the weights are those in host memory again."""
        if self.state == "out":
            return
        start = time.perf_counter()
        self._lane.synchronize()
        if self._ring:
            self._ring.close()
        if self.modulation:
            self.modulation.end()
        for name, parameter in self._parameters.items():
            parameter.data = self._host[name]
        self._ring = self._slab = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.state = "out"
        self.seconds = time.perf_counter() - start

    def resume(self) -> None:
        """Be as before the last swap-out."""
        if self.state == "out":
            self.swap_in(self._budget)

    def start(self) -> None:
        """Before a run: let the first blocks' weights be on their way."""
        if self._ring:
            self._ring.start()

    @contextlib.contextmanager
    def job(self, foresee: Foresee | None) -> Iterator[None]:
        """Around a job. `foresee(results)` gives the forwards that it will make, if each gives such results;
        without it, or until one job was watched, modulation weights are streamed like others."""
        if self.state == "streamed" and self._seen and not self._learned:
            self._learn(self._seen)
        self.start()
        if self.state == "streamed" and foresee and self.modulation:
            self.modulation.begin(foresee(self.modulation.results))
            try:
                yield
            finally:
                self.modulation.end()
        elif self.state == "streamed" and foresee and not self._learned:
            with Watch(self.module, self._rows) as watch:
                yield
            self._seen = watch
        else:
            yield

    def _learn(self, watch: Watch) -> None:
        """Let jobs run their modulation ahead from now on, and stream the less."""
        self._learned = True
        if not (layers := watch.layers()):
            return
        assert watch.results is not None
        modulation = Modulation(self.module, self._rows, layers, watch.results, self._host, self._lane)
        after = self._plan_with(modulation, self._budget)
        if self.plan and after and after.streamed_bytes < self.plan.streamed_bytes:
            self.modulation = modulation
            self.swap_in(self._budget)

    def _copy_in(self, names: list[str]) -> None:
        """One piece of device memory for all that stays, filled at the speed of the link."""
        size = sum(room(self._host[name].nbytes) for name in names)
        self._slab = torch.empty(size, dtype=torch.uint8, device=self.device)
        offset, copies = 0, []
        for name in names:
            source = self._host[name]
            place = view_of(self._slab, offset, source)
            offset += room(source.nbytes)
            copies.append((place, source))
            self._parameters[name].data = place
        self._lane.wait(self._lane.copy(copies, self._lane.mark()))

    def _move_buffers(self) -> None:
        """Buffers are small, not in the checkpoint, and stay where the module runs."""
        for module in self.module.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device != self.device:
                    module._buffers[name] = buffer.to(self.device)


def block_rows(module: torch.nn.Module) -> list[str]:
    """Names of the modules that run one after the other: the items of the outermost ModuleLists, in order."""
    rows: list[str] = []
    lists: list[str] = []
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists.append(name)
            rows += [f"{name}.{i}" for i, item in enumerate(part) if any(True for _ in item.parameters())]
    return rows


def streamable(module: torch.nn.Module, rows: Sequence[str]) -> list[Block]:
    """Blocks by the bytes of their own weights; those that others share stay on the device."""
    users = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    return [
        Block(
            row,
            {
                f"{row}.{name}": parameter.nbytes
                for name, parameter in module.get_submodule(row).named_parameters()
                if users[id(parameter)] == 1
            },
        )
        for row in rows
    ]
