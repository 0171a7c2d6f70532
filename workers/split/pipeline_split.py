"""A denoiser cut over several GPUs: a residency for each part of its blocks, and several jobs that go through them.

Inputs find their way by accelerate's hooks. Modulation runs ahead as in a model on one GPU, once a job has shown which
layers that are: jobs go alone until then.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import recursively_apply

from protocol.errors import BadRequest
from workers.split.device_gates import DeviceGates
from workers.weights.block_graphs import BlockGraphs
from workers.weights.copy_stream import CopyStreams, copy_stream_for
from workers.weights.cuda_graphs import JobKind
from workers.weights.forward_trace import around_blocks
from workers.weights.modulation import PrecomputedJob
from workers.weights.precompute import JobForwards, Precompute
from workers.weights.residency import Residency, block_rows

SWITCH_SECONDS = 0.0005  # until one thread's job lets another's go on, which has a GPU waiting; Python's own is 0.005


class Moved(threading.local):
    """Tensors that one thread's job has brought to a GPU in this pass, by the original's identity."""

    def __init__(self) -> None:
        self.copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}


class Arrival(ModelHook):  # type: ignore[misc]  # accelerate has no types
    """Brings a module's inputs to its GPU: what many blocks share, once a pass."""

    def __init__(self, device: torch.device, moved: Moved) -> None:
        self.execution_device, self._moved = device, moved

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return recursively_apply(self._bring, args), recursively_apply(self._bring, kwargs)

    def _bring(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device == self.execution_device:
            return tensor
        copies = self._moved.copies
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor, tensor.to(self.execution_device)
        return copies[id(tensor)][1]


class Return(ModelHook):  # type: ignore[misc]
    """Brings a model's result to its first GPU, where pipelines have their latents."""

    def __init__(self, device: torch.device) -> None:
        self.execution_device = device

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        return recursively_apply(lambda tensor: tensor.to(self.execution_device), output)


class Current(threading.local):
    """The state of one thread's job."""

    ahead: PrecomputedJob | None = None
    stay: "Stay | None" = None


@dataclass(slots=True, eq=False)
class Stay:
    """The stay of a job among others, with the most that there were at once."""

    most: int = 1


class JobGate:
    """A gate for jobs at once, and now and then for one that must be alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: list[Stay] = []
        self._wanting = 0
        self._alone = False

    @property
    def several(self) -> bool:
        """Return whether more than one job is inside."""
        return len(self._inside) > 1

    @contextlib.contextmanager
    def joined(self, must_be_alone: Callable[[], bool]) -> Iterator[Stay]:
        """Join the jobs inside; the answer of `must_be_alone` may change while this waits."""
        with self._changed:
            if must_be_alone():
                self._wanting += 1
                self._changed.wait_for(lambda: not self._alone and (not self._inside or not must_be_alone()))
                self._wanting -= 1
            else:
                self._changed.wait_for(lambda: not self._alone and not self._wanting)
            self._alone = alone = must_be_alone()
            self._inside.append(stay := Stay())
            for other in self._inside:
                other.most = max(other.most, len(self._inside))
        try:
            yield stay
        finally:
            with self._changed:
                self._inside.remove(stay)
                self._alone = False if alone else self._alone
                self._changed.notify_all()


class PipelineSplit:
    """A denoiser cut into `parts`: the devices, each with its number of blocks, and with its bytes for weights."""

    def __init__(
        self,
        name: str,
        module: torch.nn.Module,
        parts: Sequence[tuple[torch.device, int, int]],
        leased: bool = False,
        copy_stream: CopyStreams = copy_stream_for,
    ) -> None:
        """Cut a module in host memory, where it stays if memory is to be `leased`; BadRequest or DoesNotFit."""
        self.module, self.rows = module, block_rows(module)
        self.places = places_of(module, [count for _, count, _ in parts])
        devices = [device for device, _, _ in parts]
        moved = [Moved() for _ in parts]
        for part, number in self.places.items():
            add_hook_to_module(module.get_submodule(part), Arrival(devices[number], moved[number]))
        add_hook_to_module(module, Return(devices[0]))
        self.residencies = [
            Residency(f"{name}, part {number + 1}", module, device, False, self._elsewhere(number), copy_stream)
            for number, device in enumerate(devices)
        ]
        for residency, (_, _, room) in zip(self.residencies, parts, strict=True):
            if not leased:
                residency.swap_in(min(residency.total_bytes, room))
        self.gates = DeviceGates(module, [(device, count) for device, count, _ in parts], self._turn)
        sys.setswitchinterval(min(SWITCH_SECONDS, sys.getswitchinterval()))
        self._moved, self._current = moved, Current()
        self._job_gate = JobGate()
        for residency in self.residencies:
            residency.block_graphs = BlockGraphs(
                residency.row_modules, residency.device, len(parts), lambda: self._job_gate.several
            )
        self._precompute = Precompute(self.residencies, self.rows, several=True)
        self._shapes: set[Hashable] = set()  # of jobs that were made

    def _elsewhere(self, number: int) -> list[str]:
        """Return what is not in a part; the model's own weights, which are of no module, are in the first."""
        own = [
            name for name, _ in (*self.module.named_parameters(recurse=False), *self.module.named_buffers("", False))
        ]
        return [part for part, at in self.places.items() if at != number] + (own if number else [])

    @property
    def compiled(self) -> bool:
        return any(residency.compiled for residency in self.residencies)

    def map(self) -> list[tuple[str, str]]:
        """Return the place of each module; parts that a CPU plays are told by their numbers."""
        devices = [residency.device for residency in self.residencies]
        names = [str(d) if d.type == "cuda" else f"{d} (part {n + 1})" for n, d in enumerate(devices)]
        return [(part, names[number]) for part, number in self.places.items()]

    @contextlib.contextmanager
    def job(
        self, model: torch.nn.Module, forwards: JobForwards, shape: Hashable, kind: JobKind | None = None
    ) -> Iterator[None]:
        """Surround a job of `model`, one of those that share the blocks, in this thread.

        One to learn from is alone; so is the first of a `shape` where blocks are compiled, since torch compiles in one
        thread at a time, and one that finds out whether blocks of jobs of its size should have CUDA graphs.
        """
        graphs = [residency.block_graphs for residency in self.residencies if residency.block_graphs]

        def new() -> bool:
            compiles = self.compiled and shape not in self._shapes
            return (self._to_learn() and forwards.whole) or compiles or any(one.untried(kind) for one in graphs)

        @contextlib.contextmanager
        def with_graphs() -> Iterator[None]:
            with contextlib.ExitStack() as stack:
                for one in graphs:
                    stack.enter_context(one.job(kind))
                yield

        with self.gates.job(), self._job_gate.joined(new) as self._current.stay, self._left_behind():
            if self._to_learn() and self.compiled:
                self._precompute.rehearse(model, forwards)
            if self._to_learn() and forwards.whole:
                with self._precompute.watch(model), with_graphs():
                    yield
                self.gates.leave()
                if self._precompute.trace:
                    self._precompute.learn(self._precompute.trace)
            elif self._precompute.active:
                with self._precompute.ahead(model, forwards, self.gates.first) as self._current.ahead, with_graphs():
                    yield
            else:
                with with_graphs():
                    yield
            self._shapes.add(shape)

    @property
    def company(self) -> int:
        """The most jobs that were at once during this thread's last one."""
        return self._current.stay.most if self._current.stay else 1

    @contextlib.contextmanager
    def to_oneself(self) -> Iterator[None]:
        """Wait until no job is on its way, and let none begin meanwhile."""
        with self._job_gate.joined(lambda: True):
            yield

    def _to_learn(self) -> bool:
        streams = any(residency.state == "streamed" for residency in self.residencies)
        return not self._precompute.learned and (self.compiled or streams)

    @contextlib.contextmanager
    def _left_behind(self) -> Iterator[None]:
        """Let go of what a job has brought to its GPUs."""
        try:
            yield
        finally:
            self._current.ahead = None
            for moved in self._moved:
                moved.copies.clear()

    def _turn(self, number: int) -> None:
        """Give this thread's job its turn in a part."""
        self._moved[number].copies.clear()
        ahead, modulation = self._current.ahead, self.residencies[number].modulation
        if ahead and modulation:
            modulation.turn(ahead)


def places_of(model: torch.nn.Module, counts: Sequence[int]) -> dict[str, int]:
    """The part that each module belongs to: blocks by the cut, what comes before them to the first, what after last."""
    rows = block_rows(model)
    if sum(counts) != len(rows) or min(counts) < 1:
        raise BadRequest(
            f"--cut gives {', '.join(map(str, counts))} blocks; there are {len(rows)}, and each part takes one.",
            "Leave it out, and they are spread by bytes.",
        )
    before, after = around_blocks(model, rows)
    placed = tuple(f"{name}." for name in (*rows, *before, *after))
    if left := [name for name, _ in model.named_parameters() if "." in name and not name.startswith(placed)]:
        raise BadRequest(f"{left[0]} lies beside the blocks: this model can't be cut.", "Leave --cut out.")
    numbers = [number for number, count in enumerate(counts) for _ in range(count)]
    return dict.fromkeys(before, 0) | dict(zip(rows, numbers, strict=True)) | dict.fromkeys(after, len(counts) - 1)
