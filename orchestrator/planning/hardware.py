"""The machine that a plan is for: this one, as its driver tells, or one that somebody thinks of."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from orchestrator.gpu_driver import GpuInfo
from orchestrator.planning.gpu_rates import CPU_CORE, STAND_IN, GpuRate, rate_of
from protocol.errors import BadRequest
from protocol.stages import Stage
from protocol.units import parse_bytes

CONTROL_GROUP = Path("/sys/fs/cgroup")  # a container sees its own there
LEAST_CARD = 100_000_000  # bytes of a GPU that anybody would think of


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU, and how many of its bytes a stack may use, contexts included."""

    index: int
    name: str
    budget: int
    rate: GpuRate
    measured: Mapping[Stage, float] = field(default_factory=dict)  # FLOP/s, where a stack has measured it

    @property
    def stands_in(self) -> bool:
        """Return whether it is a CPU's memory."""
        return self.rate is STAND_IN

    def flops(self, stage: Stage, compiled: bool = False) -> float:
        """FLOP/s in a stage."""
        return self.measured.get(stage) or self.rate.of(stage, compiled)


@dataclass(frozen=True, slots=True)
class Hardware:
    cards: tuple[Card, ...]
    ram: int  # bytes, that a stack may use
    cores: int = 1

    def card(self, index: int) -> Card:
        return next(card for card in self.cards if card.index == index)

    @property
    def cpu_flops(self) -> float:
        return self.cores * CPU_CORE


def this_hardware(
    gpus: Sequence[GpuInfo],
    budgets: Mapping[int, int | None],
    stand_ins: Sequence[int],
    memory: int | None = None,
    cores: int | None = None,
) -> Hardware:
    """Return what the driver tells; `budgets` in bytes by GPU, none: all that is free; a CPU may stand in for some.

    `memory` are bytes of the host, None: all that is free; `cores` its number of them, None: this one's.
    """
    cards = [_card(gpu, budgets.get(gpu.index)) for gpu in gpus if gpu.index not in stand_ins]
    cards += [Card(index, "CPU that stands in for a GPU", budgets.get(index) or 0, STAND_IN) for index in stand_ins]
    return Hardware(
        tuple(sorted(cards, key=lambda card: card.index)), memory or free_memory(), cores or os.cpu_count() or 1
    )


def _card(gpu: GpuInfo, budget: int | None) -> Card:
    rate = rate_of(gpu.name)
    return Card(gpu.index, gpu.name, budget or gpu.free_bytes, replace(rate, link=gpu.link) if gpu.link else rate)


def imagined(gpus: str, budgets: Mapping[int, int | None] = MappingProxyType({})) -> tuple[Card, ...]:
    """'16GB,RTX 4090:24GB' are two GPUs, each an amount or a name and an amount; `budgets` are bytes by number."""
    cards = [_imagined_card(index, text) for index, text in enumerate(filter(None, gpus.split(",")))]
    if unknown := [index for index in budgets if index >= len(cards)]:
        raise BadRequest(f"There is no GPU {unknown[0]} to have a budget.", f"There are {len(cards)}, from 0 on.")
    return tuple(replace(card, budget=min(card.budget, budgets.get(card.index) or card.budget)) for card in cards)


def with_link(hardware: Hardware, link: str) -> Hardware:
    """Return the hardware with a link such as '25GB/s' to each GPU; BadRequest."""
    amount = link[:-2].strip()
    well = link.endswith("/s") and re.fullmatch(r"\d+(\.\d+)?\s*[kKMGT]?i?B", amount)
    rate = float(parse_bytes(amount)) if well else 0.0
    if not rate:
        raise BadRequest(f"--link is {link!r}.", "Write it as 25GB/s.")
    cards = [replace(card, rate=replace(card.rate, link=rate)) for card in hardware.cards]
    return replace(hardware, cards=tuple(cards))


def _imagined_card(index: int, text: str) -> Card:
    name, _, amount = text.strip().rpartition(":")
    budget = parse_bytes(amount)
    if budget < LEAST_CARD or ":" in name:
        raise BadRequest(f"{text.strip()!r} is no GPU.", 'Write --gpus 16GB,16GB, or --gpus "RTX 4090:24GB".')
    return Card(index, name or "any GPU", budget, rate_of(name))


def all_memory() -> int:
    """Return the bytes of this host's memory, as far as this process's control group may use them."""
    import psutil

    total = int(psutil.virtual_memory().total)
    return min(total, limit_of_group(CONTROL_GROUP) or total)


def free_memory() -> int:
    """Return the bytes of this host's memory that can be had, as far as this process's control group may use them."""
    import psutil

    available = int(psutil.virtual_memory().available)
    return min(available, free_of_group(CONTROL_GROUP) or available)


def limit_of_group(folder: Path) -> int:
    """Return the bytes that a control group may use; 0 where there is none, or it may use all."""
    try:
        return int((folder / "memory.max").read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return 0


def free_of_group(folder: Path) -> int:
    """Return the bytes that a control group's limit leaves, its page cache counted as free; 0 where there is none."""
    limit = limit_of_group(folder)
    try:
        used = int((folder / "memory.current").read_text())
        cache = re.findall(r"^(?:in)?active_file (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return 0
    return max(1, limit - used + sum(map(int, cache))) if limit else 0
