"""The residency of a component's weights: in (all on the device), streamed (a part, the rest passing through), or out.

The device holds copies of what lies in host memory, so letting go of them copies nothing back. A result has the same
bits in every residency: only where weights lie changes, never what is computed.

Longer than other files: swapping in and out, with all that has to be undone, is one state.
"""

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch._inductor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from protocol.errors import DoesNotFit
from protocol.units import format_bytes
from workers.weights.adapters import AdapterWeights
from workers.weights.block_graphs import BlockGraphs
from workers.weights.copy_stream import CopyStreams, copy_stream_for
from workers.weights.cuda_graphs import ALL, ForwardGraphs, JobKind
from workers.weights.forward_trace import place_of
from workers.weights.host_weights import host_weights, plain_parameters
from workers.weights.lockstep import Lockstep, in_lockstep
from workers.weights.loose_tensors import LooseTensors
from workers.weights.modulation import Modulation, PrecomputedJob
from workers.weights.page_locks import PageLocks
from workers.weights.precompute import JobForwards, Precompute
from workers.weights.resident_pieces import PIECE_BYTES, ResidentPieces
from workers.weights.sharded import LocalPart, contiguous_strides
from workers.weights.streaming import (
    Block,
    Ring,
    StreamPlan,
    least_bytes,
    plan_stream,
    room,
)

State = Literal["in", "streamed", "out"]

DETERMINISTIC = "deterministic"  # an option of torch.compile


class Residency:
    """The weights of one component, or of a part of it, which was loaded into host memory, where they run."""

    def __init__(
        self,
        name: str,
        module: torch.nn.Module,
        device: torch.device,
        whole: bool = False,
        elsewhere: Sequence[str] = (),
        copy_stream: CopyStreams = copy_stream_for,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        """A component that is used `whole` is never streamed. Modules and weights that are `elsewhere` are not its."""
        self.name, self.module, self.device = name, module, device
        self._elsewhere = tuple(f"{name}." for name in elsewhere)  # prefixes
        self.state: State = "out"
        self.seconds = 0.0  # of the last swap
        self._piece_bytes = piece_bytes
        weights = host_weights(module, name, self.has)
        locks = PageLocks(weights, device) if device.type == "cuda" else None
        self.from_disk = locks is not None and locks.limited
        self._host = weights.tensors
        self._parameters = {name: p for name, p in plain_parameters(module).items() if name in self._host}
        self._quantized = quantized_parameters(module)
        self._copy_stream = copy_stream(device, locks)
        self.rows = [row for row in block_rows(module) if self.has(row)]
        self.blocks = streamable(module, self.rows)
        self._loose = LooseTensors(module, self.has)
        # Bytes that are on the device whenever something is, and are never streamed.
        self._fixed_bytes = self._loose.nbytes + sum(tensor_bytes(parameter) for _, _, parameter in self._quantized)
        # What it takes to be in.
        self.total_bytes = sum(room(tensor.nbytes) for tensor in self._host.values()) + self._fixed_bytes
        self.least_bytes = self.total_bytes if whole else least_bytes(self.blocks, self.total_bytes)  # to be streamed
        self._resident: ResidentPieces | None = None
        self._ring: Ring | None = None
        self.modulation: Modulation | None = None  # once a job has shown it
        self._precompute = Precompute([self], self.rows)
        self._lockstep = Lockstep(self.row_modules, device)
        self.graphs = ForwardGraphs(module, device)
        self.block_graphs: BlockGraphs | None = None  # in their place, of a part of a model
        self.compiled = False
        self.adapters = AdapterWeights(module, device, self._reserve)
        self.plan: StreamPlan | None = None  # of the last swap-in, if it streams
        self._budget = 0

    @property
    def row_modules(self) -> list[torch.nn.Module]:
        """The blocks that run one after the other."""
        return [self.module.get_submodule(row) for row in self.rows]

    @property
    def ring(self) -> Ring | None:
        """What streamed weights pass through now, if there are some."""
        return self._ring

    def has(self, name: str) -> bool:
        """Return whether a parameter or a buffer is among its own."""
        return not f"{name}.".startswith(self._elsewhere)

    @property
    def device_bytes(self) -> int:
        """Bytes of weights on the device now, the ring included."""
        if self.state == "out":
            return 0
        ring = self._ring.memory.nbytes if self._ring else 0
        buffer = self.modulation.buffer_bytes if self.modulation and self.state == "streamed" else 0
        resident = self._resident.nbytes if self._resident else 0
        return resident + ring + buffer + self._fixed_bytes + self.adapters.device_bytes

    @property
    def wanted_bytes(self) -> int:
        """Bytes with which nothing is streamed, and the adapters of any job so far have their room."""
        return self.total_bytes + self.adapters.wanted

    @property
    def taken_bytes(self) -> int:
        """Bytes on the device, and those that are kept for adapters beside."""
        return self.device_bytes - self.adapters.device_bytes + self.adapters.room

    @property
    def lendable_bytes(self) -> int:
        """Bytes of weights that can be lent now."""
        return self._resident.lendable_bytes if self._resident else 0

    def swap_in(self, budget: int) -> None:
        """Bring the weights to the device in at most `budget` bytes, streaming as little as that allows; DoesNotFit."""
        if self.state == "in" and self.total_bytes + self.adapters.room <= budget:
            self._budget = budget
            return
        self.swap_out()
        start = time.perf_counter()
        self._budget = budget
        self.adapters.room = max(0, min(self.adapters.room, budget - self.least_bytes))
        self.plan = self._plan(self._space) if self.total_bytes > self._space else None
        try:
            self._bring_in()
        except BaseException:
            self._let_go()
            raise
        self.state = "streamed" if self.plan else "in"
        self.seconds = time.perf_counter() - start

    @property
    def _space(self) -> int:
        """Bytes of the budget for the model's own weights."""
        return self._budget - self.adapters.room

    def _reserve(self, size: int) -> None:
        """Keep so many bytes of the budget for adapters; where they are not to be had, some more is streamed."""
        self.adapters.room = size
        if self.state != "out":
            self.swap_in(self._budget)

    def _bring_in(self) -> None:
        streamed: set[str] = set()
        if self.modulation:
            self.modulation.stay()
        if self.plan:
            streamed = {name for piece in self.plan.pieces for name in piece}
            if self.modulation:
                streamed |= self.modulation.weights
                self.modulation.pass_through()
        names = [name for name in self._host if name not in streamed]
        self._resident = ResidentPieces(
            self.module, names, self.rows, self._parameters, self._host, self._copy_stream, self._piece_bytes
        )
        self._loose.move_in(self.device)
        for owner, leaf, parameter in self._quantized:
            owner._parameters[leaf] = torch.nn.Parameter(parameter.to(self.device), requires_grad=False)
        if self.plan:
            self._ring = Ring(
                self.plan,
                self.row_modules,
                self._parameters,
                self._host,
                self._copy_stream,
            )
        self._copy_stream.synchronize()

    def _plan(self, budget: int) -> StreamPlan:
        plan = self._plan_with(self.modulation, budget) if budget >= self.least_bytes or self.modulation else None
        if plan is None and self.modulation and not self.modulation.in_place and budget >= self.least_bytes:
            self.modulation = None  # whose buffer takes more than there is: it is streamed with the rest
            plan = self._plan_with(None, budget)
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
        self._budget = 0
        if self.state == "out":
            return
        start = time.perf_counter()
        self._let_go()
        self.state = "out"
        self.seconds = time.perf_counter() - start

    def _let_go(self) -> None:
        for graphs in [*ALL]:  # whatever one module lets go of, another's graph may read: classes keep tensors, too
            graphs.drop()
        self._copy_stream.synchronize()
        self.adapters.let_go()
        if self.modulation:
            self.modulation.forget()
        for part in (self._ring, self._resident):
            if part:
                part.close()
        for name, parameter in self._parameters.items():
            parameter.data = self._host[name]
        for owner, leaf, parameter in self._quantized:
            owner._parameters[leaf] = parameter
        self._loose.let_go(self.device)
        self._ring = self._resident = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def drop_graphs(self) -> None:
        """Let go of all CUDA graphs of the module, since weights are about to move; between two forwards."""
        self.graphs.drop()
        if self.block_graphs:
            self.block_graphs.drop()

    def lend(self, size: int) -> None:
        """Let go of about `size` bytes of weights until `take_again`, if there are as many; between two forwards."""
        if self._resident:
            self.drop_graphs()
            self._copy_stream.synchronize()
            self._resident.let_go(size)

    def take_again(self) -> None:
        """Bring back what was lent, beside the next forward where its blocks are streamed anyway."""
        if self._resident:
            self._resident.take_again(beside=self._ring is not None)

    def start(self) -> None:
        """Send the first blocks' weights on their way, before a run."""
        if self._ring:
            self._ring.start()

    def compile(self, backend: str = "inductor") -> None:
        """Compile what each block computes, from its next run on. Bits differ from uncompiled ones by rounding."""
        compile_blocks(self.module, self.rows, backend)
        self.compiled = True

    @contextlib.contextmanager
    def job(self, forwards: JobForwards | None, in_steps: bool = False, kind: JobKind | None = None) -> Iterator[None]:
        """Surround a job. Without its `forwards`, or before one was traced, modulation weights are streamed, too.

        A denoiser is run `in_steps`: the forwards of one share a pass of the streamed weights. Where all are in, jobs
        of a `kind`, unless that is None, may use CUDA graphs: all that is not given to forwards is the same in them.
        """
        if self.state == "out" and self._budget:  # what the job before changed to did not fit
            self.swap_in(self._budget)
        if (self.state == "in" and not self.compiled) or self._quantized or self._loose.scaled:
            forwards = None  # nothing to be gained, or what is quantized may compute with all that it gets at once
        precompute = self._precompute
        if forwards and not precompute.learned:
            from_disk = self.from_disk and forwards.whole  # a whole job with all passing through would take long
            if self.compiled or from_disk:
                self.start()
                precompute.rehearse(self.module, forwards)
            elif precompute.trace:
                precompute.learn(precompute.trace)
        self.adapters.bring()
        self.start()
        ahead = None
        with contextlib.ExitStack() as stack:
            if forwards and self.modulation:
                ahead = stack.enter_context(self._run_ahead(forwards, self.modulation))
            elif forwards and forwards.whole and not precompute.learned:
                stack.enter_context(precompute.watch(self.module))
            if in_steps and self._ring and not caches_steps(self.module):
                may = ahead.knows if ahead else lambda count: True
                stack.enter_context(in_lockstep(self._lockstep, self.module, self._ring, may))
            if kind is not None and self.state == "in" and self.graphs.can_record:
                stack.enter_context(self.graphs.job(kind, keep=ahead is None))
            else:
                self.graphs.clear()
            yield

    @contextlib.contextmanager
    def _run_ahead(self, forwards: JobForwards, modulation: Modulation) -> Iterator[PrecomputedJob]:
        modulation.start()
        with self._precompute.ahead(self.module, forwards) as job:
            modulation.put()
            hook = self.module.register_forward_pre_hook(lambda *_: modulation.turn(job))
            try:
                yield job
            finally:
                hook.remove()
                modulation.take_away()

    def modulation_of(self, layers: Sequence[str]) -> Modulation | None:
        """Return the modulation of those layers that are its own, if they can be run ahead in what it has."""
        sharded = {name for name, p in self._parameters.items() if isinstance(p, LocalPart)}
        mine = [name for name in layers if self.has(name) and not sharded & {f"{name}.weight", f"{name}.bias"}]
        if not mine:
            return None
        modulation = Modulation(self.module, self.rows, mine, self._host, self._copy_stream)
        fits = self.plan is None or self._plan_with(modulation, self._space)
        return modulation if fits else None

    def gains(self, modulation: Modulation) -> bool:
        """Return whether there is less to stream with a modulation."""
        after = self._plan_with(modulation, self._space)
        return self.plan is not None and after is not None and after.streamed_bytes < self.plan.streamed_bytes

    def adopt(self, modulation: Modulation) -> None:
        """Run a modulation ahead from now on; where that finds no memory, all is out until the next job."""
        self.modulation = modulation
        try:
            if self.plan:
                self.swap_in(self._budget)
        except BaseException:
            self.modulation = None
            raise


def caches_steps(module: torch.nn.Module) -> bool:
    """Return whether one of diffusers' step caches is on."""
    return bool(getattr(module, "is_cache_enabled", False))


def block_rows(module: torch.nn.Module) -> list[str]:
    """Names of the modules that run one after the other: the items of the outermost ModuleLists, in order."""
    rows: list[str] = []
    lists: list[str] = []
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists.append(name)
            rows += [
                f"{name}.{i}"
                for i, item in enumerate(part)
                if item is not None and any(True for _ in item.parameters())
            ]
    return rows


def compile_blocks(module: torch.nn.Module, rows: Sequence[str] | None = None, backend: str = "inductor") -> None:
    """Compile each block by itself, without what is hooked on around it: blocks of one kind share their code.

    Nothing that changes bits is chosen by timing it, so each process computes what the others do. That is said for each
    code: torch's own setting is turned off by whatever is compiled, with `torch.use_deterministic_algorithms`.
    """
    options: dict[str, str | int | bool | Callable[..., Any]] = {}
    if backend == "inductor" and DETERMINISTIC in torch._inductor.list_options():
        options[DETERMINISTIC] = True
    for row in block_rows(module) if rows is None else rows:
        block = module.get_submodule(row)
        name = place_of(block)
        forward = getattr(block, name)
        compiled = torch.compile(forward, fullgraph=True, backend=backend, options=options)
        setattr(block, name, functools.wraps(forward)(functools.partial(call_laid_out, compiled)))


def call_laid_out(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a block with tensors of usual strides, where they are contiguous but for those of dimensions of size 1.

    A model's first block may get a part of a larger tensor, whose stride from picture to picture is another. For that
    torch.compile would make code of its own, and then a third one that serves both: in a process's first job a block
    would not be computed as in later ones.
    """
    args, kwargs = tree_map_only(torch.Tensor, usually_laid_out, (args, kwargs))
    return forward(*args, **kwargs)


def usually_laid_out(tensor: torch.Tensor) -> torch.Tensor:
    if type(tensor) is not torch.Tensor or 1 not in tensor.shape or not tensor.is_contiguous():
        return tensor
    strides = contiguous_strides(tensor.shape)
    return tensor if tensor.stride() == strides else tensor.as_strided(tensor.shape, strides)


def quantized_parameters(module: torch.nn.Module) -> list[tuple[torch.nn.Module, str, torch.nn.Parameter]]:
    """(owner, name in it, parameter) of those that are no plain tensors: they move as they are, never streamed."""
    return [
        (owner, leaf, parameter)
        for owner in module.modules()
        for leaf, parameter in owner._parameters.items()
        if parameter is not None and not isinstance(parameter, DTensor) and type(parameter.data) is not torch.Tensor
    ]


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of all tensors that a tensor is made of."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter) and type(tensor.data) is torch.Tensor:
        return tensor.nbytes
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes  # of GGUF
    parts, _ = tensor.__tensor_flatten__()
    return sum(tensor_bytes(part) for name in parts if isinstance(part := getattr(tensor, name), torch.Tensor))


def streamable(module: torch.nn.Module, rows: Sequence[str]) -> list[Block]:
    """Return blocks with the bytes of their own weights; weights that others share stay on the device."""
    users = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    plain = plain_parameters(module)
    return [
        Block(
            row,
            {
                f"{row}.{name}": plain[f"{row}.{name}"].data.nbytes
                for name, parameter in module.get_submodule(row).named_parameters()
                if users[id(parameter)] == 1 and f"{row}.{name}" in plain
            },
        )
        for row in rows
    ]
