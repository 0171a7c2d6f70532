"""Pipelines over the same weights for what is to be made: of a prompt, of a picture, or of a picture and a mask."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.pipelines.auto_pipeline import (
    AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    AUTO_INPAINT_PIPELINES_MAPPING,
    _get_task_class,
)

from protocol.job import Recipe


def image_class(cls: type[DiffusionPipeline]) -> type[DiffusionPipeline] | None:
    """Return the pipeline that makes something of a picture with the weights of `cls`; None where there is none."""
    return cls if "image" in parameters_of(cls) else _of_task(AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, cls)


def inpaint_class(cls: type[DiffusionPipeline]) -> type[DiffusionPipeline] | None:
    """Return the pipeline that paints what a mask covers, with the weights of `cls`; None where there is none."""
    return cls if "mask_image" in parameters_of(cls) else _of_task(AUTO_INPAINT_PIPELINES_MAPPING, cls)


def class_for(cls: type[DiffusionPipeline], recipe: Recipe) -> type[DiffusionPipeline]:
    """Return the pipeline for a job, by the pictures that it brings."""
    if recipe.mask is not None:
        return inpaint_class(cls) or cls
    return (image_class(cls) or cls) if recipe.images else cls


def parameters_of(cls: type[DiffusionPipeline]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a pipeline class's call."""
    return _parameters(cls.__call__)


@functools.cache
def _parameters(call: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(call).parameters


def _of_task(mapping: Any, cls: type[DiffusionPipeline]) -> type[DiffusionPipeline] | None:
    found: type[DiffusionPipeline] | None = _get_task_class(mapping, cls.__name__, throw_error_if_not_exist=False)
    return found
