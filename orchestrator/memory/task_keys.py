"""The keys under which is kept what a task takes: its workspace in bytes, and the seconds of its steps."""

import json

from orchestrator.job import ModelKey
from protocol.job import Recipe
from protocol.stages import Stage

MEGAPIXEL = 1024 * 1024


def pixels_at_once(stage: Stage, recipe: Recipe) -> int:
    """Pixels that a stage works on at once."""
    if stage == "text":
        return MEGAPIXEL
    passes = 2 if stage == "denoise" and guided(recipe) else 1
    return recipe.width * recipe.height * frames_at_once(stage, recipe) * recipe.num_images * passes


def frames_at_once(stage: Stage, recipe: Recipe) -> int:
    """Return a picture's or a video's frames as a stage holds them; latents have about a quarter of them."""
    if recipe.frames is None:
        return 1
    return (recipe.frames - 1) // 4 + 1 if stage == "denoise" else recipe.frames


def guided(recipe: Recipe) -> bool:
    """Return whether a denoiser may take its steps twice, for classifier-free guidance; an estimate."""
    return recipe.cfg_scale not in (None, 0, 1)


def size_of(recipe: Recipe) -> tuple[int, ...]:
    """Return width, height and number of pictures; of videos their frames, too."""
    return recipe.width, recipe.height, recipe.num_images, *((recipe.frames,) if recipe.frames else ())


def place_key(stage: Stage, model: ModelKey) -> str:
    return json.dumps([stage, model.revision, model.dtype, model.speedups])


def workspace_key(stage: Stage, model: ModelKey, recipe: Recipe) -> str:
    """Return the key of what a task of this size takes beside its stage's weights."""
    size = (*size_of(recipe), recipe.cfg_scale is not None) if stage != "text" else ()
    return f"{place_key(stage, model)[:-1]}, {json.dumps(size)}, {pixels_at_once(stage, recipe)}]"


def step_key(stage: Stage, recipe: Recipe, gpu: str) -> str:
    """Return the key of the seconds of a step; a text encoder's don't depend on the picture."""
    size = size_of(recipe) if stage != "text" else ()
    size += (-len(recipe.loras),) if recipe.loras else ()  # each adds to what a step computes
    return json.dumps([stage, recipe.revision, recipe.dtype, recipe.speedups, size, guided(recipe), gpu])
