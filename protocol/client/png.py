"""Pillow images from the frame that a stack sends, and PNG files that carry their whole recipe."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from protocol.errors import BadRequest
from protocol.job import Recipe, StageRecord
from protocol.tensors import Tensor

CHUNK = "triptych"


def to_images(pictures: Tensor) -> list[Image.Image]:
    """Images of a uint8 tensor (n, height, width, 3)."""
    n, height, width, channels = pictures.shape
    data = memoryview(pictures.data).cast("B")
    size = height * width * channels
    return [Image.frombytes("RGB", (width, height), data[i * size : (i + 1) * size]) for i in range(n)]


def parameters_text(recipe: Recipe, index: int) -> str:
    """The recipe as other tools show it (AUTOMATIC1111's `parameters`)."""
    lines = [recipe.prompt]
    if recipe.negative_prompt is not None:
        lines.append(f"Negative prompt: {recipe.negative_prompt}")
    settings: dict[str, object] = {
        "Steps": recipe.steps,
        "Seed": recipe.seed,
        "Size": f"{recipe.width}x{recipe.height}",
    }
    if recipe.cfg_scale is not None:
        settings["CFG scale"] = recipe.cfg_scale
    if recipe.guidance is not None:
        settings["Distilled CFG Scale"] = recipe.guidance
    # The name alone: a path would tell strangers of this machine.
    settings |= {"Model": Path(recipe.model).name, "Model hash": recipe.revision, "Version": "Triptych"}
    if recipe.num_images > 1:
        settings["Batch size"], settings["Batch pos"] = recipe.num_images, index
    lines.append(", ".join(f"{name}: {quoted(value)}" for name, value in settings.items()))
    return "\n".join(lines)


def quoted(value: object) -> str:
    """A setting's value as AUTOMATIC1111's readers want it: as a JSON string where it could be taken for more."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & {",", ":", "\n", '"'} else text


@dataclass(frozen=True, slots=True)
class Made:
    """The making of a PNG's picture: which one of a job's it is, counted from 0, and what each stage ran on."""

    recipe: Recipe
    index: int
    stages: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # by stage: its kind of device, and versions


def save_png(
    image: Image.Image, path: Path, recipe: Recipe, job: str, index: int, records: Sequence[StageRecord] = ()
) -> None:
    """Write a PNG whose metadata says how to make it again; BadRequest.

    What is there stays whole until the picture is: it is written beside it and put in its place.
    """
    info = PngInfo()
    info.add_itxt("parameters", parameters_text(recipe, index))
    stages = {record.stage: [record.device_kind, record.versions] for record in records if record.versions}
    told = {"recipe": recipe.model_dump(), "job": job, "index": index, "stages": stages}
    info.add_itxt(CHUNK, json.dumps(told))
    try:
        with put_in_place(path) as draft:
            image.save(draft, "PNG", pnginfo=info)
    except OSError as error:
        raise BadRequest(f"{str(path)!r} can't be written: {error.strerror or error}.", "Choose another -o.") from error


@contextlib.contextmanager
def put_in_place(path: Path) -> Iterator[Path]:
    """A file beside `path` to be written, which takes its place once it is whole and on the disk; OSError."""
    target = Path(os.path.realpath(path))
    draft = target.with_name(f".triptych-{secrets.token_hex(6)}.part")
    try:
        yield draft
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        if target.exists():
            shutil.copymode(target, draft)
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def read_recipe(path: Path) -> Made:
    """Return how the picture in a PNG that Triptych wrote was made; BadRequest."""
    try:
        with Image.open(path, formats=("PNG",)) as image:  # its header and texts, within Pillow's limits; no pixels
            chunk = image.info.get(CHUNK)
    except (OSError, ValueError, SyntaxError, RecursionError, Image.DecompressionBombError) as error:
        raise BadRequest(f"{str(path)!r} can't be read as a PNG picture.") from error
    if not isinstance(chunk, str):
        raise BadRequest(
            f"{str(path)!r} carries no recipe.", "Only PNGs that Triptych wrote do, while nobody strips them."
        )
    try:
        found = json.loads(chunk)
        stages = {str(stage): (str(kind), str(versions)) for stage, (kind, versions) in found.get("stages", {}).items()}
        recipe, index = Recipe.model_validate_json(json.dumps(found["recipe"])), int(found["index"])
        if not 0 <= index < recipe.num_images:
            raise ValueError(f"there is no picture {index} of {recipe.num_images}")
        return Made(recipe, index, stages)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadRequest(f"{str(path)!r} carries a recipe that can't be read.") from error
