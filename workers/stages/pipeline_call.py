"""A pipeline's own call, with a job's arguments, as far as a stage can make it."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from protocol.job import Recipe
from protocol.pictures import (
    CONTROL,
    IMAGE,
    IP_IMAGE,
    MASK,
    PART_BYTES,
    PICTURES,
    SOUND,
    SOUND_RATE,
    VIDEO,
    is_given_picture,
)
from protocol.stages import Stage
from protocol.tensors import Tensor
from workers.errors import Cancelled, StageError, let_go
from workers.models.call_settings import tuples_of
from workers.models.description import call_parameters, guidance_arguments
from workers.models.tasks import FRAMES, IMAGES, IMAGES_PER_PROMPT, MASKS, RATE, control_argument, first_of
from workers.replay.boundaries import Run, Stopped, running
from workers.replay.call_record import CallRecord
from workers.tensors import to_wire

log = logging.getLogger(__name__)

RATES = ("output_sampling_rate", "sampling_rate", "sample_rate")  # names of samples a second


def arguments_of(pipeline: DiffusionPipeline, recipe: Recipe, tensors: Sequence[Tensor] = ()) -> dict[str, Any]:
    """Return what a recipe gives of the arguments of a pipeline's call, with the pictures among a task's tensors.

    What it leaves open is the pipeline's own.
    """
    parameters = call_parameters(pipeline)
    cfg_scale, guidance = guidance_arguments(pipeline)
    tuples = tuples_of(type(pipeline))
    known: dict[Any, Any] = {
        "prompt": recipe.prompt if "prompt" in parameters else None,
        "negative_prompt": recipe.negative_prompt,
        "height": recipe.height if recipe.sized else None,
        "width": recipe.width if recipe.sized else None,
        "num_inference_steps": recipe.steps,
        "max_sequence_length": recipe.max_sequence_length,
        cfg_scale: recipe.cfg_scale,
        guidance: recipe.guidance,
        "strength": recipe.strength,
        first_of(FRAMES, type(pipeline)): recipe.frames,
        first_of(RATE, type(pipeline)): recipe.fps,
        **{n: list(v) if isinstance(v, tuple) and n not in tuples else v for n, v in recipe.settings},
        **given_pictures(tensors, type(pipeline)),
    }
    if recipe.num_images != 1:
        known[first_of(IMAGES_PER_PROMPT, type(pipeline))] = recipe.num_images
    if parameters.get("output_type") and parameters["output_type"].default in ("np", "pt", "tensor", "latent"):
        known["output_type"] = "pil"  # of the same bits, rounded to the levels of a file
    return {name: value for name, value in known.items() if name is not None and value is not None}


def given_pictures(tensors: Sequence[Tensor], cls: type[DiffusionPipeline]) -> dict[str, Any]:
    """Return the pictures that a job begins from, as the arguments of a pipeline's call."""
    mine = {tensor.name: tensor for tensor in tensors if is_given_picture(tensor)}
    images = [image_of(mine[f"{IMAGE}:{i}"]) for i in range(sum(name.startswith(f"{IMAGE}:") for name in mine))]
    control, name = control_argument(cls), first_of(IMAGES, cls) or IMAGES[0]
    found: dict[str, Any] = {name: images if len(images) > 1 or name == "images" else images[0]} if images else {}
    if MASK in mine:
        found[first_of(MASKS, cls) or MASKS[0]] = image_of(mine[MASK])
    if CONTROL in mine and control:
        found[control] = image_of(mine[CONTROL])
    if IP_IMAGE in mine:
        found["ip_adapter_image"] = image_of(mine[IP_IMAGE])
    videos = {
        name.removeprefix(f"{VIDEO}:"): frames_of(tensor) for name, tensor in mine.items() if len(tensor.shape) == 4
    }
    return found | videos


def frames_of(tensor: Tensor) -> list[Image.Image]:
    """Return Pillow images of a video's frames, uint8 (frames, height, width, 3)."""
    frames, height, width, _ = tensor.shape
    data, size = memoryview(tensor.data).cast("B"), height * width * 3
    return [Image.frombytes("RGB", (width, height), bytes(data[i * size : (i + 1) * size])) for i in range(frames)]


def image_of(tensor: Tensor) -> Image.Image:
    """Return a Pillow image of a tensor, uint8 (height, width, 1 or 3)."""
    height, width, channels = tensor.shape
    return Image.frombytes("RGB" if channels == 3 else "L", (width, height), bytes(tensor.data))


def until_stop(pipeline: DiffusionPipeline, run: Run, arguments: dict[str, Any]) -> Any:
    """Run a pipeline's call; return where it stopped (`Stopped`), or its output where it came to its end.

    None where it can't go on without what is yet to be decoded.
    """
    with running(pipeline, run):
        try:
            return pipeline(**arguments, generator=run.generator)
        except Stopped as stopped:
            let_go(stopped)
            return stopped
        except Exception as error:
            if not run.pending or not of_no_value(error):
                raise
            log.debug("after its decode: %s", error)
            return None


def of_no_value(error: Exception) -> bool:
    """Return whether an error may come of a tensor on the meta device, or of None, in the place of a decoded one."""
    if isinstance(error, Cancelled | StageError | torch.OutOfMemoryError):
        return False
    kinds = (NotImplementedError, TypeError, AttributeError, ValueError, LookupError, AssertionError)
    return isinstance(error, kinds) or "meta" in str(error)


def new_run(stage: Stage, record: CallRecord, device: torch.device, recipe: Recipe, **settings: Any) -> Run:
    """Make a run of a job in a stage, with random numbers from the job's seed on."""
    return Run(stage, record, device, generator=torch.Generator("cpu").manual_seed(recipe.seed), **settings)


def pictures_of(output: Any, pipeline: DiffusionPipeline) -> list[Tensor]:
    """Return a pipeline's pictures, or the frames of its videos one after the other, in parts of PART_BYTES or less.

    Each part is `pictures`, uint8 (n, height, width, 3), RGB; after the first one come a video's `sound`, float32
    (videos, channels, samples), and its `sound_rate`, int32 (1,), if it has any. StageError where it made something
    else. `pipeline` is the one that made it.
    """
    images = getattr(output, "images", getattr(output, "image", None))
    if images is None:
        images = [frame for video in getattr(output, "frames", None) or () for frame in video]
    if isinstance(images, np.ndarray) and images.ndim == 4:
        images = [Image.fromarray(level) for level in (images * 255).round().astype("uint8")]  # as diffusers does it
    if not isinstance(images, list) or not images or not all(isinstance(image, Image.Image) for image in images):
        raise StageError(f"the pipeline made no pictures, but {type(output).__name__}")
    each = max(1, PART_BYTES // (images[0].width * images[0].height * 3))
    parts = (images[start : start + each] for start in range(0, len(images), each))
    first, *others = [
        to_wire(PICTURES, torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in part])))
        for part in parts
    ]
    return [first, *sound_of(output, pipeline), *others]


def sound_of(output: Any, pipeline: DiffusionPipeline) -> list[Tensor]:
    sound = getattr(output, "audio", None)
    settings = [getattr(getattr(pipeline, name, None), "config", {}) for name in ("vocoder", "audio_vae")]
    told = [getattr(output, "sampling_rate", None), *(config.get(name) for config in settings for name in RATES)]
    rate = next((one for one in told if one), None)
    if sound is None or rate is None:
        return []
    samples = sound.detach().to("cpu", torch.float32).contiguous()
    return [to_wire(SOUND, samples), to_wire(SOUND_RATE, torch.tensor([rate], dtype=torch.int32))]
