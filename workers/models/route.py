"""The route of a job's beginning, found without weights: the pipeline's own call, up to the first into a component."""

import hashlib
import logging
from typing import Any

import msgpack
import numpy as np
import torch
from PIL import Image

from protocol.job import Recipe
from protocol.pictures import IMAGE, MASK
from protocol.route import Route, Shape, Template
from protocol.tensors import Tensor
from workers.models.loading import Loaded, install_boundaries, on_device
from workers.models.skeleton import build_skeleton
from workers.models.source import Source
from workers.replay.boundaries import Run, Stopped
from workers.replay.call_record import CallRecord
from workers.replay.values import Untransferable, freeze
from workers.stages.pipeline_call import arguments_of, until_stop
from workers.tensors import DTYPES

log = logging.getLogger(__name__)

HERE = torch.device("cpu")


class Router:
    """A pipeline without weights, that looks at recipes."""

    def __init__(self, source: Source, dtype: str) -> None:
        pipeline: Any = build_skeleton(source, DTYPES[dtype])
        pipeline.__class__ = on_device(type(pipeline), HERE)
        install_boundaries(pipeline)
        pipeline.set_progress_bar_config(disable=True)
        self._loaded = Loaded(pipeline, ())

    @torch.no_grad()
    def look(self, template: Template) -> Route:
        """Return what jobs of a template begin with; a route of which nothing is known where that can't be found."""
        try:
            stopped = self._run(template.recipe, template.shapes)
        except ValueError as error:  # by which pipelines say that they don't take something
            return Route(refusal=" ".join(str(error).split())[:1000])
        except Exception as error:
            log.info("its route is not known: %s", error)
            return Route()
        if stopped is None:
            return Route()
        call = digest_of(stopped)
        if not call:
            return Route(first=stopped.owner)
        other = template.recipe.model_copy(update={"seed": template.recipe.seed + 1})
        return Route(
            first=stopped.owner,
            call=call,
            of_pictures=bool(template.shapes) and digest_of(self._run(template.recipe, template.shapes, 1)) != call,
            of_seed=digest_of(self._run(other, template.shapes)) != call,
        )

    def _run(self, recipe: Recipe, shapes: tuple[Shape, ...], content: int = 0) -> Stopped | None:
        """Run the call with pictures of these shapes, of whatever `content`, to its first boundary."""
        pipeline = self._loaded.pipeline_for(recipe)
        given = pictures_like(recipe, shapes, content)
        generator = torch.Generator("cpu").manual_seed(recipe.seed)
        run = Run(None, CallRecord(), HERE, generator=generator)
        found = until_stop(pipeline, run, arguments_of(pipeline, recipe, given))
        return found if isinstance(found, Stopped) else None


def pictures_like(recipe: Recipe, shapes: tuple[Shape, ...], content: int) -> list[Tensor]:
    names = [f"{IMAGE}:{number}" for number in range(len(recipe.images))] + ([MASK] if recipe.mask else [])
    random = np.random.default_rng(content)
    return [
        Tensor(name, "uint8", shape, random.integers(0, 256, shape, dtype=np.uint8).tobytes())
        for name, shape in zip(names, shapes, strict=True)
    ]


def digest_of(stopped: Stopped | None) -> str:
    """Return a digest of a call and its arguments; empty where they are none that can be compared."""
    if stopped is None:
        return ""
    digest = hashlib.sha256(stopped.label.encode())

    def put_aside(tensor: torch.Tensor) -> int:
        digest.update(repr((tensor.shape, tensor.dtype)).encode())
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
        return 0

    try:
        for value in (*stopped.arguments, *sorted(stopped.keywords.items())):
            digest.update(msgpack.packb(freeze(plain(value), HERE, put_aside)))
    except (Untransferable, RuntimeError, TypeError):
        return ""
    return digest.hexdigest()


def plain(value: Any) -> Any:
    """Return pixels for pictures, and a mark for the call's generator and for placeholders, always the same."""
    match value:
        case Image.Image():
            return [value.mode, np.asarray(value)]
        case torch.Generator() | torch.device() | torch.nn.Module():
            return type(value).__name__
        case list() | tuple():
            return type(value)(plain(item) for item in value)
        case dict():
            return {name: plain(item) for name, item in value.items()}
    return value
