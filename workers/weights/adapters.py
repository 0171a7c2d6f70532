"""The weights of a module's adapters (peft's): in host memory, with copies on the device for the jobs that want them.

Copies stay on the device while there is room: of those that no present job wants the least recently used go first.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from protocol.errors import DoesNotFit
from protocol.units import format_bytes
from workers.weights.streaming import memory_of_its_own, room, view_of

OF_ADAPTER = re.compile(r"(^|\.)(lora_|lokr_|loha_|hada_|oft_|dora_)")  # in the names of peft's modules and parameters


def is_of_adapter(name: str) -> bool:
    """Return whether a module or a parameter is of an adapter, by its name in its model."""
    return OF_ADAPTER.search(name) is not None


def adapter_parameters(module: torch.nn.Module, name: str) -> list[torch.nn.Parameter]:
    """Return the parameters of an adapter by its name."""
    return [p for key, p in module.named_parameters() if is_of_adapter(key) and f".{name}." in f"{key}."]


def base_of(layer: torch.nn.Module) -> torch.nn.Module:
    """Return a layer itself, or the one that an adapter stands around."""
    base = getattr(layer, "base_layer", layer)
    assert isinstance(base, torch.nn.Module)
    return base


@dataclass(slots=True)
class Adapter:
    parameters: list[torch.nn.Parameter]
    host: list[torch.Tensor]
    memory: torch.Tensor | None = None  # on the device, flat uint8

    @property
    def nbytes(self) -> int:
        """Bytes that its copies take on the device."""
        return sum(room(tensor.nbytes) for tensor in self.host)

    def bring(self, device: torch.device) -> None:
        if self.memory is not None:
            return
        self.memory, offset = memory_of_its_own(self.nbytes, device), 0
        for parameter, source in zip(self.parameters, self.host, strict=True):
            place = view_of(self.memory, offset, source)
            place.copy_(source, non_blocking=True)
            parameter.data = place
            offset += room(source.nbytes)

    def let_go(self) -> None:
        for parameter, source in zip(self.parameters, self.host, strict=True):
            parameter.data = source
        self.memory = None


class AdapterWeights:
    """The adapters of a `module` on its `device`; `reserve` makes `room` there for some bytes, or for less."""

    def __init__(self, module: torch.nn.Module, device: torch.device, reserve: Callable[[int], None]) -> None:
        self.module, self._device, self._reserve = module, device, reserve
        self._adapters: dict[str, Adapter] = {}  # the least recently used first
        self.room = 0  # bytes of the model's budget that are kept for adapters now
        self.wanted = 0  # bytes that some job wanted
        self._active: Sequence[str] = ()  # by the present job

    @property
    def device_bytes(self) -> int:
        return sum(one.memory.nbytes for one in self._adapters.values() if one.memory is not None)

    def make_room(self, size: int) -> None:
        """Make room for an adapter of about so many bytes, which is about to be loaded beside weights on the device."""
        self.let_go()
        self._want(size)

    def take_in(self, name: str) -> None:
        """Take in an adapter that was loaded: its weights in host memory, page-locked where they go to a GPU."""
        found = adapter_parameters(self.module, name)
        host = [parameter.data.cpu() for parameter in found]
        if self._device.type == "cuda":
            host = [tensor.pin_memory() for tensor in host]
        self._adapters[name] = Adapter(found, host)
        self._adapters[name].let_go()  # of what peft has put on the device

    def forget(self, name: str) -> None:
        """Forget an adapter that is about to be deleted."""
        self._adapters.pop(name).let_go()

    def let_go(self) -> None:
        """Let go of all copies on the device."""
        for adapter in self._adapters.values():
            adapter.let_go()

    @contextlib.contextmanager
    def active(self, names: Sequence[str]) -> Iterator[None]:
        """Want these adapters for a job: they come to the device with `bring`, once the model's weights are there."""
        for name in names:
            self._adapters[name] = self._adapters.pop(name)
        wanted = sum(self._adapters[name].nbytes for name in names)
        if wanted > self.room:
            self.let_go()
            self._want(wanted)
        spare = self.room - wanted
        for name, adapter in reversed(self._adapters.items()):
            if name not in names and adapter.memory is not None:
                spare -= adapter.nbytes
                if spare < 0:
                    adapter.let_go()
        self._active = names
        try:
            yield
        finally:
            self._active = ()

    def bring(self) -> None:
        """Bring the present job's adapters to the device, unless they are there; DoesNotFit."""
        self._want(sum(self._adapters[name].nbytes for name in self._active))
        for name in self._active:
            self._adapters[name].bring(self._device)

    def _want(self, size: int) -> None:
        if size > self.room:
            self._reserve(size)
        if size > self.room:
            raise DoesNotFit(
                f"A job's LoRAs take {format_bytes(size)} of GPU memory; beside what the model needs at least "
                f"{format_bytes(self.room)} are there.",
                "Name fewer of them at once, or give the stage more memory.",
            )
        self.wanted = max(self.wanted, size)
