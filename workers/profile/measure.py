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
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from protocol.job import JobRequest
from protocol.model_profile import ModelProfile
from protocol.model_spec import ModelSpec
from protocol.process import report_end
from workers.models.source import Source, locate

log = logging.getLogger(__name__)

NO_SIZE: dict[str, Any] = {  # the model's own
    "width": None, "height": None, "steps": None, "num_images": 1, "cfg_scale": None
}  # fmt: skip
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
    parts = (Path(__file__), Path(__file__).with_name("meta_run.py"))
    return hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()[:16]


def profile_of(source: Source, dtype: str, request: JobRequest) -> ModelProfile:
    """Return what a job takes by a model in a dtype; BadRequest or DoesNotFit where the model doesn't take it."""
    from protocol.recipe import resolve
    from workers.models.description import describe
    from workers.models.skeleton import quiet
    from workers.profile.meta_run import MetaRun

    with quiet():
        description = describe(source)
        recipe = resolve(request, description, dtype, None)
        stages = MetaRun(source, recipe).stages()
    return ModelProfile(model=description, recipe=recipe, stages=stages)


def profile_for(source: Source, dtype: str, **wanted: Any) -> ModelProfile:
    """Return `profile_of`'s result, found once for each model, dtype and size by the same versions."""
    request = JobRequest(prompt=PROMPT, seed=1, **wanted)
    key = [str(source.folder), source.revision, dtype, sorted(wanted.items())]
    return cached(key, lambda: profile_of(source, dtype, request))


@click.command(help=__doc__.split("\n")[0])
@click.argument("model")
@click.option("--revision")
@click.option("--controlnet")
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--width", type=int)
@click.option("--height", type=int)
@click.option("--steps", type=int)
@click.option("--num-images", type=int, default=1)
@click.option("--cfg-scale", type=float)
def main(model: str, revision: str | None, controlnet: str | None, dtype: str, **wanted: Any) -> None:
    try:
        with contextlib.redirect_stdout(sys.stderr):  # whatever a library prints
            source = locate(ModelSpec(name=model, revision=revision, controlnet=controlnet), None)
            found = profile_for(source, dtype, **wanted)
        print(found.model_dump_json())
    except Exception as error:
        sys.exit(report_end(error))


if __name__ == "__main__":
    main()
