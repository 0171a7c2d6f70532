"""A stage's pipeline with its weights in place, each component where it fits.

One GPU if a component fits on one; else its layers over all GPUs of the stage by accelerate's `device_map="auto"`
under `max_memory`; else streamed through the first GPU. What can't even be streamed is refused.
"""

import contextlib
import errno
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model
from diffusers import DiffusionPipeline, SchedulerMixin
from safetensors import SafetensorError
from torch.nn import Module

from protocol.errors import BadRequest, ModelMissing
from protocol.job import Recipe
from protocol.stages import Stage
from protocol.units import format_bytes
from workers.errors import cause_of
from workers.models.bitsandbytes_weights import let_move, loaded_on_host
from workers.models.component_plan import (
    AmongRanks,
    InLeases,
    Resident,
    Spread,
    WholeOn,
    needs_size,
    plan_component,
)
from workers.models.devices import Devices
from workers.models.ip_adapter import adapt
from workers.models.layer_spread import spread_layers
from workers.models.loras import LoraAdapters
from workers.models.model_check import judge
from workers.models.single_file import load_single
from workers.models.skeleton import (
    added_names,
    component_class,
    expected_components,
    on_meta,
    pipeline_class,
    plain_settings,
    quiet,
    without_weights,
)
from workers.models.source import BITSANDBYTES, CONTROLNET, GGUF, Source, quantization_method, stages_of
from workers.models.speedups import EXACT, StageSpeedups
from workers.models.tasks import class_for
from workers.models.weight_files import (
    DTYPES,
    Damaged,
    StoredTensor,
    WeightFiles,
    header_of,
    headers_of,
    missing,
    weight_files,
)
from workers.replay.boundaries import install
from workers.replay.placeholder import of_the_same_name
from workers.split.device_gates import twin_of
from workers.split.pipeline_split import PipelineSplit
from workers.weights.page_locks import PAGE_LOCKER
from workers.weights.residency import Residency

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Loaded:
    """A stage's pipeline, where its modules are, (module, device), and the residency of those on a GPU of their own."""

    pipeline: DiffusionPipeline
    device_map: tuple[tuple[str, str], ...]
    residencies: dict[str, Residency] = field(default_factory=dict)  # by component
    split: PipelineSplit | None = None  # of a denoiser that is cut, which several jobs go through at once
    added: Mapping[str, Any] = field(default_factory=dict)  # components beside the pipeline's, by name
    loras: LoraAdapters | None = None
    _others: dict[type, DiffusionPipeline] = field(default_factory=dict)  # for jobs with pictures, by class

    def pipeline_for(self, recipe: Recipe) -> DiffusionPipeline:
        """Return the pipeline for what a job's pictures ask for, over the same components; made once."""
        base: Any = type(self.pipeline).__base__
        added = self.added.get(CONTROLNET)
        cls = class_for(base, recipe, type(added).__name__ if added is not None else None)
        if cls is base:
            return self.pipeline
        if cls not in self._others:
            parts = {name: self.components.get(name) for name in expected_components(cls)}
            _, optional = cls._get_signature_keys(cls)
            config = self.pipeline.config
            settings = {name: config[name] for name in optional if name in config and name not in parts}
            pipeline = on_device(cls, self.pipeline.device)(**parts, **settings)
            install_boundaries(pipeline)
            pipeline.set_progress_bar_config(disable=True)
            self._others[cls] = pipeline
        return self._others[cls]

    @property
    def components(self) -> dict[str, Any]:
        """The components of its pipelines, by name."""
        return {**self.pipeline.components, **self.added}

    def another(self) -> "Loaded":
        """The same models in a pipeline with a scheduler and hooks of its own, for one of several jobs at once."""
        parts = dict(self.pipeline.components)
        for name, part in parts.items():
            if isinstance(part, SchedulerMixin):
                parts[name] = type(part).from_config(part.config)
            if isinstance(part, torch.nn.Module) and stages_of(name) == ("denoise",):
                parts[name] = twin_of(part)
                if self.split:
                    self.split.gates.around(parts[name])
        settings = {name: value for name, value in self.pipeline.config.items() if name not in parts and name[0] != "_"}
        pipeline = type(self.pipeline)(**parts, **settings)
        install_boundaries(pipeline)
        pipeline.set_progress_bar_config(disable=True)
        return Loaded(pipeline, self.device_map, self.residencies, self.split, self.added, self.loras)


def load(source: Source, stage: Stage, devices: Devices, dtype: torch.dtype, speed: StageSpeedups = EXACT) -> Loaded:
    """Load what the stage needs; placeholders stand for other components with weights."""
    cls = pipeline_class(source)
    wanted = source.components(stage)
    components: dict[str, Any] = {}
    spread: list[tuple[str, str]] = []
    residencies: dict[str, Residency] = {}
    split: PipelineSplit | None = None
    room: Mapping[int, int] = devices.room
    if (devices.leased or devices.cut) and devices.primary.type == "cuda" and not speed.quantize:
        PAGE_LOCKER.lock_ahead(files_as_they_are(source, wanted, dtype), devices.primary)
    beside = added_names(source, cls)
    with quiet():
        for name in sorted({*expected_components(cls), *beside}):
            if name in wanted and _has_weights(source, name) and devices.cut:
                if split:
                    raise BadRequest(f"{source.model!r} has more than one denoiser to be cut.", "Leave --cut out.")
                split = load_split(source, name, stage, devices, dtype, speed)
                components[name] = split.module
                spread += [(f"{name}.{part}", where) for part, where in split.map()]
                residencies |= {residency.name: residency for residency in split.residencies}
            elif name in wanted and _has_weights(source, name):
                placed = load_weights(source, name, stage, devices, room, dtype, speed)
                components[name] = placed.module
                spread += placed.places
                room = {gpu: size - placed.taken.get(gpu, 0) for gpu, size in room.items()}
                if placed.residency:
                    residencies[name] = placed.residency
            else:
                components[name] = without_weights(source, name, devices.primary, dtype)
        added = {name: components.pop(name) for name in beside}
        pipeline = on_device(cls, devices.primary)(**components, **plain_settings(source, cls))
        install_boundaries(pipeline)
        speed.in_place(pipeline, residencies)
    pipeline.set_progress_bar_config(disable=True)
    own = {name: part for name, part in pipeline.components.items() if name in wanted and isinstance(part, Module)}
    loras = LoraAdapters(pipeline, own, residencies, why_no_loras(devices, speed))
    return Loaded(pipeline, tuple(spread), residencies, split, added, loras)


def why_no_loras(devices: Devices, speed: StageSpeedups) -> str:
    """Return why a stage's models can't take adapters; empty if they can."""
    if devices.cut:
        return "that is split over GPUs"
    if speed.compiled or speed.parallel or speed.quantize:
        return "that is compiled, quantized or shared out among GPUs"
    return ""


def on_device(cls: type[DiffusionPipeline], device: torch.device) -> type[DiffusionPipeline]:
    """Return a pipeline's class, with the device on which it computes, wherever its weights are between two jobs."""
    where = property(lambda self: device)
    return of_the_same_name(cls, device=where, _execution_device=where)


def install_boundaries(pipeline: DiffusionPipeline) -> None:
    install(pipeline, {name: stages_of(name)[0] for name in pipeline.components if len(stages_of(name)) == 1})


def _has_weights(source: Source, name: str) -> bool:
    """Return whether a component is a model with a config.json; tokenizers and schedulers name theirs otherwise."""
    return (source.folder_of(name) / "config.json").exists()


def load_module(source: Source, name: str, cls: Any, arguments: dict[str, Any]) -> torch.nn.Module:
    """A component with all its weights, and no others; ModelMissing where they aren't those that its class wants."""
    if name in source.single:
        return load_single(source, name, cls, arguments)
    try:
        files = files_of(source, name)
        if files.variant and name not in _told:
            _told.add(name)
            log.info("%s has weights in the variant %s alone; that is used", name, files.variant)
        by_bitsandbytes = quantization_method(source, name) == BITSANDBYTES
        with loaded_on_host() if by_bitsandbytes else contextlib.nullcontext():
            module, report = cls.from_pretrained(
                source.folder_of(name), use_safetensors=True, variant=files.variant, output_loading_info=True,
                **arguments,
            )  # fmt: skip
        if by_bitsandbytes:
            let_move(module)
        judge(report, f"{name}/{files.paths[0].name}")
    except Damaged as error:
        raise missing(source.model, name, error) from error
    except (OSError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno in PASSING:
            raise
        raise ModelMissing(
            f"{source.model!r}, {name}: it can't be loaded: {cause_of(error)}.", "Download it again."
        ) from error
    loaded: torch.nn.Module = module.eval()
    return loaded


PASSING = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EIO, errno.EINTR, errno.EAGAIN)  # no fault of the files
_told: set[str] = set()  # components whose variant was named


def load_split(
    source: Source, name: str, stage: Stage, devices: Devices, dtype: torch.dtype, speed: StageSpeedups
) -> PipelineSplit:
    """A denoiser cut over its GPUs; BadRequest or DoesNotFit."""
    module = load_module(source, name, component_class(source, name), {"dtype": dtype})
    adapt(source, name, module)
    speed.after_loading(module)
    return PipelineSplit(name, module, devices.parts(stage), devices.leased, devices.copy_stream)


@dataclass(frozen=True, slots=True)
class Placed:
    """A component that is loaded: where its parts went, its residency if it has one, and what it took of which GPU."""

    module: torch.nn.Module
    places: list[tuple[str, str]]
    residency: Residency | None = None
    taken: Mapping[int, int] = field(default_factory=dict)  # bytes by GPU


def load_weights(
    source: Source,
    name: str,
    stage: Stage,
    devices: Devices,
    room: Mapping[int, int],
    dtype: torch.dtype,
    speed: StageSpeedups,
) -> Placed:
    """Load one component, by its plan; DoesNotFit, ModelMissing."""
    cls = component_class(source, name)
    arguments: dict[str, Any] = {"dtype": dtype} | speed.loading_arguments(cls)
    ranks = speed.together(devices.primary)
    if ranks:
        cls = ranks.model_class(cls)

    def from_host() -> torch.nn.Module:
        module = load_module(source, name, cls, arguments)
        adapt(source, name, module)
        speed.after_loading(module)
        return module

    size = weight_bytes(source, name, dtype) if needs_size(devices, ranks is not None) else 0
    match plan_component(f"{name} of {source.model!r}", size, stage, devices, room, ranks is not None):
        case AmongRanks(budget, leased):
            module = from_host()
            if ranks:
                ranks.after_loading(module)
            residency = Residency(name, module, devices.primary, copy_stream=devices.copy_stream)
            if not leased:
                residency.swap_in(min(residency.total_bytes, residency.total_bytes if budget is None else budget))
            return Placed(module, [(name, f"{devices.primary} ({speed.parallel})")], residency)
        case InLeases(whole):
            module = from_host()
            residency = Residency(name, module, devices.primary, whole=whole, copy_stream=devices.copy_stream)
            return Placed(module, [(name, str(devices.primary))], residency)
        case WholeOn(gpu):
            if gpu is None:
                return Placed(from_host().to(devices.primary), [(name, str(devices.primary))])
            module = dispatch_model(from_host().to(f"cuda:{gpu}"), {"": gpu}, main_device=gpu, force_hooks=True)
            return Placed(module, [(name, f"cuda:{gpu}")], taken={gpu: size})
        case Spread(max_memory):
            module, spread = spread_layers(
                source, name, devices, max_memory, lambda more: load_module(source, name, cls, arguments | more)
            )
            speed.after_loading(module)
            return Placed(module, spread)
        case Resident(gpu, budget):
            residency = Residency(name, from_host(), devices.primary, copy_stream=devices.copy_stream)
            residency.swap_in(budget)
            log.info("%s is %s on %s with %s", name, residency.state, devices.primary,
                     format_bytes(residency.device_bytes))  # fmt: skip
            where = str(devices.primary) + (" (streamed)" if residency.state == "streamed" else "")
            return Placed(residency.module, [(name, where)], residency, {gpu: residency.device_bytes})


def weight_bytes(source: Source, name: str, dtype: torch.dtype) -> int:
    """Bytes of a component's weights once loaded as `dtype`, from the headers of its files; ModelMissing."""
    if is_quantized(source, name):
        return stored_bytes(source, name)
    if name in source.single:  # which may hold others, too
        parts: Any = on_meta(source, name)
        return sum(parameter.numel() * dtype.itemsize for parameter in parts.parameters())
    return sum(math.prod(tensor.shape) * dtype.itemsize for tensor in stored_tensors(source, name).values())


def is_quantized(source: Source, name: str) -> bool:
    """Return whether a component's weights were saved quantized, and stay so."""
    return bool(quantization_method(source, name)) or is_gguf(source, name)


def is_gguf(source: Source, name: str) -> bool:
    return name in source.single and source.single[name].suffix.lower() == GGUF


def stored_bytes(source: Source, name: str) -> int:
    """Bytes of a component's weights in its files; ModelMissing."""
    if is_gguf(source, name):
        return source.single[name].stat().st_size
    return sum(tensor.end - tensor.start for tensor in stored_tensors(source, name).values())


def stored_tensors(source: Source, name: str) -> Mapping[str, StoredTensor]:
    try:
        return headers_of(files_of(source, name))
    except Damaged as error:
        raise missing(source.model, name, error) from error


def files_as_they_are(source: Source, names: Iterable[str], dtype: torch.dtype) -> list[Path]:
    """Safetensors files of components that need no cast to `dtype`."""
    kind = next(kind for kind, known in DTYPES.items() if known == dtype)
    found: list[Path] = []
    for name in names:
        with contextlib.suppress(Damaged):  # loading will tell
            if len(source.single) > 1 and name in source.single:
                continue  # other stages' weights lie in the same file
            for path in files_of(source, name).paths:
                if all(tensor.dtype == kind for tensor in header_of(path).values()):
                    found.append(path)
    return found


def files_of(source: Source, name: str) -> WeightFiles:
    """The safetensors files that loading a component reads; Damaged."""
    if name in source.single:
        return WeightFiles((source.single[name],))
    return weight_files(source.folder_of(name), source.index[name][0])
