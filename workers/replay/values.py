"""Values that cross between stages: a closed set of plain values and tensors, never an object and never a class's name.

None, bool, int, float, str, dtypes, tensors, NumPy arrays, lists, tuples and dicts, and what components return: outputs
with named fields, and distributions of a VAE's latents, which each stage samples at its own place in the order of
random numbers.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution, IdentityDistribution

from workers.tensors import DTYPES, NAMES

CACHE = "past_key_values"  # of an encoder that can go on writing; a pipeline that encodes has no use for it


class Untransferable(Exception):
    """A value is none of those that cross between stages."""


class Output(OrderedDict[str, Any]):
    """An output of a component, with the fields of its own class; like it, by attribute, by name and by position."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"a recorded output has no {name}") from None

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the fields that are not None, as the libraries' outputs do."""
        return tuple(value for value in self.values() if value is not None)


def gaussian(parameters: torch.Tensor, deterministic: bool) -> DiagonalGaussianDistribution:
    return DiagonalGaussianDistribution(parameters, deterministic)


def identity(parameters: torch.Tensor, deterministic: bool) -> IdentityDistribution:
    return IdentityDistribution(parameters)


DISTRIBUTIONS: Mapping[str, tuple[type, Callable[[torch.Tensor, bool], Any]]] = {
    "gaussian": (DiagonalGaussianDistribution, gaussian),
    "identity": (IdentityDistribution, identity),
}

PutAside = Callable[[torch.Tensor], int]  # keeps a tensor, and returns its place among all


def freeze(value: Any, device: torch.device, put_aside: PutAside) -> Any:
    """Return a value as msgpack knows it, its tensors put aside; Untransferable.

    Tensors that lie in host memory while the stage computes on a GPU (`device`) stay there in other stages, too.
    """

    def again(item: Any) -> Any:
        return freeze(item, device, put_aside)

    match value:
        case None | bool() | int() | float() | str():
            return value
        case torch.Tensor():
            return frozen_tensor(value, device, put_aside)
        case torch.dtype() if value in NAMES:
            return {"dtype": NAMES[value]}
        case np.ndarray() | np.generic():
            array = np.asarray(value)
            return {"numpy": put_aside(torch.from_numpy(np.array(array))), "scalar": isinstance(value, np.generic)}
        case list() | tuple():
            return {"list" if isinstance(value, list) else "tuple": [again(item) for item in value]}
    if kind := next((name for name, (cls, _) in DISTRIBUTIONS.items() if type(value) is cls), None):
        deterministic = bool(getattr(value, "deterministic", False))
        return {"distribution": kind, "parameters": again(value.parameters), "deterministic": deterministic}
    if isinstance(value, Output) or hasattr(value, "to_tuple"):
        fields = value if isinstance(value, Output) else fields_of(value)
        return {"output": [[name, again(item)] for name, item in fields.items()]}
    if isinstance(value, Mapping) and all(isinstance(name, str | int) for name in value):
        return {"dict": [[name, again(item)] for name, item in value.items()]}
    raise Untransferable(type(value).__name__)


def is_dense(tensor: torch.Tensor) -> bool:
    """Return whether a tensor's elements lie side by side in memory, in whatever order."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def frozen_tensor(tensor: torch.Tensor, device: torch.device, put_aside: PutAside) -> dict[str, Any]:
    """Put a tensor aside with its layout: kernels are chosen by strides, and so the last bits of what they compute."""
    host = tensor.device.type != device.type
    if tensor.is_contiguous() or not is_dense(tensor):
        return {"tensor": put_aside(tensor), "host": host}
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return {"tensor": put_aside(flat), "host": host, "shape": list(tensor.shape), "strides": list(tensor.stride())}


def sizes(value: object) -> list[int]:
    """Check that a value is a list of sizes; ValueError."""
    if not isinstance(value, list) or not all(isinstance(size, int) for size in value):
        raise ValueError("a record holds what none can hold")
    return value


def fields_of(output: Any) -> dict[str, Any]:
    """Return all fields of a library's output, those that are None included."""
    names = getattr(output, "__dataclass_fields__", None) or output.keys()
    return {name: None if name == CACHE else getattr(output, name, None) for name in names}


def thaw(frozen: Any, tensors: Sequence[torch.Tensor], device: torch.device) -> Any:
    """Invert `freeze`; tensors that lay on a GPU go to `device`. ValueError for what `freeze` never makes."""

    def again(value: Any) -> Any:
        return thaw(value, tensors, device)

    match frozen:
        case None | bool() | int() | float() | str():
            return frozen
        case {"tensor": int(index), "host": bool(host), **layout}:
            copy = tensors[index].to("cpu" if host else device, copy=True)
            return copy.as_strided(sizes(layout["shape"]), sizes(layout["strides"])) if layout else copy
        case {"zeros": list(shape), "dtype": str(dtype), "host": bool(host)} if dtype in DTYPES:
            return torch.zeros(shape, dtype=DTYPES[dtype], device="cpu" if host else device)
        case {"dtype": str(dtype)} if dtype in DTYPES:
            return DTYPES[dtype]
        case {"numpy": int(index), "scalar": bool(scalar)}:
            array = tensors[index].numpy().copy()
            return array[()] if scalar else array
        case {"list": list(items)}:
            return [again(item) for item in items]
        case {"tuple": list(items)}:
            return tuple(again(item) for item in items)
        case {"distribution": str(kind), "parameters": parameters, "deterministic": bool(deterministic)} if (
            kind in DISTRIBUTIONS
        ):
            return DISTRIBUTIONS[kind][1](again(parameters), deterministic)
        case {"output": list(items)}:
            return Output((name, again(item)) for name, item in items)
        case {"dict": list(items)}:
            return {name: again(item) for name, item in items}
    raise ValueError("a record holds what none can hold")


def shapes_only(frozen: Any, tensors: Sequence[torch.Tensor], put_aside: PutAside) -> Any:
    """Return a frozen value whose tensors of floating-point numbers are but their shapes; others are put aside anew."""

    def leaf(index: int, host: bool, layout: Mapping[str, Any]) -> Any:
        tensor = tensors[index]
        if tensor.is_floating_point():
            return {"zeros": layout.get("shape", list(tensor.shape)), "dtype": NAMES[tensor.dtype], "host": host}
        return {"tensor": put_aside(tensor), "host": host, **layout}

    return rewritten(frozen, tensors, put_aside, leaf)


def moved(frozen: Any, tensors: Sequence[torch.Tensor], put_aside: PutAside) -> Any:
    """Return a frozen value whose tensors are put aside anew, as they are."""
    return rewritten(
        frozen, tensors, put_aside, lambda i, h, layout: {"tensor": put_aside(tensors[i]), "host": h, **layout}
    )


def rewritten(
    frozen: Any,
    tensors: Sequence[torch.Tensor],
    put_aside: PutAside,
    leaf: Callable[[int, bool, Any], Any],
) -> Any:
    """Return a frozen value with `leaf` in the place of its tensors, called with (index, host, layout)."""

    def again(value: Any) -> Any:
        return rewritten(value, tensors, put_aside, leaf)

    match frozen:
        case {"tensor": int(index), "host": bool(host), **layout}:
            return leaf(index, host, layout)
        case {"numpy": int(index), "scalar": scalar}:
            return {"numpy": put_aside(tensors[index]), "scalar": scalar}
        case {"list": items}:
            return {"list": [again(item) for item in items]}
        case {"tuple": items}:
            return {"tuple": [again(item) for item in items]}
        case {"distribution": kind, "parameters": parameters, "deterministic": deterministic}:
            return {"distribution": kind, "parameters": again(parameters), "deterministic": deterministic}
        case {"output": items}:
            return {"output": [[name, again(item)] for name, item in items]}
        case {"dict": items}:
            return {"dict": [[name, again(item)] for name, item in items]}
    return frozen
