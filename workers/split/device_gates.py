"""Several jobs in flight in one model whose layers lie on several GPUs: each GPU has one of them at a time.

Jobs are threads. A job passes a gate before its layers on a GPU and leaves it after them. It comes to a gate only once
its own results are there, so a GPU is never promised to a job that still waits for another GPU, and the gates are left
as soon as the work is queued, so a GPU goes from one job to the next without a pause. Each job has streams of its own:
in a common one, what waits for another GPU would hold up all that was queued behind it.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from workers.weights.residency import block_rows


@dataclass(slots=True)
class DeviceGate:
    """The gate of one device; `last` is the end of the work that was queued there last."""

    device: torch.device
    lock: threading.Lock = field(default_factory=threading.Lock)
    last: torch.cuda.Event | None = None

    @property
    def locked(self) -> bool:
        """Return whether a job is in the gate."""
        return self.lock.locked()

    def enter(self, before: torch.cuda.Event | None) -> None:
        """Enter once the work queued `before`, by the same job on another device, is done."""
        if before is not None:
            before.synchronize()
        self.lock.acquire()
        if self.last is not None:
            torch.cuda.current_stream(self.device).wait_event(self.last)

    def leave(self) -> torch.cuda.Event | None:
        """Leave the gate, and return the end of the work that is queued by now."""
        try:
            if self.device.type == "cuda":
                self.last = torch.cuda.current_stream(self.device).record_event()
        finally:
            self.lock.release()
        return self.last


class Passage(threading.local):
    """The place of one thread's job."""

    gate: DeviceGate | None = None
    before: torch.cuda.Event | None = None
    ready = False  # its streams are made


class DeviceGates:
    """The gates of a model's devices: `parts` are these, each with the number of blocks that lie there, in order.

    `entered` is called in a job's thread with the number of each gate that the job has passed.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        parts: Sequence[tuple[torch.device, int]],
        entered: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.devices = [device for device, count in parts if count]
        self._gates = [DeviceGate(device) for device in self.devices]
        self._passage, self._entered = Passage(), entered
        rows, at = block_rows(model), 0
        for index, count in enumerate(count for _, count in parts if count):
            if at:
                block = model.get_submodule(rows[at])
                block.register_forward_pre_hook(lambda *_, index=index: self._go_to(index), prepend=True)
            at += count

    def all(self) -> Sequence[DeviceGate]:
        return self._gates

    def around(self, model: torch.nn.Module) -> None:
        """Let each forward of a model, one of those that share the blocks, pass through the gates."""
        model.register_forward_pre_hook(lambda *_: self._go_to(0))
        model.register_forward_hook(lambda *_: self.leave())

    def _go_to(self, index: int) -> None:
        self._enter(index)
        self._entered(index)

    def _enter(self, index: int) -> None:
        self.leave()
        self._gates[index].enter(self._passage.before)
        self._passage.gate = self._gates[index]

    def leave(self) -> None:
        """Leave the gate that this thread's job is in, also where the job ended in the middle."""
        if self._passage.gate is not None:
            self._passage.before = self._passage.gate.leave()
            self._passage.gate = None

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """Have the first device to oneself, outside of a forward."""
        self._enter(0)
        try:
            yield
        finally:
            self.leave()

    @contextlib.contextmanager
    def job(self) -> Iterator[None]:
        """Surround a job in this thread."""
        if not self._passage.ready:
            for device in self.devices:
                if device.type == "cuda":
                    torch.cuda.set_stream(torch.cuda.Stream(device))
            if self.devices[0].type == "cuda":
                torch.cuda.set_device(self.devices[0])
            self._passage.ready = True
        self._passage.before = None
        try:
            yield
        finally:
            self.leave()


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
         "_forward_hooks_always_called")  # fmt: skip


def twin_of(module: torch.nn.Module) -> torch.nn.Module:
    """A model with the same layers and weights, and hooks of its own around the whole."""
    twin: Any = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    for name in HOOKS:
        twin.__dict__[name] = type(module.__dict__[name])(module.__dict__[name])
    return twin  # type: ignore[no-any-return]
