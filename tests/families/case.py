"""A case of the table of families, and pipelines made from the components of others."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from tests import tiny

Make = Callable[[], DiffusionPipeline]


@dataclass(frozen=True, slots=True)
class Case:
    """`brings`: "i" an image, "m" a mask, "c" a control image, "v" each of `videos`."""

    make: Make
    brings: str = ""
    frames: int | None = None
    size: int = tiny.SIZE  # pixels of each side
    settings: dict[str, Any] = field(default_factory=dict)  # arguments without options of their own
    steps: int = 4
    prompt: str = "a red circle"
    negative: str | None = None  # prompt
    videos: tuple[str, ...] = ("video",)  # arguments, where it brings videos
    length: int = 9  # frames of those
    tiled: bool = False  # its VAE can work in tiles alone


def of(name: str, base: Make, **changes: Any) -> Make:
    """A pipeline class over the components of another pipeline, but for some of them; made when it is called."""

    def make() -> DiffusionPipeline:
        torch.manual_seed(0)
        cls = getattr(diffusers, name)
        modules, optional = cls._get_signature_keys(cls)
        parts = dict(base().components)
        made = {
            part: value() if callable(value) and not isinstance(value, torch.nn.Module) else value
            for part, value in changes.items()
        }
        settings = {"requires_safety_checker": False} if "requires_safety_checker" in optional else {}
        pipeline: DiffusionPipeline = cls(
            **{part: parts.get(part) for part in set(modules) - {"self"}} | made | settings
        )
        return pipeline

    return make


def awake(model: Any) -> Any:
    """Give values to weights that are all zero, as those of new models are by which they add to others."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def plain(model: Any) -> dict[str, Any]:
    """A model's configuration, without what diffusers notes of defaults."""
    return {name: value for name, value in model.config.items() if not name.startswith("_")}
