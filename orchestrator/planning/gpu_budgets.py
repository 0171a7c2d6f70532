"""The bytes of each GPU that can be leased: its budget, without what workers keep for themselves."""

from collections.abc import Sequence

from orchestrator.gpu_driver import GpuInfo
from orchestrator.memory.margins import FIRST_HEADROOM
from orchestrator.planning.hardware import Hardware
from orchestrator.planning.placement import Post, stand_ins
from orchestrator.planning.prediction import context_bytes
from orchestrator.settings import AccountSettings, StackConfig
from protocol.errors import BadRequest, DoesNotFit
from protocol.units import format_bytes


def check_budgets(config: StackConfig, gpus: Sequence[GpuInfo]) -> None:
    """Raise BadRequest or DoesNotFit where a budget makes no sense."""
    by_index = {gpu.index: gpu for gpu in gpus}
    playing = stand_ins(config)
    if unknown := [index for index in config.gpus if index not in by_index and index not in playing]:
        raise BadRequest(f"There is no GPU {unknown[0]} to have a budget.", f"GPUs here: {sorted(by_index) or 'none'}.")
    for index in playing:
        if not config.gpus.get(index):
            raise BadRequest(
                f"The CPU is to stand in for GPU {index}, which has no budget.", f"Give one: --budget {index}=4MB."
            )
    for index, gpu in by_index.items():
        budget = config.gpus.get(index)
        if budget and budget > gpu.free_bytes and index not in playing:
            raise DoesNotFit(
                f"GPU {index} is to give {format_bytes(budget)}; {format_bytes(gpu.free_bytes)} of it are free.",
                "Give it a smaller --budget, or end what else uses it.",
            )


def accounts(posts: Sequence[Post], hardware: Hardware, gpus: Sequence[GpuInfo]) -> dict[int, AccountSettings]:
    """Return the accounts by GPU, where workers work in leases; DoesNotFit where others leave nothing of one."""
    foreign = {gpu.index: gpu.total_bytes - gpu.free_bytes for gpu in gpus}
    found: dict[int, AccountSettings] = {}
    for card in hardware.cards:
        here = [post for post in posts if card.index in post.gpus]
        keeping = [post for post in here if post.kept]
        grows = FIRST_HEADROOM if card.rate.context else 0
        kept = sum(post.kept[post.gpus.index(card.index)] + context_bytes(post, card) + grows for post in keeping)
        leased = any(post.leased for post in here)
        if kept > card.budget or (leased and kept == card.budget):
            given = f"What stages keep of GPU {card.index} for themselves, {format_bytes(kept)} with their contexts,"
            raise DoesNotFit(f"{given} leaves nothing of {format_bytes(card.budget)}.", "Give them less --max-memory.")
        if not leased:
            continue
        found[card.index] = AccountSettings(
            budget=card.budget - kept, kept=kept, foreign=0 if card.stands_in else foreign[card.index],
            driver=not card.stands_in, name=card.name,
        )  # fmt: skip
    return found
