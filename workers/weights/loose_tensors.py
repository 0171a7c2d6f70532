"""A module's tensors beside its parameters: buffers, and plain attributes and caches that its code keeps.

Buffers are moved to the device with the weights. Attributes (rotary tables, caches by size) are brought there by the
module's own code when it first needs them. When the weights are let go, all of them are again what loading left in host
memory, so that nothing stays behind on the device, and a later run starts as the first one did.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from workers.weights.streaming import room

INTERNALS = frozenset(vars(torch.nn.Module()))  # torch's own attributes of every module
Containers = (dict, list, tuple, set)


@dataclass(frozen=True, slots=True)
class Buffer:
    owner: torch.nn.Module
    name: str  # in its owner
    tensor: torch.Tensor  # in host memory


@dataclass(frozen=True, slots=True)
class Scale:
    """A tensor that bitsandbytes keeps beside a quantized weight."""

    owner: Any  # the weight, an object of its, or its layer's state
    name: str  # of the attribute
    tensor: torch.Tensor  # in host memory


@dataclass(frozen=True, slots=True)
class Owner:
    """A module with its plain attributes, containers as shallow copies."""

    module: torch.nn.Module
    attributes: Mapping[str, Any]


class LooseTensors:
    """The loose tensors of a module whose names, as in `named_buffers`, are `mine`."""

    def __init__(self, module: torch.nn.Module, mine: Callable[[str], bool] = lambda _: True) -> None:
        self._buffers: list[Buffer] = []
        self._scales: list[Scale] = []
        self._owners: list[Owner] = []
        kinds: set[type] = set()
        for path, part in module.named_modules():
            prefix = f"{path}." if path else ""
            for name, tensor in part._buffers.items():
                if tensor is not None and mine(prefix + name):
                    self._buffers.append(Buffer(part, name, tensor))
            for name, parameter in part._parameters.items():
                if parameter is not None and mine(prefix + name):
                    self._scales += scales_of(part, parameter)
            if mine(path or "."):
                kinds.add(type(part))
                plain = {k: copy_of(v) for k, v in vars(part).items() if k not in INTERNALS}
                self._owners.append(Owner(part, plain))
        self._caches = [cache for kind in kinds for cache in caches_of(kind)]

    @property
    def scaled(self) -> bool:
        """Whether there are weights that bitsandbytes has quantized."""
        return bool(self._scales)

    @property
    def nbytes(self) -> int:
        """Bytes to set aside on a device for buffers, and for attributes that hold tensors already."""
        tensors = {id(buffer.tensor): buffer.tensor for buffer in self._buffers}
        tensors |= {id(scale.tensor): scale.tensor for scale in self._scales}
        for owner in self._owners:
            tensors |= {id(tensor): tensor for value in owner.attributes.values() for tensor in tensors_in(value)}
        return sum(room(tensor.nbytes) for tensor in tensors.values())

    def move_in(self, device: torch.device) -> None:
        """Put copies of the buffers on the device; what two modules share is copied once."""
        copies: dict[int, torch.Tensor] = {}
        for buffer in self._buffers:
            source = buffer.tensor
            if id(source) not in copies:
                copies[id(source)] = source.to(device)
            buffer.owner._buffers[buffer.name] = copies[id(source)]
        for scale in self._scales:
            setattr(scale.owner, scale.name, scale.tensor.to(device))

    def let_go(self, device: torch.device) -> None:
        """Leave nothing on the device: buffers and attributes are again those in host memory."""
        for buffer in self._buffers:
            buffer.owner._buffers[buffer.name] = buffer.tensor
        for scale in self._scales:
            setattr(scale.owner, scale.name, scale.tensor)
        if device.type == "cpu":
            return
        for owner in self._owners:
            for name, value in [*vars(owner.module).items()]:
                if name not in INTERNALS and any(tensor.device.type == device.type for tensor in tensors_in(value)):
                    restore(owner, name, value)
        for clear in self._caches:
            clear()


def scales_of(layer: torch.nn.Module, parameter: torch.nn.Parameter) -> Iterator[Scale]:
    """Yield what bitsandbytes keeps beside a parameter: of four bits the parameter has it, of eight its layer."""
    state = getattr(parameter, "quant_state", None)
    for owner in (state, getattr(state, "state2", None)):
        for name, value in vars(owner).items() if owner is not None else ():
            if isinstance(value, torch.Tensor):
                yield Scale(owner, name, value)
    if hasattr(parameter, "SCB"):
        own: Any = layer.state
        yield Scale(own, "SCB", own.SCB)


def copy_of(value: Any) -> Any:
    return value.copy() if isinstance(value, dict | list | set) else value


def tensors_in(value: object, depth: int = 2) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
        yield value
    elif isinstance(value, Containers) and depth:
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item, depth - 1)


def restore(owner: Owner, name: str, value: Any) -> None:
    """Make an attribute what it was; one that is new goes. A container stays the same object, which others may hold."""
    if name not in owner.attributes:
        delattr(owner.module, name)
        return
    was = owner.attributes[name]
    if isinstance(value, dict | set) and isinstance(was, dict | set):
        value.clear()
        value.update(was)
    elif isinstance(value, list) and isinstance(was, list):
        value[:] = was
    else:
        setattr(owner.module, name, copy_of(was))


def caches_of(kind: type) -> list[Callable[[], None]]:
    """Return functions that empty a class's method caches (functools.lru_cache), also behind a wrapper of diffusers."""
    found: dict[int, Callable[[], None]] = {}
    for cls in kind.__mro__:
        if cls is torch.nn.Module:
            break
        for method in vars(cls).values():
            behind = [cell.cell_contents for cell in getattr(method, "__closure__", None) or () if filled(cell)]
            for function in (method, *behind):
                clear = getattr(function, "cache_clear", None)
                if callable(clear):
                    found[id(function)] = clear
    return list(found.values())


def filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # nothing was assigned yet
        return False
