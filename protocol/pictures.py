"""From the frame that a stack sends to Pillow images, and PNG files that carry their whole recipe."""

import json
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from protocol.errors import BadRequest
from protocol.jobs import Recipe
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
    settings |= {"Model": recipe.model, "Model hash": recipe.revision, "Version": "Triptych"}
    if recipe.num_images > 1:
        settings["Batch size"], settings["Batch pos"] = recipe.num_images, index
    lines.append(", ".join(f"{name}: {value}" for name, value in settings.items()))
    return "\n".join(lines)


def save_png(image: Image.Image, path: Path, recipe: Recipe, job: str, index: int) -> None:
    """Write a PNG whose metadata says how to make it again; `index` counts the pictures of one job from 0."""
    info = PngInfo()
    info.add_itxt("parameters", parameters_text(recipe, index))
    info.add_itxt(CHUNK, json.dumps({"recipe": recipe.model_dump(), "job": job, "index": index}))
    try:
        image.save(path, "PNG", pnginfo=info)
    except OSError as error:
        raise BadRequest(f"{str(path)!r} can't be written: {error.strerror or error}.", "Choose another -o.") from error


def read_recipe(path: Path) -> tuple[Recipe, int]:
    """The recipe in a PNG that Triptych wrote, and which of the job's pictures it is."""
    try:
        with Image.open(path, formats=("PNG",)) as image:  # its header and texts, within Pillow's limits; no pixels
            chunk = image.info.get(CHUNK)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadRequest(f"{str(path)!r} can't be read as a PNG picture.") from error
    if not isinstance(chunk, str):
        raise BadRequest(
            f"{str(path)!r} carries no recipe.", "Only PNGs that Triptych wrote do, while nobody strips them."
        )
    try:
        found = json.loads(chunk)
        return Recipe.model_validate_json(json.dumps(found["recipe"])), int(found["index"])
    except (ValueError, KeyError, TypeError) as error:
        raise BadRequest(f"{str(path)!r} carries a recipe that can't be read.") from error
