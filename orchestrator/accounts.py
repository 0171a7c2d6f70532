"""Which stages work in leases of which GPU, and what is there to be leased."""

from collections.abc import Sequence

from orchestrator.config import AccountSettings, StackConfig
from orchestrator.gpus import Gpu
from protocol.errors import BadRequest, DoesNotFit
from protocol.jobs import STAGES, Stage
from protocol.units import format_bytes

STANDS_IN = "cpu:"  # a device such as cpu:0 is a CPU that stands in for a GPU


def leased_gpu(config: StackConfig, stage: Stage, gpus: Sequence[Gpu]) -> int | None:
    """The GPU of which a stage's workers get leases: where they use just one, and have no memory of their own."""
    settings = config.stage(stage)
    device = settings.device
    if device.startswith(STANDS_IN) and device.removeprefix(STANDS_IN).isdigit():
        return int(device.removeprefix(STANDS_IN))
    if settings.max_memory or not gpus or not (device == "auto" or device.startswith("cuda")):
        return None
    if settings.gpus is not None:
        return settings.gpus[0] if len(settings.gpus) == 1 else None
    if device.startswith("cuda:"):
        number = device.removeprefix("cuda:")
        return int(number) if number.isdigit() else None
    return gpus[0].index if len(gpus) == 1 else None


def accounts(config: StackConfig, gpus: Sequence[Gpu]) -> dict[int, AccountSettings]:
    """What can be leased of each GPU; BadRequest or DoesNotFit where that makes no sense."""
    by_index = {gpu.index: gpu for gpu in gpus}
    if unknown := [index for index in config.gpus if index not in by_index and not _stands_in(config, index)]:
        raise BadRequest(f"There is no GPU {unknown[0]} to have a budget.", f"GPUs here: {sorted(by_index) or 'none'}.")
    found: dict[int, AccountSettings] = {}
    for stage in STAGES:
        index = leased_gpu(config, stage, gpus)
        if index is None or index in found or not config.stage(stage).workers:
            continue
        if _stands_in(config, index):
            if not (budget := config.gpus.get(index)):
                raise BadRequest(
                    f"The CPU is to stand in for GPU {index}, which has no budget.", f"Give one: --budget {index}=4MB."
                )
            found[index] = AccountSettings(budget=budget, driver=False)
        elif index not in by_index:
            raise BadRequest(f"{stage} is to use GPU {index}.", f"GPUs here: {sorted(by_index) or 'none'}.")
        else:
            found[index] = _account(config, by_index[index])
    return found


def _stands_in(config: StackConfig, index: int) -> bool:
    return any(config.stage(stage).device == f"{STANDS_IN}{index}" for stage in STAGES)


def _account(config: StackConfig, gpu: Gpu) -> AccountSettings:
    free = gpu.free_bytes
    budget = config.gpus.get(gpu.index) or free
    if budget > free:
        raise DoesNotFit(
            f"GPU {gpu.index} is to give {format_bytes(budget)}; {format_bytes(free)} of it are free.",
            "Give it a smaller --budget, or end what else uses it.",
        )
    for stage in STAGES:
        budget -= _reserved(config, stage, gpu)
    if budget <= 0:
        raise DoesNotFit(f"Stages with --max-memory leave nothing of GPU {gpu.index}.", "Give them less.")
    return AccountSettings(budget=budget, foreign=gpu.total_bytes - free)


def _reserved(config: StackConfig, stage: Stage, gpu: Gpu) -> int:
    """Bytes of a GPU that a stage keeps for itself."""
    settings = config.stage(stage)
    if settings.gpus is None or gpu.index not in settings.gpus or not settings.workers:
        return 0
    if not settings.max_memory:
        if len(settings.gpus) == 1 or settings.device.startswith("cpu"):
            return 0
        raise BadRequest(
            f"{stage} is spread over GPUs {', '.join(map(str, settings.gpus))}, and others take turns on one of them.",
            f"Say how much of each {stage} may use: --max-memory {stage}=12GB,8GB.",
        )
    at = settings.gpus.index(gpu.index)
    return settings.max_memory[at if len(settings.max_memory) > 1 else 0] * settings.workers
