"""CUDA graphs of a denoiser's forward, for jobs whose host takes longer to launch its kernels than the GPU to run them.

A graph launches the kernels of a forward that was recorded, all at once and with the same memory, so that the results
have the same bits. That is seen rather than believed: before a graph is used it must give, for the next forward's
arguments, exactly what that forward gives without it. Whatever can't be recorded, or gives anything else, is run as
ever.

Not for a denoiser that is cut over several GPUs: see `block_graphs`. Nor for processes that compute together, which
would have to agree on each forward.
"""

import contextlib
import functools
import logging
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from workers.errors import FORGIVEN, cause_of, let_go, refusals, release_memory
from workers.weights.forward_trace import Call, same, standing_in
from workers.weights.lockstep import KERNELS, copy_of, versions_of

log = logging.getLogger(__name__)

SPARE = 64 << 20  # bytes that a graph takes beside what its forward does: cuBLAS has a workspace for each stream
HOST_BOUND = 0.9  # of a forward's time that its host is busy with it: then the GPU waits for its host
MOST_GRAPHS = 8  # at once
MOST_KINDS = 64  # of forwards that are remembered
PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))

Record = Callable[[functools.partial[Any]], tuple[Callable[[], None], Any]]
"""Record a forward, without running it; return what runs it again, and the result that it writes each time."""


@dataclass(slots=True)
class Graph:
    inputs: list[torch.Tensor]
    launch: Callable[[], None]
    result: Any  # written anew by each launch
    launches: int = 0

    def __call__(self, call: Call) -> Any:
        self.launches += 1
        torch._foreach_copy_(self.inputs, tensors_of(call))
        self.launch()
        return copy_of(self.result)


class JobKind(NamedTuple):
    """The kind of a job: those of one kind differ in prompts, seeds and pictures alone, those of one size in more."""

    size: Hashable  # by which forwards take as long
    rest: Hashable = None


class Graphs(Protocol):
    """The graphs of a model, or of its blocks, on one GPU."""

    device: torch.device

    @property
    def held(self) -> bool:
        """Return whether there are some."""

    def drop(self) -> None: ...
    def clear(self) -> None: ...


ALL: "weakref.WeakSet[Graphs]" = weakref.WeakSet()  # of this process


class Workspace:
    """The bytes that a forward takes beside what is there before it on a GPU: the most that was seen."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._bytes = device, 0

    def fits(self) -> bool:
        """Return whether they are there beside what graphs may hold."""
        if self._device.type != "cuda":
            return True
        used, held = torch.cuda.memory_allocated(self._device), torch.cuda.memory_reserved(self._device)
        self._bytes = max(self._bytes, torch.cuda.max_memory_allocated(self._device) - used)
        graphs = held - used if any(one.held and one.device == self._device for one in ALL) else 0
        return lease_of(self._device) - used - graphs >= self._bytes + SPARE


class ForwardGraphs:
    """The graphs of one module's forwards, by kind: equal kinds differ only in what their tensors hold."""

    def __init__(self, module: torch.nn.Module, device: torch.device, record: Record | None = None) -> None:
        """`record` is the GPU's own unless given."""
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self._module, self.device = module, device
        ALL.add(self)
        self._record = record or (cuda_recorder(device) if device.type == "cuda" else None)
        self._off = False  # for good: something could not be recorded
        self._graphs: dict[Hashable, Graph] = {}
        self._seen: set[Hashable] = set()  # kinds that were run, whose kernels are loaded
        self._proven: set[Hashable] = set()  # kinds whose graphs gave the same bits
        self._worth: dict[Hashable, bool] = {}  # by the kind of job
        self._job: Hashable = None  # the kind of the present one, or the last
        self._places: list[int] = []  # where the weights were when graphs were recorded
        self._moved = False  # since, and maybe back
        self._keep, self._forwards = True, 0  # of the present job
        self._parts: list[torch.nn.Module] = []  # of the module, its submodules
        self._wasted = 0  # graphs that went before they were launched
        self._workspace = Workspace(device)

    @property
    def held(self) -> bool:
        return bool(self._graphs)

    @property
    def can_record(self) -> bool:
        return self._record is not None and not self._off

    def drop(self) -> None:
        """Let go of all graphs and their memory, since weights are about to move; between two forwards."""
        self._moved = True
        self.clear()

    def clear(self) -> None:
        """Let go of all graphs and their memory; between two forwards."""
        if self._graphs:
            self._graphs.clear()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            release_memory()

    @contextlib.contextmanager
    def job(self, kind: Hashable, keep: bool = True) -> Iterator[None]:
        """Surround a job with the weights in place. Jobs of one `kind` differ in prompts, seeds and pictures alone.

        Without `keep` its graphs go with it: something that they read does.
        """
        places = [address_of(parameter) for parameter in self._module.parameters()]
        if not keep or kind != self._job or places != self._places or self._moved:
            self.clear()
        self._job, self._places, self._moved, self._keep, self._forwards = kind, places, False, keep, 0
        self._parts = list(self._module.modules())[1:]
        forward = self._module.forward
        with standing_in(self._module, functools.wraps(forward)(functools.partial(self._run, forward))):
            try:
                yield
            finally:
                if not keep:
                    self.clear()

    def _run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call, self._forwards = Call(args, kwargs), self._forwards + 1
        kind = None if self._off else self._kind_of(call)
        if kind is None or (not self._keep and self._forwards == 1):  # which leaves what the others read
            return forward(*args, **kwargs)
        if kind in self._graphs:
            return self._graphs[kind](call) if kind in self._proven else self._prove(forward, kind, call)
        if not self._keep and self._graphs:  # what they read may be somewhere else from now on
            self.clear()
            self._worth[self._job] = False
        self._make_room()
        if kind in self._proven and self._worth.get(self._job):
            if self._try_to_record(forward, kind, call):
                return self._graphs[kind](call)
        elif kind not in self._seen:  # the first one loads kernels, and has what follows from that
            if len(self._seen) >= MOST_KINDS:
                self._seen.clear()
                self._proven.clear()
                self._worth.clear()
            self._seen.add(kind)
        elif self._worth.get(self._job, True):
            kept = Call(*copy_of([args, kwargs]))  # before the forward, which may take from lists that it is given
            result = forward(*args, **kwargs) if self._job in self._worth else self._timed(forward, call)
            if self._worth[self._job]:
                self._try_to_record(forward, kind, kept)
            return result
        return forward(*args, **kwargs)

    def _make_room(self) -> None:
        """Let go of all graphs of this process where a forward without one may find too little memory beside them.

        Then such jobs have none: kinds of forwards that take turns would else be recorded again and again.
        """
        if any(graphs.held for graphs in ALL) and not self._workspace.fits():
            self._worth[self._job] = False
            for graphs in ALL:
                graphs.clear()

    def _kind_of(self, call: Call) -> Hashable:
        """Return all of a job's call but what its tensors hold; None for one that can't be recorded.

        What is hooked on to the module's parts belongs to it: guiders that skip layers hook on to them in some steps.
        """
        hooked = hash(tuple(map(hooked_on, self._parts)))
        try:
            return self._job, hooked, kind_of([call.args, dict(call.kwargs)], self.device)
        except Unrecordable:
            return None

    def _timed(self, forward: Callable[..., Any], call: Call) -> Any:
        """Run a forward, and find out who waits for whom, the host or its GPU."""
        result, launched, done, waits = timed(forward, call, self.device)
        if waits:
            log.info("no CUDA graph of %s can be made: its host waits for the GPU", type(self._module).__name__)
            self._off = True
        self._worth[self._job] = not waits and launched >= HOST_BOUND * done and self._workspace.fits()
        log.info("a forward takes its host %.1f ms to launch, and %.1f ms in all: CUDA graphs are %s",
                 launched * 1e3, done * 1e3, "worth it" if self._worth[self._job] else "not worth it")  # fmt: skip
        return result

    def _try_to_record(self, forward: Callable[..., Any], kind: Hashable, call: Call) -> bool:
        """Record a forward, if that can be done; else none is tried any more, for want of memory in such jobs alone."""
        assert self._record
        while len(self._graphs) >= MOST_GRAPHS:
            self._wasted += self._graphs.pop(next(iter(self._graphs))).launches == 0
        if self._wasted >= MOST_GRAPHS or (not self._graphs and not self._workspace.fits()):
            self._worth[self._job] = False
            return False
        refused, start, found = refusals(), time.perf_counter(), None
        try:
            static = Call(*copy_of([call.args, dict(call.kwargs)]))
            inputs = tensors_of(static)
            launch, result = self._record(functools.partial(forward, *static.args, **static.kwargs))
            found = Graph(inputs, launch, result)
            del static, inputs, launch, result
        except torch.OutOfMemoryError as error:
            let_go(error)
        except Exception as error:  # whatever a forward does that no graph can
            log.info("no CUDA graph of %s can be made: %s", type(self._module).__name__, cause_of(error))
            self._off = True
            let_go(error)
        short = refusals() > refused
        if found and not short:
            self._graphs[kind] = found
            log.info("a CUDA graph was recorded in %.3f s", time.perf_counter() - start)
            return True
        del found
        if short:
            log.info("there is too little memory for a CUDA graph")
            if not any(isinstance(part, _ConvNd) for part in self._parts):  # which would keep what cuDNN chose in need
                FORGIVEN.add(refused)
        self._worth[self._job] = False
        release_memory()
        return False

    def _prove(self, forward: Callable[..., Any], kind: Hashable, call: Call) -> Any:
        """Compare a graph's result with the forward's own, one after the other, since both take their memory."""
        got = self._graphs[kind](call)
        self.clear()
        before = versions_of(call)
        result = forward(*call.args, **call.kwargs)
        if same(tree_leaves(got), tree_leaves(result)) and versions_of(call) == before:
            self._proven.add(kind)
        else:
            log.warning(
                "a CUDA graph of %s does other things than its forward; none is used", type(self._module).__name__
            )
            self._off = True
        return result


class Unrecordable(Exception):
    """Not an error: arguments that no graph can have."""


def kind_of(value: Any, device: torch.device) -> Hashable:
    """Return all of a value but what its tensors hold; Unrecordable."""
    match value:
        case torch.Tensor():
            if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.device != device or value.requires_grad:
                raise Unrecordable
            if device.type == "cuda" and value.nbytes > KERNELS and value.data_ptr() % KERNELS:
                raise Unrecordable  # its kernels may be others than those of a copy
            return value.dtype, value.shape, value.stride()
        case list() | tuple():
            return type(value), tuple(kind_of(item, device) for item in value)
        case dict():
            return dict, tuple((key, kind_of(item, device)) for key, item in value.items())
    if isinstance(value, PLAIN):
        return type(value), value
    raise Unrecordable


def timed(forward: Callable[..., Any], call: Call, device: torch.device) -> tuple[Any, float, float, bool]:
    """Return a forward's result, the seconds to launch it and in all, and whether its host waited for its GPU."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    with waits_of_host(device) as waits:
        start = time.perf_counter()
        result = forward(*call.args, **call.kwargs)
        launched = done = time.perf_counter() - start
    if cuda:
        torch.cuda.synchronize(device)
        done = time.perf_counter() - start
    return result, launched, done, bool(waits)


def hooked_on(part: torch.nn.Module) -> tuple[int, int, int, int]:
    """Return what tells whether something else is run in a module's forward, or around it."""
    own = part.__dict__
    return (
        id(own.get("forward")), id(own.get("processor")), len(own["_forward_hooks"]), len(own["_forward_pre_hooks"]),
    )  # fmt: skip


RECORDING = threading.Lock()  # one at a time


def cuda_recorder(device: torch.device, small: bool = False) -> Record:
    """Return what records forwards on a GPU. All graphs that are there share their memory: results are copied out.

    `small` ones, of which there are many, are recorded without emptying the allocator's cache before each.
    """
    last: list[weakref.ref[torch.cuda.CUDAGraph]] = []
    own = torch.cuda.Stream(device) if small else None

    def record(forward: functools.partial[Any]) -> tuple[Callable[[], None], Any]:
        graph, other = torch.cuda.CUDAGraph(), last[0]() if last else None
        pool = None if other is None else other.pool()  # with its last graph a pool ends
        generator, stream = torch.cuda.default_generators[device.index], torch.cuda.current_stream(device)
        before = generator.clone_state()
        try:
            with RECORDING, torch.cuda.device(device), recording(graph, pool, own):
                result = forward()
        except BaseException:
            torch.cuda.set_stream(stream)  # a recording that failed leaves another one
            generator.graphsafe_set_state(before)  # and this unusable
            raise
        last[:] = [weakref.ref(graph)]
        return graph.replay, result

    return record


@contextlib.contextmanager
def recording(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Record into a graph what is launched meanwhile, on a stream of torch's choice or a given one.

    Without a given one, as much memory as can be is freed before.
    """
    mode: Any = {"capture_error_mode": "thread_local"}
    if stream is None:
        with torch.cuda.graph(graph, pool=pool, **mode):
            yield
        return
    with torch.cuda.stream(stream):
        graph.capture_begin(*([] if pool is None else [pool]), **mode)
        try:
            yield
        finally:
            graph.capture_end()


@contextlib.contextmanager
def waits_of_host(device: torch.device) -> Iterator[list[warnings.WarningMessage]]:
    """Gather torch's warnings of each time that a host waits for its GPU meanwhile, which no recording allows."""
    found: list[warnings.WarningMessage] = []
    if device.type != "cuda":
        yield found
        return
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            found += [warning for warning in heard if "synchronizing CUDA operation" in str(warning.message)]


def lease_of(device: torch.device) -> float:
    """Return the bytes of a GPU that this process may have, by its allocator's limit."""
    total = torch.cuda.get_device_properties(device).total_memory
    fraction: float = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(device)
    return total * fraction


def tensors_of(call: Call) -> list[torch.Tensor]:
    return tensors_in([call.args, dict(call.kwargs)])


def tensors_in(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def address_of(parameter: torch.Tensor) -> int:
    """Return where a parameter's memory begins; of those that are made of several tensors, which one it is."""
    plain = type(parameter.data) is torch.Tensor
    return parameter.data_ptr() if plain else id(parameter)
