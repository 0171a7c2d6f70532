"""Pipelines over the same weights for what is to be made: of a prompt, of a picture, or of a picture and a mask."""

import functools
import inspect
import re
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

IMAGES = ("image", "images")  # names of the pictures to begin from
MASKS = ("mask_image", "control_mask")
IMAGES_PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt")
FRAMES = ("num_frames", "video_length", "frames")  # names of the number of a video's frames
RATE = ("frame_rate", "fps")  # names of frames a second, of pipelines that heed them
# Of videos diffusers has no such table; these say that both take the same weights.
VIDEO_TO_VIDEO = {
    "WanPipeline": "WanVideoToVideoPipeline", "CogVideoXPipeline": "CogVideoXVideoToVideoPipeline",
    "AnimateDiffPipeline": "AnimateDiffVideoToVideoPipeline", "TextToVideoSDPipeline": "VideoToVideoSDPipeline",
    "SkyReelsV2DiffusionForcingPipeline": "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
}  # fmt: skip
IMAGE_TO_VIDEO = {"LTXPipeline": "LTXImageToVideoPipeline", "LTX2Pipeline": "LTX2ImageToVideoPipeline"}


def image_class(cls: type[DiffusionPipeline]) -> type[DiffusionPipeline] | None:
    """Return the pipeline that makes something of a picture with the weights of `cls`; None where there is none."""
    if (name := first_of(IMAGES, cls)) and control_argument(cls) != name:
        return cls
    if name := IMAGE_TO_VIDEO.get(cls.__name__):
        found: type[DiffusionPipeline] = getattr(diffusers, name)
        return found
    return _of_task(AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, cls)


def inpaint_class(cls: type[DiffusionPipeline]) -> type[DiffusionPipeline] | None:
    """Return the pipeline that paints what a mask covers, with the weights of `cls`; None where there is none."""
    return cls if first_of(MASKS, cls) else _of_task(AUTO_INPAINT_PIPELINES_MAPPING, cls)


def video_class(cls: type[DiffusionPipeline]) -> type[DiffusionPipeline] | None:
    """Return the pipeline that makes a video of a video with the weights of `cls`; None where there is none."""
    if video_arguments(cls):
        return cls
    name = VIDEO_TO_VIDEO.get(cls.__name__)
    return getattr(diffusers, name) if name else None


def video_arguments(cls: type[DiffusionPipeline]) -> tuple[str, ...]:
    """Return the names of the videos that a pipeline's call takes, the one that is only a `video` first."""
    known = parameters_of(cls)
    names = [name for name in known if name in ("video", "conditioning_frames") or name.endswith("_video")]
    return tuple(sorted(names, key=lambda name: name != "video"))


def controlnet_class(cls: type[DiffusionPipeline], controlnet: str) -> type[DiffusionPipeline] | None:
    """Return the pipeline that does what `cls` does, with a ControlNet of a class beside it; None where there is none.

    It is named as everywhere in diffusers: `Flux(Img2Img)Pipeline`, `FluxControlNet(Img2Img)Pipeline`.
    """
    kind = "ControlNetUnion" if controlnet.startswith("ControlNetUnion") else "ControlNet"
    for ending in ("Pipeline", "Img2ImgPipeline", "InpaintPipeline"):
        base = cls.__name__.removesuffix(ending)
        for written in (ending, ending.replace("Inpaint", "Inpainting")):
            found: type[DiffusionPipeline] | None = getattr(diffusers, f"{base}{kind}{written}", None)
            if base + ending == cls.__name__ and found is not None and takes(found, controlnet):
                return found
    return None


def takes(cls: type[DiffusionPipeline], controlnet: str) -> bool:
    """Return whether a pipeline takes ControlNets of a class, and pictures for them."""
    known = re.findall(r"\w+", annotation_of(cls, "controlnet"))
    return controlnet in known and control_argument(cls) is not None


def annotation_of(cls: type[DiffusionPipeline], component: str) -> str:
    """Return the annotation of a component of a pipeline; empty where it has no such one."""
    parameter = inspect.signature(cls.__init__).parameters.get(component)
    return re.sub(r"[\w.]+\.", "", str(parameter.annotation)) if parameter else ""


def control_argument(cls: type[DiffusionPipeline]) -> str | None:
    """Return the name of a call's argument for the picture that a ControlNet, or an adapter, keeps to."""
    parameters = parameters_of(cls)
    if "control_image" in parameters:
        return "control_image"
    controlled = {"controlnet", "adapter"} & _parameters(cls.__init__).keys()
    return "image" if controlled and "image" in parameters and "strength" not in parameters else None


def class_for(cls: type[DiffusionPipeline], recipe: Recipe, controlnet: str | None = None) -> type[DiffusionPipeline]:
    """Return the pipeline for a job, by the pictures that it brings, and the class of a ControlNet beside the model."""
    if recipe.mask is not None:
        found = inpaint_class(cls) or cls
    elif recipe.images:
        found = image_class(cls) or cls
    else:
        found = (video_class(cls) or cls) if recipe.videos else cls
    if recipe.control is None or controlnet is None:
        return found
    return controlnet_class(found, controlnet) or found


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
