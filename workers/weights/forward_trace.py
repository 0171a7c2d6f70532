"""Traces of a job's forwards of the denoiser: learned by watching one job, foreseen by running others' loops dry.

Which layers act on the timestep alone is seen, too: linear layers inside the blocks that all get the same few rows. No
names of models or classes.
"""

import contextlib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from workers.errors import let_go
from workers.tensors import DTYPES
from workers.weights.adapters import is_of_adapter

MOST_ROWS = 8  # of a vector that counts as one a step, batch and guidance included
LEAST_SHARE = 0.02  # of a model's bytes, below which it is not worth the trouble


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one forward of the denoiser."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Results:
    """The results of a forward: for each tensor its dtype, and its sizes, None where they are the input's."""

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
        """Return the results as lists and plain values, for a checkpoint."""
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
class ForwardTrace:
    """A trace of a model's linear layers in the first two forwards of a job, and of the model's output."""

    module: torch.nn.Module
    rows: Sequence[str]  # the blocks' names
    inputs: dict[str, list[torch.Tensor]] = field(default_factory=dict)  # by layer, in the order of execution
    results: Results | None = None  # None if a forward's result is no tuple of tensors
    forwards: int = 0
    _hooks: list[Any] = field(default_factory=list)

    def __enter__(self) -> "ForwardTrace":
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
                if isinstance(layer, torch.nn.Linear) and not is_of_adapter(name):
                    own = name.removesuffix(".base_layer")
                    self._hooks.append(layer.register_forward_pre_hook(linear(f"{row}.{own}")))
        self._hooks.append(self.module.register_forward_hook(forward, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        # It may be kept until the next job; on a GPU, a small tensor keeps a whole segment.
        self.inputs = {name: [tensor.cpu() for tensor in seen] for name, seen in self.inputs.items()}

    def layers(self) -> list[str]:
        """Return layers that got the first one's input in both forwards; none if not worth it, or it can't be told."""
        if self.forwards < 2 or self.results is None or not self.inputs:
            return []
        first = next(iter(self.inputs.values()))
        found = [name for name, seen in self.inputs.items() if len(seen) == 2 and all(map(alike, seen, first))]
        size = sum(p.nbytes for name in found for p in self.module.get_submodule(name).parameters())
        return found if size >= LEAST_SHARE * sum(p.nbytes for p in self.module.parameters()) else []


def alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors are equal in all values, on whichever devices."""
    return torch.equal(one, other.to(one.device))


@torch.no_grad()
def vectors_of(module: torch.nn.Module, rows: Sequence[str], first: str, calls: Sequence[Call]) -> list[torch.Tensor]:
    """The input of the `first` modulation layer in each forward, which is run up to there.

    What comes before the blocks is run again only where its own inputs have changed. What is hooked on around the model
    itself is left out.
    """

    def reach(layer: torch.nn.Module, args: tuple[Any, ...]) -> None:
        raise Reached(args[0])

    def vector(call: Call) -> torch.Tensor:
        try:
            module.forward(*call.args, **call.kwargs)
        except Reached as reached:
            found = reached.vector
            let_go(reached)
            return found
        raise RuntimeError(f"{first} was not reached")

    hook = module.get_submodule(first).register_forward_pre_hook(reach)
    block = next(row for row in rows if first.startswith(f"{row}."))
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(uncompiled([module.get_submodule(block)]))
            for name in around_blocks(module, rows)[0]:
                part = module.get_submodule(name)
                stack.enter_context(standing_in(part, remembering(part.forward)))
            return [vector(call) for call in calls]
    finally:
        hook.remove()


def around_blocks(module: torch.nn.Module, rows: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of a model's parts that stand before its blocks, and of those that stand after the first of them."""
    before: list[str] = []
    after: list[str] = []
    passed = False
    for name, _ in module.named_children():
        if any(row.startswith(f"{name}.") for row in rows):
            passed = True
        else:
            (after if passed else before).append(name)
    return before, after


@contextlib.contextmanager
def uncompiled(blocks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Run blocks uncompiled, for a look inside, which compiled code doesn't allow. Accelerate's hooks stay."""
    compiled = [(block, name, block.__dict__[name]) for block in blocks if (name := place_of(block)) in block.__dict__]
    for block, name, _ in compiled:
        setattr(block, name, types.MethodType(type(block).forward, block))
    try:
        yield
    finally:
        for block, name, forward in compiled:
            setattr(block, name, forward)


def place_of(block: torch.nn.Module) -> str:
    """The attribute where its own forward stands, under what accelerate may have hooked on."""
    return "_old_forward" if hasattr(block, "_hf_hook") else "forward"


@contextlib.contextmanager
def standing_in(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward for a while; what else is hooked on comes back after it."""
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
    """Return whether arguments are equal, tensors in all their values."""
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
