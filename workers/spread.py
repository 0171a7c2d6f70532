"""A component's layers over several GPUs, by accelerate: where a cut says, or as their memory allows."""

import logging
from collections.abc import Sequence
from typing import Any

import torch

from protocol.errors import BadRequest, DoesNotFit
from workers.devices import Devices, parts_of
from workers.residency import block_rows
from workers.skeleton import component_class, on_meta
from workers.source import Source

log = logging.getLogger(__name__)


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
