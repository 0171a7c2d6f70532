"""A component's layers over several GPUs, by accelerate, as their memory allows."""

import logging
from typing import Any

import torch

from protocol.errors import DoesNotFit
from workers.devices import Devices
from workers.skeleton import component_class
from workers.source import Source

log = logging.getLogger(__name__)


def spread_layers(
    source: Source, name: str, devices: Devices, place: dict[int, int], arguments: dict[str, Any]
) -> tuple[torch.nn.Module, list[tuple[str, str]]]:
    """The module, and where each of its parts is; DoesNotFit."""
    log.info("%s is spread under %s", name, place)
    arguments["device_map"] = "auto" if devices.evenly else "sequential"
    cls = component_class(source, name)
    try:
        module = cls.from_pretrained(source.folder, max_memory=place, **arguments).eval()
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
