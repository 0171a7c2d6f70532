"""The record of a job: the results of its calls into components, in order, as one stage after the other made them."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack
import torch

from protocol.tensors import Tensor
from workers.errors import StageError
from workers.replay.values import Untransferable, freeze, moved, shapes_only, thaw
from workers.tensors import from_wire, to_wire

RECORD = "record:"  # begins the names of the tensors that a record is made of
STATE = f"{RECORD}state"
PART, MOST_BYTES = "/", 128 << 20  # of a tensor in one frame of a message
NO_STAND_IN = "none"  # in the place of a result's shapes


def in_parts(tensor: Tensor) -> list[Tensor]:
    """Return a tensor in parts that fit a message's frame, where it is larger, such as a decoded video.

    The one of its own name tells its type and shape then; the others have its bytes.
    """
    data = memoryview(tensor.data).cast("B")
    if len(data) <= MOST_BYTES:
        return [tensor]
    packed = msgpack.packb([tensor.dtype, tensor.shape])
    rest = [data[start : start + MOST_BYTES] for start in range(0, len(data), MOST_BYTES)]
    parts = [Tensor(f"{tensor.name}{PART}{i}", "uint8", (len(part),), part) for i, part in enumerate(rest)]
    return [Tensor(tensor.name, "uint8", (len(packed),), packed), *parts]


def joined(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the tensor of a name, put together again where it came in parts."""
    if f"{name}{PART}0" not in tensors:
        return tensors[name]
    dtype, shape = msgpack.unpackb(tensors[name].data)
    found = itertools.takewhile(lambda part: part in tensors, (f"{name}{PART}{i}" for i in itertools.count()))
    return Tensor(name, dtype, tuple(shape), b"".join(tensors[part].data for part in found))


class Unprepared(StageError):
    """The call goes on to something for which an earlier stage has prepared nothing."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call into a component, or of `encode_prompt`, and its result as msgpack knows it."""

    label: str  # such as `vae.encode`
    result: Any


@dataclass(slots=True)
class CallRecord:
    calls: list[Call] = field(default_factory=list)
    decodes: list[Call] = field(default_factory=list)  # the arguments of a VAE's decode, in the place of a result
    forwards: list[list[Any]] = field(default_factory=list)  # [times, shapes] of denoisers' results, in order
    tensors: list[torch.Tensor] = field(default_factory=list)  # on the host
    goes_on: bool = False  # there is more to denoise once the decodes are made
    unsure: bool = False  # there may be: its own stage could not see what comes after them

    def _put_aside(self, tensor: torch.Tensor) -> int:
        self.tensors.append(tensor.detach().to("cpu"))
        return len(self.tensors) - 1

    def add(self, label: str, result: Any, device: torch.device) -> None:
        self.calls.append(Call(label, freeze(result, device, self._put_aside)))

    def add_decode(self, label: str, arguments: Any, device: torch.device) -> None:
        self.decodes.append(Call(label, freeze(arguments, device, self._put_aside)))

    def add_forward(self, result: Any, device: torch.device) -> None:
        """Note the shapes of a denoiser's result."""
        given: list[torch.Tensor] = []

        def put_aside(tensor: torch.Tensor) -> int:
            given.append(tensor)
            return len(given) - 1

        try:
            frozen = shapes_only(freeze(result, device, put_aside), given, lambda tensor: -1)
        except Untransferable:  # such as a cache of keys and values
            frozen = NO_STAND_IN
        if self.forwards and self.forwards[-1][1] == frozen:
            self.forwards[-1][0] += 1
        else:
            self.forwards.append([1, frozen])

    def forward(self, number: int, device: torch.device) -> Any:
        """Return zeros of the shapes of a denoiser's result, by its number; Unprepared where there were not so many."""
        for times, frozen in self.forwards:
            if number < times:
                if frozen == NO_STAND_IN:
                    raise StageError("nothing can stand in for what this denoiser returns")
                return thaw(frozen, (), device)
            number -= times
        raise Unprepared("a denoiser runs more often than in its own stage")

    @property
    def forwards_made(self) -> int:
        return sum(times for times, _ in self.forwards)

    @property
    def can_stand_in(self) -> bool:
        """Return whether zeros can take the place of all that the denoisers have returned."""
        return all(frozen != NO_STAND_IN for _, frozen in self.forwards)

    def value(self, call: Call, device: torch.device) -> Any:
        return thaw(call.result, self.tensors, device)

    def shapes_only(self) -> "CallRecord":
        """Return what is needed to come to the end once a decode's arguments are there.

        Its values have no effect then, but for what was decoded already, which is kept.
        """
        made = CallRecord(forwards=self.forwards)
        for call in self.calls:
            shrink = moved if call.label.endswith(".decode") else shapes_only
            made.calls.append(Call(call.label, shrink(call.result, self.tensors, made._put_aside)))
        return made

    # -- on the wire ----------------------------------------------------------------------------

    def pack(self) -> list[Tensor]:
        calls, decodes = ([[c.label, c.result] for c in calls] for calls in (self.calls, self.decodes))
        packed = msgpack.packb(
            {
                "calls": calls,
                "decodes": decodes,
                "forwards": self.forwards,
                "goes_on": self.goes_on,
                "unsure": self.unsure,
            }
        )
        state = Tensor(STATE, "uint8", (len(packed),), packed)
        named = (to_wire(f"{RECORD}{i}", tensor) for i, tensor in enumerate(self.tensors))
        return [state, *itertools.chain.from_iterable(map(in_parts, named))]

    @staticmethod
    def unpack(tensors: Sequence[Tensor]) -> "CallRecord":
        """Read a record from received tensors, an empty one where there is none; ValueError."""
        mine = {tensor.name: tensor for tensor in tensors if tensor.name.startswith(RECORD)}
        state = mine.pop(STATE, None)
        if state is None:
            return CallRecord()
        match msgpack.unpackb(state.data):
            case {
                "calls": list(calls), "decodes": list(decodes), "forwards": list(forwards), "goes_on": bool(goes_on),
                "unsure": bool(unsure),
            }:  # fmt: skip
                whole = (name for name in mine if PART not in name)
                values = [from_wire(joined(mine, f"{RECORD}{i}")) for i, _ in enumerate(whole)]
                made, left = [Call(*call) for call in calls], [Call(*call) for call in decodes]
                return CallRecord(made, left, forwards, values, goes_on, unsure)
        raise ValueError("a record doesn't hold what it should")
