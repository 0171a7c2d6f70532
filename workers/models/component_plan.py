"""The plan by which a component's weights come to its stage's devices: a pure choice, by sizes alone."""

from collections.abc import Mapping
from dataclasses import dataclass

from protocol.errors import DoesNotFit
from protocol.stages import Stage
from protocol.units import format_bytes
from workers.models.devices import Devices, choose


@dataclass(frozen=True, slots=True)
class InLeases:
    """A component in host memory until a lease gives it room on a GPU. A VAE is used `whole`, never streamed."""

    whole: bool


@dataclass(frozen=True, slots=True)
class AmongRanks:
    """A component shared out among processes; this one's part is in at most `budget` bytes, None where all has room."""

    budget: int | None
    leased: bool


@dataclass(frozen=True, slots=True)
class WholeOn:
    """A whole component on one device: a GPU beside the stage's first, or, without one, where everything has room."""

    gpu: int | None


@dataclass(frozen=True, slots=True)
class Spread:
    """A component's layers over several GPUs, each with so many bytes at most."""

    max_memory: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Resident:
    """A component on the stage's first GPU in at most `budget` bytes, streamed through them where it is larger."""

    gpu: int
    budget: int


ComponentPlan = InLeases | AmongRanks | WholeOn | Spread | Resident


def needs_size(devices: Devices, among_ranks: bool) -> bool:
    """Return whether `plan_component` goes by the component's size."""
    return bool(devices.room) and not devices.leased and not among_ranks


def plan_component(
    name: str, size: int, stage: Stage, devices: Devices, room: Mapping[int, int], among_ranks: bool
) -> ComponentPlan:
    """Choose how a component of `size` bytes is loaded, where `room` bytes are left of each GPU.

    Raises:
        DoesNotFit: a VAE that fits nowhere; anything else can at least be tried to be streamed.
    """
    first, workspace = devices.primary.index or 0, devices.workspace_of(stage)
    if among_ranks:
        return AmongRanks(room[first] - workspace if room else None, devices.leased)
    if devices.leased:
        return InLeases(whole=stage == "vae")
    if not room:
        return WholeOn(None)
    match choose(size, room, workspace):
        case dict(max_memory):
            return Spread(max_memory)
        case int(gpu) if gpu != first:
            return WholeOn(gpu)
        case None if stage == "vae":  # small, and may be cast for a job: it is in or it isn't
            raise DoesNotFit(
                f"{name} has {format_bytes(size)} of weights and needs {format_bytes(workspace)} to work with; "
                f"{format_bytes(sum(room.values()))} are free.",
                f"Give the stage another GPU, or the CPU: --gpus {stage}=1 or --device {stage}=cpu.",
            )
    return Resident(first, max(0, room[first] - workspace))
