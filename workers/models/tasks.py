"""Pipelines over the same weights for what is to be made: of a prompt, of a picture, or of a picture and a mask."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from diffusers.pipelines.auto_pipeline import (
    AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    AUTO_INPAINT_PIPELINES_MAPPING,
    _get_task_class,
)

from protocol.job import Recipe

IMAGES_PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt")
FRAMES = ("num_frames", "video_length", "frames")  # names of the number of a video's frames
RATE = ("frame_rate", "fps")  # names of frames a second, of pipelines that heed them
# Of videos diffusers has no such table; these two say that both take the same weights.
IMAGE_TO_VIDEO = {"LTXPipeline": "LTXImageToVideoPipeline", "LTX2Pipeline": "LTX2ImageToVideoPipeline"}


def image_class(cls: type[DiffusionPipeline]) -> type[DiffusionPipeline] | None:
    """Return the pipeline that makes something of a picture with the weights of `cls`; None where there is none."""
    if "image" in parameters_of(cls) and control_argument(cls) != "image":
        return cls
    if name := IMAGE_TO_VIDEO.get(cls.__name__):
        found: type[DiffusionPipeline] = getattr(diffusers, name)
        return found
    return _of_task(AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, cls)


def inpaint_class(cls: type[DiffusionPipeline]) -> type[DiffusionPipeline] | None:
    """Return the pipeline that paints what a mask covers, with the weights of `cls`; None where there is none."""
    return cls if "mask_image" in parameters_of(cls) else _of_task(AUTO_INPAINT_PIPELINES_MAPPING, cls)


def control_argument(cls: type[DiffusionPipeline]) -> str | None:
    """Return the name of a call's argument for the picture that a ControlNet, or an adapter, keeps to."""
    parameters = parameters_of(cls)
    if "control_image" in parameters:
        return "control_image"
    controlled = {"controlnet", "adapter"} & set(inspect.signature(cls.__init__).parameters)
    return "image" if controlled and "image" in parameters and "strength" not in parameters else None


def class_for(cls: type[DiffusionPipeline], recipe: Recipe) -> type[DiffusionPipeline]:
    """Return the pipeline for a job, by the pictures that it brings."""
    if recipe.mask is not None:
        return inpaint_class(cls) or cls
    return (image_class(cls) or cls) if recipe.images else cls


def first_of(names: Sequence[str], cls: type[DiffusionPipeline]) -> str | None:
    """Return the first of some names that a pipeline's call has a parameter of."""
    return next((name for name in names if name in parameters_of(cls)), None)


def needs_of(cls: type[DiffusionPipeline]) -> list[str]:
    """Return the names of what a pipeline's call can't do without, the prompt left out."""
    return [
        name
        for name, parameter in parameters_of(cls).items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and name not in ("self", "prompt")
    ]


def parameters_of(cls: type[DiffusionPipeline]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a pipeline class's call."""
    return _parameters(cls.__call__)


@functools.cache
def _parameters(call: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(call).parameters


def _of_task(mapping: Any, cls: type[DiffusionPipeline]) -> type[DiffusionPipeline] | None:
    found: type[DiffusionPipeline] | None = _get_task_class(mapping, cls.__name__, throw_error_if_not_exist=False)
    return found
