"""The beginning of a job's way through the stages, and what its first call depends on; found without weights."""

import hashlib
import json
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from protocol.data import Data
from protocol.job import Recipe
from protocol.stages import FIRST, Stage

Shape = tuple[int, ...]  # of a picture: height and width in pixels, channels
SENTINEL, NEGATIVE_SENTINEL = "what nobody asks for, 5b1f", "what nobody leaves out, 5b1f"  # in the place of prompts
WHOLE = "whole:"  # begins keys that are made of the whole recipe


class Route(Data):
    """The route of jobs that differ in their prompts, seeds and pictures' contents alone, as far as it is known."""

    first: Stage = FIRST  # the stage that the pipeline's call wants first
    # Of the text stage's first visit: digest of its calls' arguments, for prompts of SENTINEL ("": unknown), their
    # number, and the stage that is next (None: unknown).
    encoded: Annotated[str, Field(max_length=64)] = ""
    calls: int = 0
    following: Stage | None = None
    of_pictures: bool = False  # they depend on the contents of pictures
    of_seed: bool = False  # and on the seed
    refusal: Annotated[str, Field(max_length=1000)] = ""  # the pipeline's own reason why it doesn't take them


@dataclass(frozen=True, slots=True)
class Template:
    """A recipe whose prompts, seed and pictures stand for any, and the shapes of its pictures."""

    recipe: Recipe
    shapes: tuple[Shape, ...]

    @staticmethod
    def of(recipe: Recipe, shapes: tuple[Shape, ...]) -> "Template":
        negative = recipe.negative_prompt and NEGATIVE_SENTINEL  # none and an empty one stay what they are
        digest = "0" * 64
        images = (digest,) * len(recipe.images)
        return Template(
            recipe.model_copy(
                update={
                    "prompt": SENTINEL, "negative_prompt": negative, "seed": 0, "images": images,
                    "mask": recipe.mask and digest, "control": recipe.control and digest,
                    "ip_image": recipe.ip_image and digest,
                    "videos": tuple((name, digest) for name, _ in recipe.videos), "loras": (),
                }
            ),
            shapes,
        )  # fmt: skip


def encoded_key(route: Route, recipe: Recipe) -> str:
    """Return the key of the text stage's results: equal keys mean equal results. It errs to being another.

    It is made of what its calls' arguments are made of: sizes, scales or seeds are in it where they are. Models that
    share all that the text stage computes with share its results, too.
    """
    parts = (
        recipe.text_digest or recipe.revision,
        recipe.dtype,
        route.encoded,
        recipe.prompt,
        recipe.negative_prompt,
        *(sorted(recipe.named_pictures.items()) if route.of_pictures else ()),
        *((recipe.seed,) if route.of_seed else ()),
        *text_speedups(recipe),
        *text_loras(recipe),
    )
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def whole_key(recipe: Recipe) -> str:
    """Return the key of embeddings where no route is known: it leaves out only what can't matter."""
    parts = (
        recipe.revision,
        recipe.dtype,
        recipe.prompt,
        recipe.negative_prompt,
        recipe.cfg_scale,  # which may decide whether the negative prompt is encoded, too
        recipe.max_sequence_length,
        recipe.num_images,
        *sorted(recipe.named_pictures.items()),
        recipe.settings,
        *(
            (recipe.width, recipe.height, recipe.sized, recipe.frames) if recipe.pictures else ()
        ),  # what an encoder may see
        *text_speedups(recipe),
        *text_loras(recipe),
    )
    return WHOLE + hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def text_loras(recipe: Recipe) -> tuple[tuple[str, float], ...]:
    """Return the LoRAs that change text encoders, in their order."""
    return tuple((lora.digest, lora.weight) for lora in recipe.loras if lora.encoders)


def text_speedups(recipe: Recipe) -> tuple[str, ...]:
    return tuple(speedup for speedup in recipe.speedups if speedup.startswith("text:"))
