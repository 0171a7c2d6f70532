"""All that a configuration starts on this machine: every worker's place, what can be leased, and the plan."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.gpu_driver import GpuInfo
from orchestrator.planning.calibration import Measurements
from orchestrator.planning.gpu_budgets import accounts, check_budgets
from orchestrator.planning.hardware import free_memory, this_hardware
from orchestrator.planning.host_memory import RESERVE, locked_by_stage, locked_bytes
from orchestrator.planning.model_profile import NoProfile, find_profile
from orchestrator.planning.placement import SEVERAL, Kind, Post, another, candidates, speedups_of, stand_ins
from orchestrator.planning.planner import Plan, check, choose
from orchestrator.settings import AccountSettings, StackConfig
from protocol.errors import BadRequest
from protocol.model import ModelDescription
from protocol.model_spec import WITH, Choice
from protocol.speedups import canonical
from protocol.stages import STAGES, Stage

DRIVERS = ("/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/dxg", "/dev/kfd")  # of GPUs that NVML may not tell


@dataclass(frozen=True, slots=True)
class StackPlan:
    """The plan of one model of a stack, as if it were alone.

    `plan` is None where no GPU is used, or where `unplanned` says why there is none.
    """

    dtype: str  # of all stages
    posts: tuple[Post, ...]
    accounts: dict[int, AccountSettings]  # what is lent of which GPU
    speedups: tuple[str, ...]  # all that may change a picture's bits
    plan: Plan | None = None
    unplanned: str = ""
    description: ModelDescription | None = None  # of the model, where it was found
    spare: tuple[Post, ...] = ()  # places of stages that have no worker now, should they get one
    weights: int = 0  # bytes, where they are known

    def fixed(self) -> dict[Stage, int]:
        """Stages whose memory is planned in advance, and how many workers each may have."""
        planned = [post.stage for post in self.posts if post.memory]
        return {stage: planned.count(stage) for stage in set(planned)}

    def post(self, stage: Stage, index: int) -> Post:
        """The place of a stage's next worker, of which there are `index`."""
        return another((*self.posts, *self.spare), stage, index)


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A model of a stack: its name, its own configuration, and where its workers go."""

    name: str
    config: StackConfig
    plan: StackPlan

    @property
    def chosen(self) -> Choice | None:
        """The kind of what jobs choose to be added to another model, which makes it one of its own; else None."""
        if WITH not in self.name:
            return None
        return "controlnet" if self.config.controlnet else "refiner"


def plan_models(config: StackConfig, gpus: Sequence[GpuInfo], measurements: Measurements) -> tuple[PlannedModel, ...]:
    """Plan each model of a stack, the default one first; what plan_stack raises.

    Each is planned as if it had the GPUs for itself, since those that are asked for take turns. Memory of the host is
    shared out by their weights where not all fit.
    """
    return plan_each(config.each(), gpus, measurements)


def plan_each(
    configs: Mapping[str, StackConfig], gpus: Sequence[GpuInfo], measurements: Measurements, cores: int | None = None
) -> tuple[PlannedModel, ...]:
    """Plan models by their own configurations, as `plan_models` does; of another host, where `cores` are given."""
    found = {name: plan_stack(alone, gpus, measurements, cores) for name, alone in configs.items()}
    config = next(iter(configs.values()))
    room = max(1, (config.host_memory or free_memory()) - RESERVE)
    weights = sum(plan.weights for plan in found.values())
    if len(found) > 1 and weights > room:
        for name, alone in configs.items():
            share = RESERVE + room * found[name].weights // weights
            found[name] = plan_stack(alone.model_copy(update={"host_memory": share}), gpus, measurements, cores)
    if len(found) > 1:
        posts = [post for plan in found.values() for post in (*plan.posts, *plan.spare)]
        playing = sorted({gpu for alone in configs.values() for gpu in stand_ins(alone)})
        hardware = this_hardware(gpus, config.gpus, playing, config.host_memory)
        shared = accounts(posts, hardware, gpus)
        found = {name: replace(plan, accounts=shared) for name, plan in found.items()}
    return tuple(PlannedModel(name, alone, found[name]) for name, alone in configs.items())


def plan_stack(
    config: StackConfig, gpus: Sequence[GpuInfo], measurements: Measurements, cores: int | None = None
) -> StackPlan:
    """Place a model's workers by the best plan; BadRequest, ModelMissing or DoesNotFit where none can work.

    `cores` are those of another host, whose GPUs `gpus` are; None: it is for this one.
    """
    dtype = stack_dtype(config, bool(gpus))
    check_devices(config, gpus, here=cores is None)
    check_budgets(config, gpus)
    hardware = this_hardware(gpus, config.gpus, stand_ins(config), config.host_memory, cores)
    check(config, hardware)
    plan, unplanned, description, limited, weights = None, "", None, False, 0
    posts = first(config, gpus)
    if any(post.gpus for post in posts):
        try:
            profile = find_profile(config, dtype)
        except NoProfile as error:
            unplanned = error.message
        else:
            description, weights = profile.model, sum(stage.weights for stage in profile.stages)
            known = measurements.of(hardware, profile, config.speedups())
            plan = choose(config, profile, known, measurements.terms(config, profile))
            locked = locked_by_stage(profile, plan.prediction.work, hardware.ram)
            limited = locked is not None
            work = plan.prediction.work
            posts = tuple(replace(post, locked=locked_bytes(locked, post.stage, work)) for post in plan.posts)
    spare = tuple(post for post in first(peopled(config), gpus) if config.stage(post.stage).workers == 0)
    spare = tuple(replace(post, locked=0 if limited else None) for post in spare)
    speedups = canonical((*config.speedups(), *speedups_of(posts)))
    return StackPlan(
        dtype, posts, accounts((*posts, *spare), hardware, gpus), speedups, plan, unplanned, description, spare,
        weights,
    )  # fmt: skip


def check_devices(config: StackConfig, gpus: Sequence[GpuInfo], here: bool = True) -> None:
    """Raise BadRequest where a stage is to use a kind of device that isn't there; of other hosts the GPUs tell all."""
    for stage in STAGES:
        device = config.stage(stage).device.partition(":")[0]
        if device == "cuda" and not gpus and not (here and any(map(os.path.exists, DRIVERS))):
            raise BadRequest(f"{stage} is to use CUDA; no driver of a GPU is here.", "Use --device cpu, or auto.")
        if device == "mps" and sys.platform != "darwin":
            raise BadRequest(f"{stage} is to use mps, which only macOS has.", "Use --device auto, cpu or cuda.")


def first(config: StackConfig, gpus: Sequence[GpuInfo]) -> tuple[Post, ...]:
    """The placement to go without a plan: a denoiser in leases of each GPU."""
    several: list[Kind] = [kind for kind in SEVERAL if kind == config.placement]
    return next(candidates(config, [gpu.index for gpu in gpus], several, {}))


def peopled(config: StackConfig) -> StackConfig:
    """Return the configuration with a worker for stages that have none."""
    stages = {s: v.model_copy(update={"workers": v.workers or None}) for s, v in config.stages.items()}
    return config.model_copy(update={"stages": stages})


def stack_dtype(config: StackConfig, gpus: bool) -> str:
    """Choose one dtype for all stages, since what passes between them carries it: bfloat16 if any computes on a GPU."""
    if config.dtype != "auto":
        return config.dtype
    devices = [config.stage(stage).device for stage in STAGES]
    on_gpu = any(d.startswith("cuda") or (d == "auto" and gpus) for d in devices)
    on_mps = any(d == "mps" or (d == "auto" and sys.platform == "darwin") for d in devices)
    return "bfloat16" if on_gpu or on_mps else "float32"
