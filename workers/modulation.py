"""Adaptive-norm (modulation) weights, run once a job for all its steps and then let go.

In a DiT they are a quarter of the bytes, and act on one vector a step that depends on nothing but the timestep and the
prompt. So all vectors are known before the first step: each weight passes through a small buffer once a job, and its
results for all steps are looked up from then on. The products are those of the loop, of the same shapes, so their bits
are, too.

Which layers these are is learned by watching a job: linear layers inside the blocks that all get the same few rows. No
names of models or classes.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from workers.lanes import Lane, Mark
from workers.streaming import room, view_of
from workers.torch_tensors import DTYPES

MOST_ROWS = 8  # of a vector that counts as one a step, batch and guidance included
LEAST_SHARE = 0.02  # of a model's bytes, below which it is not worth the trouble
SLOTS = 3


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one forward of the denoiser."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Results:
    """What a forward gives for its input: for each tensor its dtype, and its sizes, None where they are the input's."""

    tensors: tuple[tuple[torch.dtype, tuple[int | None, ...]], ...]

    @staticmethod
    def of(call: Call, results: Sequence[torch.Tensor]) -> "Results":
        given = main_input(call).shape
        return Results(
            tuple(
                (r.dtype, tuple(None if i < len(given) and n == given[i] else n for i, n in enumerate(r.shape)))
                for r in results
            )
        )

    def plain(self) -> list[list[object]]:
        """As lists and plain values, for a checkpoint."""
        return [[str(dtype).removeprefix("torch."), list(sizes)] for dtype, sizes in self.tensors]

    @staticmethod
    def from_plain(plain: list[Any]) -> "Results":
        return Results(tuple((DTYPES[dtype], tuple(sizes)) for dtype, sizes in plain))

    def zeros(self, call: Call) -> tuple[torch.Tensor, ...]:
        """Stand-ins of the right shapes, for a forward whose values don't matter."""
        given = main_input(call)
        return tuple(
            torch.zeros(
                [given.shape[i] if n is None else n for i, n in enumerate(sizes)], dtype=dtype, device=given.device
            )
            for dtype, sizes in self.tensors
        )


def main_input(call: Call) -> torch.Tensor:
    """The latents: the first tensor with batch, sequence or channels, and more."""
    values = (*call.args, *call.kwargs.values())
    return next(v for v in values if isinstance(v, torch.Tensor) and v.ndim >= 3)


class Reached(Exception):
    """Not an error: the first modulation layer is about to run on this input."""

    def __init__(self, vector: torch.Tensor) -> None:
        super().__init__("reached")
        self.vector = vector


@dataclass(slots=True)
class Watch:
    """What is seen of a model's linear layers in the first two forwards of a job, and of the model's output."""

    module: torch.nn.Module
    rows: Sequence[str]  # the blocks' names
    inputs: dict[str, list[torch.Tensor]] = field(default_factory=dict)  # by layer, in the order of execution
    results: Results | None = None  # None if a forward's result is no tuple of tensors
    forwards: int = 0
    _hooks: list[Any] = field(default_factory=list)

    def __enter__(self) -> "Watch":
        def linear(name: str) -> Callable[..., None]:
            def see(layer: torch.nn.Module, args: tuple[Any, ...]) -> None:
                if self.forwards < 2 and args and args[0].numel() <= MOST_ROWS * args[0].shape[-1]:
                    self.inputs.setdefault(name, []).append(args[0].detach().clone())

            return see

        def forward(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            self.forwards += 1
            if isinstance(result, tuple) and all(isinstance(part, torch.Tensor) for part in result):
                self.results = Results.of(Call(args, kwargs), result)

        for row in self.rows:
            for name, layer in self.module.get_submodule(row).named_modules():
                if isinstance(layer, torch.nn.Linear):
                    self._hooks.append(layer.register_forward_pre_hook(linear(f"{row}.{name}")))
        self._hooks.append(self.module.register_forward_hook(forward, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def layers(self) -> list[str]:
        """Those that got the first one's input in both forwards; empty where it isn't worth it or can't be told."""
        if self.forwards < 2 or self.results is None or not self.inputs:
            return []
        first = next(iter(self.inputs.values()))
        found = [name for name, seen in self.inputs.items() if len(seen) == 2 and all(map(torch.equal, seen, first))]
        size = sum(p.nbytes for name in found for p in self.module.get_submodule(name).parameters())
        return found if size >= LEAST_SHARE * sum(p.nbytes for p in self.module.parameters()) else []


class Lookup(torch.nn.Module):
    """Stands where a modulation layer stood: its result is that of the present forward, computed before.

    The result is a tensor of its own, so that compiled blocks see the same one in every step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now: torch.Tensor | None = None

    def forward(self, vector: torch.Tensor) -> torch.Tensor | None:
        return self.now


class Modulation:
    """The learned layers of one model, for the jobs that follow. `layers` are names of linear modules, in order."""

    def __init__(
        self,
        module: torch.nn.Module,
        rows: Sequence[str],
        layers: Sequence[str],
        results: Results,
        host: Mapping[str, torch.Tensor],
        lane: Lane,
    ) -> None:
        self.results = results
        self._module, self._lane, self._layers = module, lane, list(layers)
        self._linear = [module.get_submodule(name) for name in layers]
        self._lookups = [Lookup() for _ in layers]
        self._sources = [
            {leaf: host[f"{name}.{leaf}"] for leaf, _ in linear.named_parameters()}
            for name, linear in zip(layers, self._linear, strict=True)
        ]
        self.weights = {f"{name}.{leaf}" for name, source in zip(layers, self._sources, strict=True) for leaf in source}
        self._slot = max(sum(room(t.nbytes) for t in source.values()) for source in self._sources)
        self._of_row = [
            (module.get_submodule(row), [i for i, name in enumerate(layers) if name.startswith(f"{row}.")])
            for row in rows
        ]
        before = [name for name, _ in module.named_children() if not any(row.startswith(f"{name}.") for row in rows)]
        self._before = [module.get_submodule(name) for name in before]  # what runs before the blocks, or after them
        self._arrived: list[Mark | None] = [None] * len(self._layers)
        self._vectors: list[torch.Tensor] = []
        self._tables: list[list[torch.Tensor]] = []  # by layer: its results in all forwards
        self._call = -1
        self._passing = False  # through a buffer, once a job; else they are on the device
        self._looking = False  # for vectors; nothing else is to happen in a forward
        self._hooks: list[Any] = []

    @property
    def buffer_bytes(self) -> int:
        return self._slot * min(SLOTS, len(self._layers))

    def stay(self) -> None:
        """The layers' weights are on the device to stay."""
        self._passing = False

    def pass_through(self) -> None:
        """Give the layers' weights their places in a buffer, which lives as long as they are there."""
        self._passing = True
        buffer = torch.empty(self.buffer_bytes, dtype=torch.uint8, device=self._lane.device)
        for index, source in enumerate(self._sources):
            offset = index % SLOTS * self._slot
            for leaf, tensor in source.items():
                getattr(self._linear[index], leaf).data = view_of(buffer, offset, tensor)
                offset += room(tensor.nbytes)

    def begin(self, foresee: Callable[[Results], Sequence[Call]]) -> None:
        """Before a job whose forwards `foresee` tells, whatever their latents; `end` must follow."""
        self.end()
        for index in range(min(SLOTS, len(self._layers)) if self._passing else 0):
            self._fetch(index)
        self._vectors = self._vectors_of(foresee(self.results))
        self._tables = [[] for _ in self._layers]
        self._call = -1
        self._put(self._lookups)
        self._hooks.append(self._module.register_forward_pre_hook(self._next, with_kwargs=True))
        for block, indices in self._of_row:
            if indices:
                self._hooks.append(block.register_forward_pre_hook(lambda *_, i=tuple(indices): self._fill(i)))

    def end(self) -> None:
        """Every layer is itself again."""
        for hook in self._hooks:
            hook.remove()
        self._put(self._linear)
        self._hooks, self._vectors, self._tables = [], [], []
        for lookup in self._lookups:
            lookup.now = None

    def _put(self, modules: Sequence[torch.nn.Module]) -> None:
        for name, module in zip(self._layers, modules, strict=True):
            parent, _, leaf = name.rpartition(".")
            setattr(self._module.get_submodule(parent), leaf, module)

    def _vectors_of(self, calls: Sequence[Call]) -> list[torch.Tensor]:
        """The layers' input in each forward, which is run up to the first of them.

        What comes before the blocks is run again only where its own inputs have changed.
        """

        def reach(layer: torch.nn.Module, args: tuple[Any, ...]) -> None:
            raise Reached(args[0])

        hook = self._linear[0].register_forward_pre_hook(reach)
        self._looking = True
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(uncompiled([block for block, _ in self._of_row]))
                for module in self._before:
                    stack.enter_context(standing_in(module, remembering(module.forward)))
                return [self._vector(call) for call in calls]
        finally:
            self._looking = False
            hook.remove()

    def _vector(self, call: Call) -> torch.Tensor:
        try:
            with torch.no_grad():
                self._module(*call.args, **call.kwargs)
        except Reached as reached:
            return reached.vector
        raise RuntimeError(f"{self._layers[0]} was not reached")

    def _next(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each forward: its results take the place of the last one's."""
        if self._looking:
            return
        self._call += 1
        if self._call >= len(self._vectors):
            self._catch_up(Call(args, kwargs))
        targets = [lookup.now for lookup in self._lookups if lookup.now is not None]
        if targets:
            torch._foreach_copy_(targets, [table[self._call] for table in self._tables])

    def _fill(self, indices: Sequence[int]) -> None:
        """At a block's first run in a job: its layers' results for all forwards."""
        for index in indices:
            if self._tables[index]:
                return
            if self._passing and (arrived := self._arrived[index]):
                self._lane.wait(arrived)
            linear = self._linear[index]
            self._tables[index] = [type(linear).forward(linear, vector) for vector in self._vectors]
            self._lookups[index].now = self._tables[index][self._call].clone()
            if self._passing and index + SLOTS < len(self._layers):
                self._fetch(index + SLOTS)

    def _catch_up(self, call: Call) -> None:
        """One forward more than foreseen: its results, with weights straight from host memory."""
        self._put(self._linear)
        (vector,) = self._vectors_of([call])
        self._put(self._lookups)
        self._vectors.append(vector)
        for source, table in zip(self._sources, self._tables, strict=True):
            if not table:
                continue  # it fills at its block's first run
            weight, bias = (
                None if (t := source.get(leaf)) is None else t.to(vector.device) for leaf in ("weight", "bias")
            )
            assert weight is not None
            table.append(torch.nn.functional.linear(vector, weight, bias))

    def _fetch(self, index: int) -> None:
        linear = self._linear[index]
        copies = [(getattr(linear, leaf).data, tensor) for leaf, tensor in self._sources[index].items()]
        self._arrived[index] = self._lane.copy(copies, self._lane.mark())


@contextlib.contextmanager
def uncompiled(blocks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """For a look inside blocks, which compiled code doesn't allow."""
    compiled = [(block, block.__dict__.pop("forward")) for block in blocks if "forward" in block.__dict__]
    try:
        yield
    finally:
        for block, forward in compiled:
            block.forward = forward


@contextlib.contextmanager
def standing_in(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward for a while; what else is hooked on comes back after it."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def remembering(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that gives its last result again where its arguments are the same."""
    last: list[Any] = []

    def remembered(*args: Any, **kwargs: Any) -> Any:
        if not last or not same(last[0], (args, kwargs)):
            last[:] = [(args, kwargs), forward(*args, **kwargs)]
        return last[1]

    return remembered


def same(one: Any, other: Any) -> bool:
    """Whether arguments are equal, tensors in all their values."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    match one:
        case torch.Tensor():
            alike: bool = one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
            return alike
        case dict():
            return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
        case tuple() | list():
            return len(one) == len(other) and all(map(same, one, other))
    try:
        return bool(one == other)
    except (ValueError, TypeError, RuntimeError):  # whatever it is, it can't be told
        return False
