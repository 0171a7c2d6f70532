"""Pillow images from the pixels that a stack sends, and picture files that carry their whole recipe."""

import contextlib
import io
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from protocol.errors import BadRequest
from protocol.job import Recipe, StageRecord
from protocol.tensors import Tensor

CHUNK = "triptych"  # of a PNG
EXIF_IFD, MAKER_NOTE, USER_COMMENT = 0x8769, 0x927C, 0x9286  # tags of JPEG and WebP
WRITTEN = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # formats by suffix
QUALITY: Mapping[str, dict[str, Any]] = {
    "PNG": {}, "JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}
}  # fmt: skip


def to_images(pictures: Tensor) -> list[Image.Image]:
    """Images of a uint8 tensor (n, height, width, 3)."""
    n, height, width, channels = pictures.shape
    data = memoryview(pictures.data).cast("B")
    size = height * width * channels
    return [Image.frombytes("RGB", (width, height), data[i * size : (i + 1) * size]) for i in range(n)]


def parameters_text(recipe: Recipe, index: int) -> str:
    """The recipe as other tools show it (AUTOMATIC1111's `parameters`)."""
    lines = [" ".join([recipe.prompt, *(f"<lora:{lora.name}:{lora.weight:g}>" for lora in recipe.loras)])]
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
    """The making of a file's picture or video: which one of a job's it is, counted from 0, and what stages ran on."""

    recipe: Recipe
    index: int
    stages: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # by stage: its kind of device, and versions


@dataclass(frozen=True, slots=True)
class Metadata:
    """The text that a file carries: for Triptych the whole making, as JSON, and what other tools show."""

    making: str
    parameters: str


def metadata_of(recipe: Recipe, job: str, index: int, records: Sequence[StageRecord] = ()) -> Metadata:
    stages = {record.stage: [record.device_kind, record.versions] for record in records if record.versions}
    told = {"recipe": recipe.model_dump(), "job": job, "index": index, "stages": stages}
    return Metadata(json.dumps(told), parameters_text(recipe, index))


def save_picture(image: Image.Image, path: Path, metadata: Metadata | None) -> None:
    """Write a picture in the format of its suffix, with metadata that says how to make it again; BadRequest.

    What is there stays whole until the picture is: it is written beside it and put in its place.
    """
    kind = WRITTEN[path.suffix.lower()]
    writing(path, lambda draft: image.save(draft, kind, **QUALITY[kind], **in_file(kind, metadata)))


def picture_bytes(image: Image.Image, kind: str, metadata: Metadata | None, quality: int | None = None) -> bytes:
    """Return a picture's file: `kind` is PNG, JPEG or WEBP, the last two of a `quality` from 0 to 100 where given."""
    given = {"quality": quality, "lossless": False} if quality is not None and kind != "PNG" else QUALITY[kind]
    file = io.BytesIO()
    image.save(file, kind, **given, **in_file(kind, metadata))
    return file.getvalue()


def in_file(kind: str, metadata: Metadata | None) -> dict[str, Any]:
    """Return the arguments of Pillow's `save` that put metadata into a file of a kind."""
    told: dict[str, Any] = {}
    if metadata and kind == "PNG":
        told["pnginfo"] = info = PngInfo()
        info.add_itxt("parameters", metadata.parameters)
        info.add_itxt(CHUNK, metadata.making)
    elif metadata:
        exif = Image.Exif()
        ifd = exif.get_ifd(EXIF_IFD)
        ifd[MAKER_NOTE] = metadata.making.encode()
        ifd[USER_COMMENT] = b"UNICODE\0" + metadata.parameters.encode("utf-16-be")
        told["exif"] = exif
    return told


def writing(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file beside `path` and put it in its place once it is whole; BadRequest."""
    try:
        with put_in_place(path) as draft:
            write(draft)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadRequest(f"{str(path)!r} can't be written: {reason}.", "Choose another -o.") from error


def save_grid(images: Sequence[Image.Image], path: Path) -> None:
    """Write a sheet of pictures, about as wide as it is high, in cells of the largest one's size; BadRequest."""
    columns = math.ceil(math.sqrt(len(images)))
    width, height = max(image.width for image in images), max(image.height for image in images)
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height), "white")
    for number, image in enumerate(images):
        sheet.paste(image, (number % columns * width, number // columns * height))
    save_picture(sheet, path, None)


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


def making_in_picture(path: Path | BinaryIO) -> str:
    """Return the making that a picture file carries; empty if it carries none. BadRequest."""
    try:
        with Image.open(path, formats=(*dict.fromkeys(WRITTEN.values()), "GIF")) as image:
            # Its header and texts alone, within Pillow's limits; no pixels.
            if isinstance(chunk := image.info.get(CHUNK), str):
                return chunk
            comment = image.info.get("comment", b"") if image.format == "GIF" else b""
            note = image.getexif().get_ifd(EXIF_IFD).get(MAKER_NOTE, comment)
            return note.decode() if isinstance(note, bytes) and note.startswith(b"{") else ""
    except (OSError, ValueError, SyntaxError, RecursionError, Image.DecompressionBombError) as error:
        raise BadRequest(f"{called(path)} can't be read as a picture.") from error


def called(file: Path | BinaryIO) -> str:
    """Return how to call a file in an error."""
    return repr(str(file)) if isinstance(file, Path) else "The picture"


def read_recipe(path: Path | BinaryIO) -> Made:
    """Return how the picture or video in a file that Triptych wrote was made; BadRequest."""
    from protocol.client.video_files import CONTAINERS, making_of

    if isinstance(path, Path) and path.suffix.lower() in CONTAINERS:
        chunk = making_of(path)
    else:
        chunk = making_in_picture(path)
    if not chunk:
        raise BadRequest(
            f"{called(path)} carries no recipe.", "Only files that Triptych wrote do, while nobody strips them."
        )
    try:
        found = json.loads(chunk)
        stages = {str(stage): (str(kind), str(versions)) for stage, (kind, versions) in found.get("stages", {}).items()}
        recipe, index = Recipe.model_validate_json(json.dumps(found["recipe"])), int(found["index"])
        if not 0 <= index < recipe.num_images:
            raise ValueError(f"there is no picture {index} of {recipe.num_images}")
        return Made(recipe, index, stages)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadRequest(f"{called(path)} carries a recipe that can't be read.") from error
