"""A component's layers over several GPUs, by accelerate, as their memory allows."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from protocol.errors import DoesNotFit
from workers.models.devices import Devices
from workers.models.source import Source

log = logging.getLogger(__name__)


def spread_layers(
    source: Source,
    name: str,
    devices: Devices,
    place: Mapping[int, int],
    load: Callable[[dict[str, Any]], torch.nn.Module],
) -> tuple[torch.nn.Module, list[tuple[str, str]]]:
    """The module, loaded with such arguments more, and where each of its parts is; DoesNotFit."""
    log.info("%s is spread under %s", name, place)
    try:
        module: Any = load({"max_memory": dict(place), "device_map": "auto" if devices.evenly else "sequential"})
    except ValueError as error:  # whole layers leave gaps; accelerate would put the rest on disk
        if "offload" not in str(error):
            raise
        raise DoesNotFit(
            f"The layers of {name} of {source.model!r} leave gaps, and don't fit {place} bytes on these GPUs.",
            "Give a little more with --max-memory.",
        ) from error
    spread = [(f"{name}.{part}".rstrip("."), _device_name(where)) for part, where in module.hf_device_map.items()]
    return module, spread


def _device_name(where: int | str | torch.device) -> str:
    return f"cuda:{where}" if isinstance(where, int) else str(where)
