"""The devices of a stage, and the bytes that it may use of each."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from protocol.errors import BadRequest, TriptychError
from protocol.stages import Stage
from workers.weights.copy_stream import CopyStreams, copy_stream_for

# What a stage needs on a GPU beside its weights, in bytes: activations at about 1024 × 1024, erring high.
WORKSPACE: dict[Stage, int] = {"text": 600_000_000, "denoise": 1_600_000_000, "vae": 3_430_000_000}


@dataclass(frozen=True, slots=True)
class Devices:
    """The devices of a stage. `room` has the bytes to use of each GPU, by its index among the visible ones.

    A component that needs several GPUs is spread evenly, or, where each GPU was given an amount of its own, fills one
    after the other up to it. A CPU has room for everything, unless a `room` says that it stands in for a small GPU.
    What works in leases (`leased`) stays in host memory until it gets one.
    """

    primary: torch.device
    room: Mapping[int, int] = field(default_factory=dict)
    evenly: bool = True
    leased: bool = False
    cut: tuple[int, ...] = ()  # blocks of the denoiser on each of its GPUs
    workspace: int | None = None  # bytes to be left beside weights; None: an estimate
    copy_stream: CopyStreams = copy_stream_for

    def workspace_of(self, stage: Stage) -> int:
        """Bytes to be left free on each GPU."""
        if self.workspace is not None:
            return self.workspace
        return WORKSPACE[stage] if self.primary.type == "cuda" else 0

    def parts(self, stage: Stage) -> list[tuple[torch.device, int, int]]:
        """Return the parts that a denoiser is cut into: devices, each with its number of blocks and its bytes."""
        cuda, workspace = self.primary.type == "cuda", self.workspace_of(stage)
        room = self.room or dict.fromkeys(range(len(self.cut)), sys.maxsize)  # a CPU's
        if len(room) != len(self.cut):
            raise BadRequest(f"--cut has {len(self.cut)} parts for {len(room)} GPU(s).", "Give one for each.")
        return [
            (torch.device("cuda", gpu) if cuda else self.primary, count, size - workspace)
            for (gpu, size), count in zip(room.items(), self.cut, strict=True)
        ]

    @staticmethod
    def of(
        device: str,
        max_memory: tuple[int, ...],
        leased: bool = False,
        cut: tuple[int, ...] = (),
        workspace: int | None = None,
    ) -> "Devices":
        """All visible GPUs for 'cuda', one for 'cuda:1'.

        `max_memory` caps this process's allocator: bytes of each GPU, one amount for all or one each; () is all.
        """
        chosen = torch.device(device)
        if chosen.type != "cuda":
            amounts = max_memory if cut else max_memory and (min(max_memory),)
            return Devices(chosen, dict(enumerate(amounts)), leased=leased, cut=cut, workspace=workspace)
        if not torch.cuda.is_available():
            raise TriptychError(
                "There is no CUDA GPU that torch can use here.", "Use --device cpu, or see: triptych doctor."
            )
        indices = range(torch.cuda.device_count()) if chosen.index is None else [chosen.index]
        if leased and not max_memory:
            return Devices(torch.device("cuda", next(iter(indices))), leased=True)
        if len(max_memory) not in (0, 1, len(indices)):
            raise BadRequest(
                f"--max-memory has {len(max_memory)} amounts for {len(indices)} GPU(s).", "Give one, or one for each."
            )
        limits = max_memory if len(max_memory) == len(indices) else max_memory * len(indices)
        room: dict[int, int] = {}
        for i, gpu in enumerate(indices):
            free, total = torch.cuda.mem_get_info(gpu)
            room[gpu] = min(free, limits[i]) if limits else free
            if limits and not leased:
                torch.cuda.set_per_process_memory_fraction(min(1.0, limits[i] / total), gpu)
        return Devices(torch.device("cuda", next(iter(room))), room, len(max_memory) < 2, leased, cut, workspace)


def choose(size: int, room: Mapping[int, int], workspace: int) -> int | dict[int, int] | None:
    """The GPU that a component of `size` bytes goes to; max_memory where only several hold it; None where none do."""
    for gpu, free in room.items():
        if size + workspace <= free:
            return gpu
    budgets = {gpu: max(0, free - workspace) for gpu, free in room.items()}
    return budgets if len(budgets) > 1 and size * 1.02 <= sum(budgets.values()) else None
