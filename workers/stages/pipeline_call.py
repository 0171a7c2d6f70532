"""A pipeline's own call, with a job's arguments, as far as a stage can make it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from protocol.job import Recipe
from protocol.pictures import IMAGE, MASK
from protocol.stages import Stage
from protocol.tensors import Tensor
from workers.errors import StageError
from workers.models.description import call_parameters, guidance_arguments
from workers.replay.boundaries import Run, Stopped, running
from workers.replay.call_record import CallRecord

IMAGES_PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt")


def arguments_of(pipeline: DiffusionPipeline, recipe: Recipe, tensors: Sequence[Tensor] = ()) -> dict[str, Any]:
    """Return what a recipe gives of the arguments of a pipeline's call, with the pictures among a task's tensors.

    What it leaves open is the pipeline's own.
    """
    parameters = call_parameters(pipeline)
    cfg_scale, guidance = guidance_arguments(pipeline)
    known: dict[Any, Any] = {
        "prompt": recipe.prompt,
        "negative_prompt": recipe.negative_prompt,
        "height": recipe.height if recipe.sized else None,
        "width": recipe.width if recipe.sized else None,
        "num_inference_steps": recipe.steps,
        "max_sequence_length": recipe.max_sequence_length,
        cfg_scale: recipe.cfg_scale,
        guidance: recipe.guidance,
        "strength": recipe.strength,
        **given_pictures(tensors),
    }
    if recipe.num_images != 1:
        known[next(name for name in IMAGES_PER_PROMPT if name in parameters)] = recipe.num_images
    return {name: value for name, value in known.items() if name is not None and value is not None}


def given_pictures(tensors: Sequence[Tensor]) -> dict[str, Any]:
    """Return the pictures that a job begins from, as the arguments that pipelines take them by."""
    mine = {tensor.name: tensor for tensor in tensors if tensor.name.startswith((f"{IMAGE}:", MASK))}
    images = [image_of(mine[f"{IMAGE}:{i}"]) for i in range(len(mine.keys() - {MASK}))]
    found: dict[str, Any] = {"image": images if len(images) > 1 else images[0]} if images else {}
    return found | ({"mask_image": image_of(mine[MASK])} if MASK in mine else {})


def image_of(tensor: Tensor) -> Image.Image:
    """Return a Pillow image of a tensor, uint8 (height, width, 1 or 3)."""
    height, width, channels = tensor.shape
    return Image.frombytes("RGB" if channels == 3 else "L", (width, height), bytes(tensor.data))


def until_stop(pipeline: DiffusionPipeline, run: Run, arguments: dict[str, Any]) -> Any:
    """Run a pipeline's call; return where it stopped (`Stopped`), or its output where it came to its end."""
    with running(pipeline, run):
        try:
            return pipeline(**arguments, generator=run.generator)
        except Stopped as stopped:
            return stopped


def new_run(stage: Stage, record: CallRecord, device: torch.device, recipe: Recipe, **settings: Any) -> Run:
    """Make a run of a job in a stage, with random numbers from the job's seed on."""
    return Run(stage, record, device, generator=torch.Generator("cpu").manual_seed(recipe.seed), **settings)


def pictures_of(output: Any) -> torch.Tensor:
    """Return a pipeline's pictures as uint8 (n, height, width, 3), RGB; StageError where it made something else."""
    images = getattr(output, "images", None)
    if not isinstance(images, list) or not images:
        raise StageError(f"the pipeline made no pictures, but {type(output).__name__}")
    return torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
