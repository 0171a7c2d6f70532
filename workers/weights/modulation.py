"""Adaptive-norm (modulation) weights, run once a job for all its steps and then let go.

In a DiT they are a quarter of the bytes, and act on one vector a step that depends on nothing but the timestep and the
prompt. So all vectors are known before the first step: each weight passes through a small buffer once a job, and its
results for all steps are looked up from then on. The products are those of the loop, of the same shapes, so their bits
are, too.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from workers.errors import StageError
from workers.weights.adapters import base_of
from workers.weights.copy_stream import CopyStream, Mark
from workers.weights.forward_trace import Call
from workers.weights.lockstep import LANE
from workers.weights.streaming import memory_of_its_own, room, view_of

SLOTS = 3


@dataclass(slots=True)
class PrecomputedJob:
    """The modulation of one job: the vectors of all its forwards, and each layer's results for them."""

    vectors: list[torch.Tensor]
    catch_up: Callable[[Call], torch.Tensor]  # the vector of a forward that was not foreseen
    call: int = -1  # the present forward's number
    tables: dict[str, list[torch.Tensor]] = field(default_factory=dict)  # by layer: its results in all forwards
    _copies: dict[torch.device, list[torch.Tensor]] = field(default_factory=dict)

    def vectors_on(self, device: torch.device) -> list[torch.Tensor]:
        """Return the vectors on a device, each moved there once."""
        copies = self._copies.setdefault(device, [])
        copies += [vector.to(device) for vector in self.vectors[len(copies) :]]
        return copies

    @contextlib.contextmanager
    def along(self, module: torch.nn.Module) -> Iterator[None]:
        """Count the forwards of a model, the first thing in each."""
        hook = module.register_forward_pre_hook(self._next, prepend=True, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def knows(self, count: int) -> bool:
        """Return whether the vectors of so many forwards, from the present one on, were foreseen."""
        return self.call + count <= len(self.vectors)

    def _next(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.call += 1
        if self.call >= len(self.vectors):
            self.vectors.append(self.catch_up(Call(args, kwargs)))


def is_scaled(adapted: torch.nn.Module) -> bool:
    """Return whether an active adapter of a layer is a DoRA, which reads the layer's own weights."""
    magnitudes: Any = getattr(adapted, "lora_magnitude_vector", {})
    active: Any = getattr(adapted, "active_adapters", ())
    return any(name in magnitudes for name in active) and not getattr(adapted, "disable_adapters", False)


class PrecomputedLayer(torch.nn.Module):
    """Stands where a modulation layer stood: its result is that of the present forward, computed before.

    The result is a tensor of its own, so that compiled blocks see the same one in every step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now: torch.Tensor | None = None

    def forward(self, vector: torch.Tensor) -> torch.Tensor | None:
        return self.now

    def show(self, result: torch.Tensor) -> None:
        if self.now is not None and self.now.shape == result.shape:
            self.now.copy_(result)
            return
        if self.now is not None and self.now.device.type == "cuda":
            self.now.record_stream(torch.cuda.current_stream(self.now.device))  # which may still read it
        self.now = result.clone()


class Modulation:
    """Learned layers whose weights are on one device, for the jobs that follow. `layers` are linear, in order."""

    def __init__(
        self,
        module: torch.nn.Module,
        rows: Sequence[str],
        layers: Sequence[str],
        host: Mapping[str, torch.Tensor],
        copy_stream: CopyStream,
    ) -> None:
        self._module, self._copy_stream, self._layers = module, copy_stream, list(layers)
        self._linear = [base_of(module.get_submodule(name)) for name in layers]
        self._precomputed = [PrecomputedLayer() for _ in layers]
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
        self._arrived: list[Mark | None] = [None] * len(self._layers)
        self._ahead: PrecomputedJob | None = None  # the job that has its turn
        self._passing = False  # through a buffer, once a job; else they are on the device
        self._several = False
        self._hooks: list[Any] = []

    @property
    def first(self) -> str:
        """The layer that runs before all others."""
        return self._layers[0]

    @property
    def buffer_bytes(self) -> int:
        return self._slot * min(SLOTS, len(self._layers))

    @property
    def in_place(self) -> bool:
        """Return whether looked-up results stand in the layers' places now."""
        return bool(self._hooks)

    def stay(self) -> None:
        """Note that the layers' weights are on the device to stay."""
        self._passing = False

    def pass_through(self) -> None:
        """Give the layers' weights their places in a buffer, which lives as long as they are there."""
        self._passing = True
        buffer = memory_of_its_own(self.buffer_bytes, self._copy_stream.device)
        for index, source in enumerate(self._sources):
            offset = index % SLOTS * self._slot
            for leaf, tensor in source.items():
                getattr(self._linear[index], leaf).data = view_of(buffer, offset, tensor)
                offset += room(tensor.nbytes)

    def put(self, several: bool = False) -> None:
        """Put looked-up results in the layers' places, for one job, or for `several` that take turns."""
        self._several = several
        self._check_adapters()
        self._replace(self._precomputed)
        for block, indices in self._of_row:
            if indices:
                self._hooks.append(block.register_forward_pre_hook(lambda *_, i=tuple(indices): self._fill(i)))

    def take_away(self) -> None:
        """Put every layer back in its place."""
        for hook in self._hooks:
            hook.remove()
        self._replace(self._linear)
        self._hooks, self._ahead = [], None
        self.forget()

    def forget(self) -> None:
        """Let go of the last results that were shown."""
        for precomputed in self._precomputed:
            precomputed.now = None

    def _check_adapters(self) -> None:
        """Raise StageError where an active adapter needs the weights of a layer that is to be replaced."""
        if any(is_scaled(self._module.get_submodule(name)) for name in self._layers):
            raise StageError(
                "a DoRA changes layers that are computed ahead here, since the model is streamed; "
                "with more GPU memory for the denoiser it could be used"
            )

    def _replace(self, modules: Sequence[torch.nn.Module]) -> None:
        for name, module in zip(self._layers, modules, strict=True):
            parent, _, leaf = name.rpartition(".")
            owner = self._module.get_submodule(parent)
            if isinstance(adapted := getattr(owner, leaf), torch.nn.Module) and hasattr(adapted, "base_layer"):
                owner, leaf = adapted, "base_layer"  # what an adapter adds is computed as ever
            setattr(owner, leaf, module)

    def start(self) -> None:
        """Let the first layers' weights be on their way."""
        for index in range(min(SLOTS, len(self._layers)) if self._passing else 0):
            self._fetch(index)

    def turn(self, ahead: PrecomputedJob) -> None:
        """Look up this job's present forward from now on, until another job has its turn."""
        self._ahead = ahead
        places: list[torch.Tensor] = []
        results: list[torch.Tensor] = []
        for index, name in enumerate(self._layers):
            if not (table := ahead.tables.get(name)):
                continue  # it fills at its block's first run
            if ahead.call >= len(table):
                table.append(self._straight(index, ahead.vectors_on(self._copy_stream.device)[ahead.call]))
            precomputed, now = self._precomputed[index], table[ahead.call]
            if precomputed.now is None or precomputed.now.shape != now.shape:
                precomputed.show(now)
            else:
                places.append(precomputed.now)
                results.append(now)
        if places:
            torch._foreach_copy_(places, results)

    def _fill(self, indices: Sequence[int]) -> None:
        """Compute, at a block's first run in a job, its layers' results for all forwards."""
        ahead = self._ahead
        if ahead is None:
            return
        lane = LANE.get()
        if lane is not None and self._layers[indices[0]] in ahead.tables:
            for index in indices:  # each forward in lockstep finds what another one has left there
                self._precomputed[index].show(ahead.tables[self._layers[index]][ahead.call + lane])
            return
        for index in indices:
            name = self._layers[index]
            if name in ahead.tables:
                return
            if self._several and index == 0:
                self.start()  # not before, or another job might do so in between
            if self._passing and (arrived := self._arrived[index]):
                self._copy_stream.wait(arrived)
            linear = self._linear[index]
            vectors = ahead.vectors_on(self._copy_stream.device)
            ahead.tables[name] = [type(linear).forward(linear, vector) for vector in vectors]
            self._precomputed[index].show(ahead.tables[name][ahead.call + (lane or 0)])
            if self._passing and index + SLOTS < len(self._layers):
                self._fetch(index + SLOTS)

    def _straight(self, index: int, vector: torch.Tensor) -> torch.Tensor:
        """Return a layer's result for a forward not foreseen, with its weights straight from host memory."""
        source = self._sources[index]
        weight, bias = (None if (t := source.get(leaf)) is None else t.to(vector.device) for leaf in ("weight", "bias"))
        assert weight is not None
        return torch.nn.functional.linear(vector, weight, bias)

    def _fetch(self, index: int) -> None:
        linear = self._linear[index]
        copies = [(getattr(linear, leaf).data, tensor) for leaf, tensor in self._sources[index].items()]
        self._arrived[index] = self._copy_stream.copy(copies, self._copy_stream.mark())
