"""Pictures that jobs begin from, and what the plain pipelines make of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting
from PIL import Image

from protocol.client.input_pictures import picture_of
from protocol.tensors import Tensor


def noise(size: tuple[int, int] = (32, 32), seed: int = 0) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def half(size: tuple[int, int] = (32, 32)) -> Image.Image:
    """A mask of the right half."""
    mask = Image.new("L", size, 0)
    mask.paste(255, (size[0] // 2, 0, *size))
    return mask


def as_task(image: Image.Image, mask: Image.Image | None = None) -> list[Tensor]:
    """Return pictures as they lie beside a task."""
    found = [replace(picture_of(image), name="image:0")]
    return found if mask is None else [*found, replace(picture_of(mask, mask=True), name="mask")]


def plain_of_picture(
    folder: Path,
    image: Image.Image,
    mask: Image.Image | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **arguments: Any,
) -> torch.Tensor:
    """Pictures of the plain pipeline for a picture, with a mask or without, uint8 (n, height, width, 3)."""
    auto = AutoPipelineForImage2Image if mask is None else AutoPipelineForInpainting
    pipeline = auto.from_pretrained(folder, dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(arguments.pop("seed"))
    given = {"image": image} if mask is None else {"image": image, "mask_image": mask}
    images = pipeline(**given, **arguments, generator=generator).images
    return torch.from_numpy(np.stack([np.asarray(made) for made in images]))
