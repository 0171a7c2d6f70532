"""The route of a job's beginning, found without weights: the pipeline's own call, past what the text stage encodes."""

import contextlib
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from protocol.job import Recipe
from protocol.route import Route, Shape, Template
from protocol.stages import FIRST, Stage
from protocol.tensors import Tensor
from workers.models.loading import Loaded, install_boundaries, on_device
from workers.models.skeleton import added_names, build_skeleton, pipeline_class, without_weights
from workers.models.source import Source, stages_of
from workers.profile.meta_run import Seen as Operations
from workers.profile.meta_run import on_shapes, watched
from workers.replay.boundaries import Run, Stopped, tensors_of
from workers.replay.call_record import CallRecord
from workers.replay.values import Untransferable, freeze
from workers.stages.pipeline_call import arguments_of, until_stop
from workers.tensors import DTYPES

log = logging.getLogger(__name__)

HERE = torch.device("cpu")
MOST_KNOWN = 256  # calls whose results' shapes are kept


class Router:
    """A pipeline without weights, that looks at recipes."""

    def __init__(self, source: Source, dtype: str) -> None:
        pipeline: Any = build_skeleton(source, DTYPES[dtype])
        pipeline.__class__ = on_device(type(pipeline), HERE)
        install_boundaries(pipeline)
        pipeline.set_progress_bar_config(disable=True)
        added = {
            n: without_weights(source, n, HERE, DTYPES[dtype]) for n in added_names(source, pipeline_class(source))
        }
        self._loaded = Loaded(pipeline, (), added=added)
        self._shapes = Shapes(pipeline)
        self._answered = 0  # calls of the last run that were answered by zeros

    @torch.no_grad()
    def look(self, template: Template) -> Route:
        """Return what jobs of a template begin with; a route of which nothing is known where that can't be found."""
        try:
            return self._look(template)
        except ValueError as error:  # by which pipelines say that they don't take something
            told = " ".join(str(error).split())
            if not self._answered and "prompt" not in told.lower():  # of which this one stands for any
                return Route(refusal=told[:1000])
            log.info("its route is not known: %s", told)
        except Exception as error:
            log.info("its route is not known: %s", error)
        return Route()

    def _look(self, template: Template) -> Route:
        seen = self._run(template.recipe, template.shapes)
        if seen is None:
            return Route()
        if seen.first != FIRST or not seen.digest:
            return Route(first=seen.first)
        other = template.recipe.model_copy(update={"seed": template.recipe.seed + 1})
        return Route(
            first=seen.first,
            encoded=seen.digest,
            calls=seen.calls,
            following=seen.following,
            of_pictures=bool(template.shapes) and self._run(template.recipe, template.shapes, 1) != seen,
            of_seed=self._run(other, template.shapes) != seen,
        )

    def _run(self, recipe: Recipe, shapes: tuple[Shape, ...], content: int = 0) -> "Seen | None":
        """Run the call with pictures of these shapes, of whatever `content`, over the text stage's first visit."""
        pipeline = self._loaded.pipeline_for(recipe)
        given = pictures_like(recipe, shapes, content)
        generator = torch.Generator("cpu").manual_seed(recipe.seed)
        run = Lookout("text", CallRecord(), HERE, generator=generator, shapes=self._shapes)
        try:
            found = until_stop(pipeline, run, arguments_of(pipeline, recipe, given))
        finally:
            self._answered = len(run.digests)
        if not isinstance(found, Stopped):
            return None
        first: Stage = FIRST if run.digests else found.owner
        following = None if run.lost or found.owner == FIRST else found.owner
        digest = hashlib.sha256("".join(run.digests).encode()).hexdigest() if all(run.digests) else ""
        return Seen(first, digest if following or run.lost else "", len(run.digests), following)


@dataclass(frozen=True, slots=True)
class Seen:
    """The calls of a text stage's first visit: a digest of all, their number, and the stage after them, if known."""

    first: Stage
    digest: str
    calls: int
    following: Stage | None


class Shapes:
    """The results of encoders on shapes alone, by their calls."""

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        components = pipeline.components.items()
        self._encoders = {n: c for n, c in components if isinstance(c, torch.nn.Module) and stages_of(n) == ("text",)}
        self._known: OrderedDict[str, Any] = OrderedDict()

    def result(self, digest: str, label: str, real: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Return zeros of the shapes of a call's result; any error of the encoders' code."""
        if digest not in self._known:
            with contextlib.ExitStack() as stack:
                for name, encoder in self._encoders.items():
                    stack.enter_context(on_shapes(Operations(), name, encoder))
                name = label.partition(".")[0]
                if name in self._encoders:
                    self._known[digest] = watched(Operations(), name, self._encoders[name], real, *args, **kwargs)
                else:
                    self._known[digest] = real(*args, **kwargs)
            if len(self._known) > MOST_KNOWN:
                self._known.popitem(last=False)
        return self._known[digest]


@dataclass(slots=True)
class Lookout(Run):
    """A run of the text stage's first visit, on shapes alone."""

    shapes: Shapes | None = None
    digests: list[str] = field(default_factory=list)  # of its calls; empty where one can't be compared
    lost: bool = False  # what comes after its first call can't be found

    def call(self, owner: Stage, label: str, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        stopped = Stopped(owner, label, args, kwargs)
        if owner != FIRST:
            raise stopped
        if self.digests and any(True for _ in tensors_of([args, kwargs], every=True)):
            self.digests.append("")  # it may depend on what the calls before give
            raise stopped
        self.digests.append(digest_of(stopped))
        if not self.digests[-1]:
            raise stopped
        self.inside = True
        try:
            assert self.shapes is not None
            return self.shapes.result(self.digests[-1], label, real, args, kwargs)
        except Exception as error:
            log.info("%s can't be run on shapes: %s", label, error)
            self.digests, self.lost = self.digests[:1], True
            raise stopped from error
        finally:
            self.inside = False


def pictures_like(recipe: Recipe, shapes: tuple[Shape, ...], content: int) -> list[Tensor]:
    names = recipe.named_pictures
    random = np.random.default_rng(content)
    return [
        Tensor(name, "uint8", shape, random.integers(0, 256, shape, dtype=np.uint8).tobytes())
        for name, shape in zip(names, shapes, strict=True)
    ]


def digest_of(stopped: Stopped) -> str:
    """Return a digest of a call and its arguments; empty where they are none that can be compared."""
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
