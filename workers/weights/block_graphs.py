"""CUDA graphs of single blocks, for a denoiser that is cut over several GPUs: no graph can hold its forwards.

One process launches the kernels of all of them, for several jobs at once. A block's graph takes its host a ninth of the
time. All graphs of a GPU share the memory of their arguments, of their results and of what is between, since blocks run
one after the other: each launch copies its arguments in, and its results out. As with graphs of whole forwards, none is
used before it has given the bits of the block itself.
"""

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from workers.errors import FORGIVEN, cause_of, let_go, refusals, release_memory
from workers.weights.cuda_graphs import (
    ALL,
    HOST_BOUND,
    JobKind,
    Record,
    Unrecordable,
    Workspace,
    address_of,
    cuda_recorder,
    hooked_on,
    kind_of,
    tensors_in,
    tensors_of,
    timed,
)
from workers.weights.forward_trace import Call, place_of, same
from workers.weights.lockstep import copy_of
from workers.weights.modulation import PrecomputedLayer

log = logging.getLogger(__name__)

MOST_JOB_KINDS = 4  # that have graphs at once
MOST_WASTED = 8  # times that all graphs went, for want of memory or of places, before they were of use
LEAST_LAUNCHES = 10  # of each graph, on average, for them to have been of use
MOST_TRIALS = 8  # sizes of jobs for which graphs turn out not to be worth it
TRIES = 2  # jobs of a size in which to find out whether graphs are worth it
MOST_KNOWN = 8192  # kinds of runs that are remembered


@dataclass(slots=True)
class BlockGraph:
    inputs: list[torch.Tensor]  # shared with other blocks' graphs
    launch: Callable[[], None]
    leaves: list[Any]  # of the result; its tensors are shared, too
    spec: TreeSpec

    def __call__(self, call: Call) -> Any:
        torch._foreach_copy_(self.inputs, tensors_of(call))
        self.launch()
        return tree_unflatten(copy_of(self.leaves), self.spec)


@dataclass(slots=True)
class Trial:
    """The seconds of blocks' second runs, for the host to launch them and in all."""

    launched: float = 0.0
    done: float = 0.0


class Present(threading.local):
    """The kind of one thread's job."""

    job: JobKind | None = None


@dataclass(slots=True)
class Known:
    """The knowledge of jobs' sizes, and of the kinds of their blocks' runs."""

    trials: dict[Hashable, Trial] = field(default_factory=dict)
    tries: dict[Hashable, int] = field(default_factory=dict)  # jobs that have ended before anything was found
    worth: dict[Hashable, bool] = field(default_factory=dict)  # sizes
    runs: dict[Hashable, int] = field(default_factory=dict)
    proven: set[Hashable] = field(default_factory=set)  # runs whose graphs gave the same bits


class BlockGraphs:
    """The graphs of blocks on one GPU. Jobs in several threads may use them, if they take turns on the GPU."""

    def __init__(
        self,
        blocks: Sequence[torch.nn.Module],
        device: torch.device,
        gpus: int,
        busy: Callable[[], bool] = lambda: True,
        record: Record | None = None,
    ) -> None:
        """This process launches kernels on so many `gpus` at once, if it is `busy`; else no graph is launched."""
        self._blocks, self.device, self.gpus, self._busy = blocks, device, gpus, busy
        self._record = record or (cuda_recorder(device, small=True) if device.type == "cuda" else None)
        self._off = self._record is None  # for good
        self._graphs: dict[Hashable, BlockGraph] = {}  # by kind of run
        self._shared: dict[Hashable, list[torch.Tensor]] = {}  # arguments and results, by their layouts
        self._known, self._present = Known(), Present()
        self._workspace = Workspace(device)
        self._begins = threading.Lock()  # of jobs, one after the other
        self._places: list[int] = []  # of the weights
        self._moved = False  # since, and maybe back
        self._parts: list[list[torch.nn.Module]] = []  # of each block
        self._launched = 0  # times, since the first of these graphs was recorded
        self._wasted = 0
        self._installed = False
        ALL.add(self)

    def drop(self) -> None:
        """Let go of all graphs, since weights are about to move; between two forwards."""
        self._moved = True
        self.clear()

    def clear(self) -> None:
        """Let go of all graphs and their memory; with the GPU to oneself."""
        if self._graphs or self._shared:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._graphs.clear()
            self._shared.clear()
            self._launched = 0
            release_memory()

    @property
    def held(self) -> bool:
        return bool(self._graphs)

    def untried(self, kind: JobKind | None) -> bool:
        """Return whether a job of this kind is to find out what graphs bring, for which it should be alone."""
        return not self._off and kind is not None and kind.size not in self._known.worth and not self._hopeless

    @property
    def _hopeless(self) -> bool:
        """Return whether so many sizes were tried in vain that no other is."""
        return list(self._known.worth.values()).count(False) >= MOST_TRIALS

    @contextlib.contextmanager
    def job(self, kind: JobKind | None) -> Iterator[None]:
        """Surround a job in this thread, in which blocks may have graphs unless `kind` is None. See ForwardGraphs."""
        if self._off or kind is None:
            yield
            return
        with self._begins:
            self._install()
            places = [address_of(parameter) for block in self._blocks for parameter in block.parameters()]
            if places != self._places or self._moved:
                self.clear()
            self._places, self._moved = places, False
            self._parts = [list(block.modules())[1:] for block in self._blocks]
        self._present.job = kind
        try:
            yield
        finally:
            self._present.job = None
        if kind.size not in self._known.worth:
            tries = self._known.tries[kind.size] = self._known.tries.get(kind.size, 0) + 1
            if tries >= TRIES:
                self._known.worth[kind.size] = False

    def _install(self) -> None:
        """Put this around each block's own forward, for good."""
        if self._installed:
            return
        self._installed = True
        for index, block in enumerate(self._blocks):
            name = place_of(block)
            forward = getattr(block, name)
            setattr(block, name, functools.wraps(forward)(functools.partial(self._run, index, forward)))

    def _run(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        job, known = self._present.job, self._known
        if job is None or self._off or not known.worth.get(job.size, not self._hopeless):
            return forward(*args, **kwargs)
        call = Call(args, kwargs)
        try:
            kind = (job, index, *self._state_of(index), kind_of([args, kwargs], self.device))
        except Unrecordable:
            return forward(*args, **kwargs)
        if kind in self._graphs and kind not in known.proven:
            return self._prove(forward, kind, call)
        if kind in known.proven and not self._busy():
            return forward(*args, **kwargs)
        if kind in self._graphs:
            self._launched += 1
            return self._graphs[kind](call)
        self._make_room(job)
        runs = known.runs[kind] = known.runs.get(kind, 0) + 1
        if runs == 1:  # which loads kernels, and has what follows from that
            return forward(*args, **kwargs)
        if job.size not in known.worth and runs == 2:
            return self._timed(forward, job.size, call)
        if not self._is_worth(job.size):
            return forward(*args, **kwargs)
        kept = Call(*copy_of([args, dict(kwargs)]))  # before it is run, which may write into what it is given
        result = forward(*args, **kwargs)
        self._try_to_record(forward, job, kind, kept, result)
        return result

    def _state_of(self, index: int) -> tuple[Hashable, ...]:
        """Return what else a block's run depends on: what is hooked on to its parts, and where they find results."""
        parts = self._parts[index]
        shown = [part.now for part in parts if type(part) is PrecomputedLayer]
        return hash(tuple(map(hooked_on, parts))), tuple(0 if now is None else now.data_ptr() for now in shown)

    def _timed(self, forward: Callable[..., Any], size: Hashable, call: Call) -> Any:
        """Run a block, and note how long its host took to launch it, and its GPU to be done."""
        result, launched, done, waits = timed(forward, call, self.device)
        trial = self._known.trials.setdefault(size, Trial())
        trial.launched += float("-inf") if waits else launched
        trial.done += done
        return result

    def _is_worth(self, size: Hashable) -> bool:
        """Return whether jobs of a size shall have graphs, by the trial of the first one."""
        known = self._known
        if size not in known.worth:
            if len(known.runs) > MOST_KNOWN:
                self._known = known = Known(known.trials)
            trial = known.trials.pop(size, Trial(float("-inf")))
            busy = trial.launched * self.gpus >= HOST_BOUND * trial.done
            known.worth[size] = busy and self._workspace.fits()
            log.info("a block takes its host %.2f ms to launch, and %.2f ms in all, on average: CUDA graphs are %s",
                     trial.launched * 1e3 / len(self._blocks), trial.done * 1e3 / len(self._blocks),
                     "worth it" if known.worth[size] else "not worth it")  # fmt: skip
        return known.worth[size]

    def _make_room(self, job: JobKind) -> None:
        """Let go of all graphs where a block without one may find too little memory beside them, or of too many."""
        kinds = {kind[0] for kind in self._graphs}  # type: ignore[index]
        if not self._graphs or job in kinds:
            return
        if len(kinds) >= MOST_JOB_KINDS or not self._workspace.fits():
            self._wasted += self._launched < LEAST_LAUNCHES * len(self._graphs)
            self._off = self._wasted >= MOST_WASTED
            self.clear()

    def _try_to_record(
        self, forward: Callable[..., Any], job: JobKind, kind: Hashable, call: Call, result: Any
    ) -> None:
        """Record a block, if that can be done; else jobs of its size have no more graphs."""
        refused, found = refusals(), None
        try:
            found = self._recorded(forward, call, result)
        except torch.OutOfMemoryError as error:
            let_go(error)
        except Exception as error:  # whatever a block does that no graph can
            log.info("no CUDA graphs of blocks can be made: %s", cause_of(error))
            self._off = True
            let_go(error)
        if refusals() > refused:
            log.info("there is too little memory for CUDA graphs of blocks")
            FORGIVEN.add(refused)
            found = None
        if found:
            self._graphs[kind] = found
            return
        self._known.worth[job.size] = False
        self.clear()

    def _recorded(self, forward: Callable[..., Any], call: Call, result: Any) -> BlockGraph:
        assert self._record
        inputs, (args, kwargs) = self._shared_like([call.args, dict(call.kwargs)], "arguments")
        places, shared = self._shared_like(result, "results")
        leaves, spec = tree_flatten(shared)

        def run() -> list[torch.Tensor]:
            torch._foreach_copy_(places, tensors_in(forward(*args, **kwargs)))
            return places

        launch, _ = self._record(functools.partial(run))
        return BlockGraph(inputs, launch, leaves, spec)

    def _shared_like(self, value: Any, use: str) -> tuple[list[torch.Tensor], Any]:
        """Return tensors laid out as a value's, which all graphs of this GPU have in common, and the value of them."""
        tensors = tensors_in(value)
        layout = use, tuple((tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors)
        if layout not in self._shared:
            self._shared[layout] = copy_of(tensors)
        left = iter(self._shared[layout])
        leaves, spec = tree_flatten(value)
        given = [next(left) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        return self._shared[layout], tree_unflatten(given, spec)

    def _prove(self, forward: Callable[..., Any], kind: Hashable, call: Call) -> Any:
        """Compare a graph's result with the block's own, and what that does to its arguments."""
        got, before = self._graphs[kind](call), state_of(call)
        result = forward(*call.args, **call.kwargs)
        if same(tree_leaves(got), tree_leaves(result)) and state_of(call) == before:
            self._known.proven.add(kind)
        else:
            log.warning("CUDA graphs of blocks do other things than the blocks themselves; none is used")
            self._off = True
            self.clear()
        return result


def state_of(call: Call) -> tuple[TreeSpec, list[int]]:
    """Return the structure of a call's arguments, and how often each tensor was written into, if torch counts that."""
    leaves, spec = tree_flatten([call.args, dict(call.kwargs)])
    tensors = (leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
    return spec, [tensor._version for tensor in tensors if not tensor.is_inference()]
