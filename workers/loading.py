"""A stage's pipeline with its weights in place, each component where it fits.

One GPU if a component fits on one; else its layers over all GPUs of the stage by accelerate's `device_map="auto"`
under `max_memory`; else streamed through the first GPU. What can't even be streamed is refused.
"""

import contextlib
import json
import logging
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model
from diffusers import DiffusionPipeline

from protocol.errors import BadRequest, DoesNotFit, ModelMissing, TriptychError
from protocol.jobs import Stage
from protocol.units import format_bytes
from workers.gates import Gates, twin_of
from workers.mapped import lock_ahead
from workers.residency import Residency, block_rows
from workers.skeleton import (
    component_class,
    expected_components,
    on_meta,
    pipeline_class,
    plain_settings,
    quiet,
    stub_vae,
)
from workers.source import Source, stages_of
from workers.speed import EXACT, Speed

log = logging.getLogger(__name__)

SAFETENSORS_ITEMSIZE = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What a stage needs on a GPU beside its weights, in bytes: activations at about 1024 × 1024, erring high.
WORKSPACE: dict[Stage, int] = {"text": 600_000_000, "denoise": 1_600_000_000, "vae": 3_430_000_000}


@dataclass(slots=True)
class Devices:
    """Where a stage may put things. `room` counts the bytes left on each GPU, by its index among the visible ones.

    A component that needs several GPUs is spread evenly, or, where each GPU was given an amount of its own, fills one
    after the other up to it. A CPU has room for everything, unless a `room` says that it stands in for a small GPU.
    What works in leases (`leased`) stays in host memory until it gets one.
    """

    primary: torch.device
    room: dict[int, int] = field(default_factory=dict)
    evenly: bool = True
    leased: bool = False
    cut: tuple[int, ...] = ()  # blocks of the denoiser on each of its GPUs
    workspace: int | None = None  # bytes to be left beside weights; None: an estimate

    def workspace_of(self, stage: Stage) -> int:
        """Bytes to be left free on each GPU."""
        if self.workspace is not None:
            return self.workspace
        return WORKSPACE[stage] if self.primary.type == "cuda" else 0

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
            room_there = {0: min(max_memory)} if max_memory and not cut else {}
            return Devices(chosen, room_there, leased=leased, cut=cut, workspace=workspace)
        if not torch.cuda.is_available():
            raise TriptychError(
                "There is no CUDA GPU that torch can use here.", "Use --device cpu, or see: triptych doctor."
            )
        indices = range(torch.cuda.device_count()) if chosen.index is None else [chosen.index]
        if leased:
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
            if limits:
                torch.cuda.set_per_process_memory_fraction(min(1.0, limits[i] / total), gpu)
        return Devices(
            torch.device("cuda", next(iter(room))), room, evenly=len(max_memory) < 2, cut=cut, workspace=workspace
        )


@dataclass(slots=True)
class Loaded:
    """A stage's pipeline, where its modules are, (module, device), and the residency of those on a GPU of their own."""

    pipeline: DiffusionPipeline
    device_map: tuple[tuple[str, str], ...]
    residencies: dict[str, Residency] = field(default_factory=dict)  # by component
    gates: Gates | None = None  # where several jobs go through it at once

    def another(self) -> "Loaded":
        """The same models in a pipeline with a scheduler and hooks of its own, for one of several jobs at once."""
        parts = dict(self.pipeline.components)
        parts["scheduler"] = type(parts["scheduler"]).from_config(parts["scheduler"].config)
        for name, part in parts.items():
            if isinstance(part, torch.nn.Module) and stages_of(name) == ("denoise",):
                parts[name] = twin_of(part)
                if self.gates:
                    self.gates.around(parts[name])
        settings = {name: value for name, value in self.pipeline.config.items() if name not in parts and name[0] != "_"}
        pipeline = type(self.pipeline)(**parts, **settings)
        pipeline.set_progress_bar_config(disable=True)
        return Loaded(pipeline, self.device_map, self.residencies, self.gates)


def load(source: Source, stage: Stage, devices: Devices, dtype: torch.dtype, speed: Speed = EXACT) -> Loaded:
    """Load what the stage needs; the other components are None, but for a stub VAE in the denoiser."""
    cls = pipeline_class(source)
    wanted = source.components(stage)
    parts: dict[str, Any] = {}
    spread: list[tuple[str, str]] = []
    residencies: dict[str, Residency] = {}
    gates: Gates | None = None
    if devices.leased and devices.primary.type == "cuda" and not speed.quantize:
        lock_ahead(files_as_they_are(source, wanted, dtype), devices.primary)
    with quiet():
        for name in sorted(expected_components(cls)):
            if name in wanted and _has_weights(source, name):
                parts[name], places, residency = load_weights(source, name, stage, devices, dtype, speed)
                spread += places
                if residency:
                    residencies[name] = residency
                if devices.cut:
                    gates = Gates(parts[name], parts_of(devices))
            elif name in wanted:
                parts[name] = component_class(source, name).from_pretrained(source.folder, subfolder=name)
            elif stage == "denoise" and name in source.index and stages_of(name) == ("vae",):
                parts[name] = stub_vae(source, name, dtype, devices.primary)
            else:
                parts[name] = None
        pipeline = cls(**parts, **plain_settings(source, cls))
        speed.in_place(pipeline, residencies)
    pipeline.set_progress_bar_config(disable=True)
    return Loaded(pipeline, tuple(spread), residencies, gates)


def _has_weights(source: Source, name: str) -> bool:
    """Models have a config.json; tokenizers and schedulers name theirs otherwise. Else ModelMissing."""
    if not (source.folder / name / "config.json").exists():
        return False
    if not any((source.folder / name).glob("*.safetensors")):
        raise ModelMissing(
            f"{source.model!r} has no safetensors weights for its {name}.",
            f"With a network: hf download {source.model}.",
        )
    return True


def load_weights(
    source: Source, name: str, stage: Stage, devices: Devices, dtype: torch.dtype, speed: Speed
) -> tuple[torch.nn.Module, list[tuple[str, str]], Residency | None]:
    """One component, where its parts went, and its residency if it is on one device."""
    arguments: dict[str, Any] = {"subfolder": name, "dtype": dtype, "use_safetensors": True}
    cls = component_class(source, name)
    arguments |= speed.loading_arguments(cls)
    together = speed.together(devices.primary)
    if together:
        cls = together.model_class(cls)
        arguments |= together.loading_arguments()

    def from_host() -> torch.nn.Module:
        module: torch.nn.Module = cls.from_pretrained(source.folder, **arguments).eval()
        speed.after_loading(module)
        return module

    if devices.cut and devices.primary.type == "cuda":
        module, spread = spread_layers(source, name, devices, devices.room, arguments)
        speed.after_loading(module)
        return module, spread, None
    first, workspace = devices.primary.index or 0, devices.workspace_of(stage)
    if together:
        module = from_host()
        together.after_loading(module)
        residency = Residency(name, module, devices.primary)
        room_for_weights = devices.room[first] - workspace if devices.room else residency.total_bytes
        residency.swap_in(min(residency.total_bytes, room_for_weights))
        return module, [(name, f"{devices.primary} ({speed.parallel})")], residency
    if devices.leased:
        module = from_host()
        residency = Residency(name, module, devices.primary, whole=stage == "vae")
        return module, [(name, str(devices.primary))], residency
    if not devices.room:
        module = from_host().to(devices.primary)
        return module, [(name, str(devices.primary))], None
    size = weight_bytes(source, name, dtype)
    place = choose(size, devices.room, workspace)
    if isinstance(place, dict):
        module, spread = spread_layers(source, name, devices, place, arguments)
        speed.after_loading(module)
        return module, spread, None
    if isinstance(place, int) and place != first:
        devices.room[place] -= size
        module = from_host().to(f"cuda:{place}")
        module = dispatch_model(module, {"": place}, main_device=place, force_hooks=True)
        return module, [(name, f"cuda:{place}")], None
    if place is None and stage == "vae":  # small, and may be cast for a job: it is in or it isn't
        raise DoesNotFit(
            f"{name} of {source.model!r} has {format_bytes(size)} of weights and needs "
            f"{format_bytes(workspace)} to work with; {format_bytes(sum(devices.room.values()))} are free.",
            f"Give the stage another GPU, or the CPU: --gpus {stage}=1 or --device {stage}=cpu.",
        )
    residency = Residency(name, from_host(), devices.primary)
    residency.swap_in(residency.total_bytes if place is not None else max(0, devices.room[first] - workspace))
    devices.room[first] -= residency.device_bytes
    log.info("%s is %s on %s with %s", name, residency.state, devices.primary, format_bytes(residency.device_bytes))
    where = str(devices.primary) + (" (streamed)" if residency.state == "streamed" else "")
    return residency.module, [(name, where)], residency


def spread_layers(
    source: Source, name: str, devices: Devices, place: dict[int, int], arguments: dict[str, Any]
) -> tuple[torch.nn.Module, list[tuple[str, str]]]:
    """A component's layers over several GPUs, by accelerate: by the cut, where there is one."""
    log.info("%s is spread under %s, cut %s", name, place, devices.cut or "by bytes")
    device_map: Any = "auto" if devices.evenly else "sequential"
    cls = component_class(source, name)
    if devices.cut:
        device_map = cut_map(on_meta(source, name), parts_of(devices))
    try:
        module = cls.from_pretrained(source.folder, device_map=device_map, max_memory=place, **arguments).eval()
    except ValueError as error:  # whole layers leave gaps; accelerate would put the rest on disk
        if "offload" not in str(error):
            raise
        raise DoesNotFit(
            f"The layers of {name} of {source.model!r} leave gaps, and don't fit {place} bytes on these GPUs.",
            "Give a little more with --max-memory.",
        ) from error
    spread = [(f"{name}.{part}".rstrip("."), _device_name(where)) for part, where in module.hf_device_map.items()]
    return module, spread


def parts_of(devices: Devices) -> list[tuple[torch.device, int]]:
    """The devices that a denoiser is cut over, and how many of its blocks each gets."""
    gpus: list[torch.device] = [torch.device("cuda", gpu) for gpu in devices.room] or [devices.primary] * len(
        devices.cut
    )
    if len(gpus) != len(devices.cut):
        raise BadRequest(f"--cut has {len(devices.cut)} parts for {len(gpus)} GPU(s).", "Give one for each.")
    return list(zip(gpus, devices.cut, strict=True))


def cut_map(model: torch.nn.Module, parts: Sequence[tuple[torch.device, int]]) -> dict[str, int]:
    """Where each of a model's modules goes: blocks by the cut, what comes before them first, what comes after last."""
    rows = block_rows(model)
    if sum(count for _, count in parts) != len(rows):
        raise BadRequest(f"--cut gives {[count for _, count in parts]} blocks; there are {len(rows)}.", "Leave it out.")
    places = [device.index for device, count in parts for _ in range(count)]
    found: dict[str, int] = {}
    passed = False
    for name, _ in model.named_children():
        inside = [row for row in rows if row.startswith(f"{name}.")]
        passed = passed or bool(inside)
        if not inside:
            found[name] = places[-1 if passed else 0]
    return found | dict(zip(rows, places, strict=True))


def _device_name(where: int | str | torch.device) -> str:
    return f"cuda:{where}" if isinstance(where, int) else str(where)


def choose(size: int, room: Mapping[int, int], workspace: int) -> int | dict[int, int] | None:
    """The GPU that a component of `size` bytes goes to; max_memory where only several hold it; None where none do."""
    for gpu, free in room.items():
        if size + workspace <= free:
            return gpu
    budgets = {gpu: max(0, free - workspace) for gpu, free in room.items()}
    return budgets if len(budgets) > 1 and size * 1.02 <= sum(budgets.values()) else None


def weight_bytes(source: Source, name: str, dtype: torch.dtype) -> int:
    """Bytes of a component's weights once loaded as `dtype`, from the headers of its safetensors files."""
    return sum(
        (end - start) // SAFETENSORS_ITEMSIZE.get(kind, 1) * dtype.itemsize
        for path in weight_files(source, name)
        for kind, (start, end) in stored(path)
    )


def files_as_they_are(source: Source, names: Iterable[str], dtype: torch.dtype) -> list[Path]:
    """Safetensors files of components that need no cast to `dtype`."""
    kind = next(kind for kind, known in SAFETENSORS_DTYPES.items() if known == dtype)
    found: list[Path] = []
    for path in (path for name in names for path in weight_files(source, name)):
        with contextlib.suppress(struct.error, ValueError):  # a damaged file: loading will tell
            if all(stored_kind == kind for stored_kind, _ in stored(path)):
                found.append(path)
    return found


def weight_files(source: Source, name: str) -> list[Path]:
    """The safetensors files that loading a component reads: not those of variants beside them."""
    folder = source.folder / name
    for base in ("diffusion_pytorch_model", "model"):
        index = folder / f"{base}.safetensors.index.json"
        if index.exists():
            names = {Path(part).name for part in json.loads(index.read_text())["weight_map"].values()}
            return sorted(path for part in names if (path := folder / part).exists())
        if (whole := folder / f"{base}.safetensors").exists():
            return [whole]
    return sorted(folder.glob("*.safetensors"))


def stored(path: Path) -> list[tuple[str, tuple[int, int]]]:
    """(dtype, where it begins and ends) of each tensor in a safetensors file, from its header."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return [(entry["dtype"], tuple(entry["data_offsets"])) for key, entry in header.items() if key != "__metadata__"]
