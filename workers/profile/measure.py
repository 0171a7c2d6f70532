"""The profile of a model, found by running its pipeline on shapes alone: weights and results are on the meta device.

    python -m workers.profile.measure MODEL [--controlnet MODEL] [--dtype bfloat16] [--width 1024] [--height 1024] …

prints a `ModelProfile` as JSON. Of a hub model only the small files are needed. What was found is kept in the user's
cache folder, so that asking again takes no time; nothing slow is imported before that is clear.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import math
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import click

from protocol.errors import TriptychError
from protocol.job import JobRequest
from protocol.model import ModelDescription
from protocol.model_profile import ModelProfile
from protocol.model_spec import PARTS, ModelSpec
from protocol.pictures import extent_of
from protocol.process import report_end
from protocol.tensors import Tensor
from workers.models.source import Source, locate

log = logging.getLogger(__name__)

NO_SIZE: dict[str, Any] = {  # the model's own
    "width": None, "height": None, "steps": None, "num_images": 1, "cfg_scale": None, "frames": None
}  # fmt: skip
NO_PICTURE = "0" * 64
PROMPT = "a large red circle at the top left"
VERSIONS = ("triptych", "torch", "diffusers", "transformers")


def cached(key: list[Any], make: Callable[[], ModelProfile]) -> ModelProfile:
    """Return what was found before by the same versions for the same files, or what `make` finds now."""
    from platformdirs import user_cache_path

    versions = [importlib.metadata.version(name) for name in VERSIONS]
    digest = hashlib.sha256(json.dumps([key, versions, code()]).encode()).hexdigest()[:24]
    path = user_cache_path("triptych") / "figures" / f"{digest}.json"
    try:
        return ModelProfile.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        found = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(found.model_dump_json())
    except OSError as error:
        log.info("what was found is not kept: %s", error)
    return found


def code() -> str:
    """Return a digest of the code that finds a profile, which may change between versions."""
    here = Path(__file__).parent
    parts = (*here.glob("*.py"), *here.with_name("models").glob("*.py"), here.parent / "weights" / "lockstep.py")
    return hashlib.sha256(b"".join(part.read_bytes() for part in sorted(parts))).hexdigest()[:16]


def profile_of(source: Source, dtype: str, request: JobRequest) -> ModelProfile:
    """Return what a job takes by a model in a dtype, by weights alone where its pipeline can't be run on shapes.

    Raises: BadRequest or DoesNotFit where the model doesn't take it.
    """
    from protocol.recipe import resolve
    from workers.models.description import describe
    from workers.models.skeleton import quiet
    from workers.profile.meta_run import MetaRun

    def profile(kinds: Collection[str], guessed: str = "") -> ModelProfile:
        brought, shapes = with_pictures(request, description, kinds)
        recipe = resolve(brought, description, dtype, None, (), *extent_of(shapes))
        given = [Tensor(name, "uint8", shape, bytes(math.prod(shape))) for name, shape in shapes.items()]
        run = MetaRun(source, recipe, given)
        stages = run.guessed() if guessed else run.stages()
        return ModelProfile(model=description, recipe=recipe, stages=stages, guessed=guessed)

    with quiet():
        description = describe(source)
        try:
            return profile(description.needs)
        except (TriptychError, OSError, MemoryError):  # which says nothing of the pipeline
            raise
        except Exception as error:  # pipelines have no word in common for what they don't go without
            why = told(error, description.needs)
        for more in also_taken(description):
            try:
                return profile({*description.needs, *more})
            except Exception as error:
                told(error, more)
        return profile(description.needs, why)


def told(error: Exception, kinds: Collection[str]) -> str:
    """Return, and log, in one line why a pipeline was not run on shapes."""
    line = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    log.info("not run on shapes with %s: %s", ", ".join(kinds) or "a prompt alone", line)
    return line


def also_taken(model: ModelDescription) -> Iterator[tuple[str, ...]]:
    """Yield what a job may bring that a model may not go without, the least first."""
    videos = tuple(model.of_video.videos) if model.of_video else ()
    yield from ((kind,) for kind in ("image", "control", *videos))
    yield from (("image", "mask"), ("image", "control"), ("image", "mask", "control"), (*videos, "control"), videos)


def with_pictures(
    request: JobRequest, model: ModelDescription, kinds: Collection[str]
) -> tuple[JobRequest, dict[str, tuple[int, ...]]]:
    """Return a request with pictures of some kinds (`image`, `mask`, `control`, names of videos), and their shapes."""
    size = (request.height or model.height, request.width or model.width)
    videos = tuple((name, NO_PICTURE) for name in kinds if name not in ("image", "mask", "control"))
    single = {kind: NO_PICTURE if kind in kinds else None for kind in ("mask", "control")}
    images = (NO_PICTURE,) if "image" in kinds else ()
    prompt = request.prompt if model.prompt else ""
    negative = "" if (request.cfg_scale or 0) > 1 and model.negative_prompt else request.negative_prompt
    frames = request.frames if model.video else None  # of a stack's other models
    brought = request.model_copy(
        update={
            "prompt": prompt, "negative_prompt": negative, "images": images, "videos": videos, "frames": frames,
            **single,
        }
    )  # fmt: skip
    if (task := (model.inpaint if brought.mask else model.image) if images else None) and not task.sized:
        brought = brought.model_copy(update={"width": None, "height": None})
    length = (frames or model.video.frames) if model.video else 0
    shapes = {"mask": (*size, 1), **{f"video:{name}": (length, *size, 3) for name, _ in videos}}
    return brought, {name: shapes.get(name, (*size, 3)) for name in brought.named_pictures}


def profile_for(source: Source, dtype: str, **wanted: Any) -> ModelProfile:
    """Return `profile_of`'s result, found once for each model, dtype and size by the same versions."""
    request = JobRequest(prompt=PROMPT, seed=1, **wanted)
    key = [str(source.folder), source.revision, dtype, sorted(wanted.items())]
    return cached(key, lambda: profile_of(source, dtype, request))


@click.command(help=__doc__.split("\n")[0])
@click.argument("model")
@click.option("--revision")
@click.option("--base")
@click.option("--controlnet")
@click.option("--refiner")
@click.option("--ip-adapter")
@click.option("--transformer")
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--width", type=int)
@click.option("--height", type=int)
@click.option("--steps", type=int)
@click.option("--num-images", type=int, default=1)
@click.option("--cfg-scale", type=float)
@click.option("--frames", type=int)
def main(model: str, dtype: str, **given: Any) -> None:
    try:
        with contextlib.redirect_stdout(sys.stderr):  # whatever a library prints
            source = locate(ModelSpec(name=model, **{part: given.pop(part) for part in PARTS}), None)
            found = profile_for(source, dtype, **given)
        print(found.model_dump_json())
    except Exception as error:
        sys.exit(report_end(error))


if __name__ == "__main__":
    main()
