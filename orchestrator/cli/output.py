"""Where pictures go, checked before anything is queued."""

import os
import tempfile
from pathlib import Path
from typing import Any

import click

from protocol.errors import BadRequest
from protocol.jobs import Job
from protocol.tensors import Tensor


class OutputPath(click.Path):
    """A file, or a folder; one that is named with a slash at its end is made."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if str(value).endswith(os.sep):
            try:
                Path(value).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise BadRequest(
                    f"The folder {str(value)!r} can't be made: {error.strerror}.", "Choose another place with -o."
                ) from error
        return super().convert(value, param, ctx)


def check_output(output: Path | None) -> None:
    """BadRequest if nothing could be written there."""
    target = output or Path(".")
    folder = target if target.is_dir() or output is None else target.parent
    if output is not None and not target.is_dir() and target.suffix.lower() != ".png":
        raise BadRequest(
            f"-o {str(output)!r} is not a PNG file or a folder that is there.", "Name it FILE.png, or FOLDER/."
        )
    if not folder.is_dir():
        raise BadRequest(
            f"-o {str(output)!r}: there is no folder {str(folder)!r}.", "Make it first, or choose another."
        )
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadRequest(
            f"{str(folder)!r} can't be written: {error.strerror}.", "Choose another place with -o."
        ) from error
    if target.is_file() and not os.access(target, os.W_OK):
        raise BadRequest(f"{str(target)!r} can't be written.", "Choose another -o.")


def paths_for(output: Path | None, jobs: list[Job]) -> dict[str, list[Path]]:
    """A path for each picture: as given for a single one, else numbered; jobs' ids where no name is given."""
    total = sum(job.recipe.num_images for job in jobs)
    named = output is not None and not output.is_dir()
    folder = output if output is not None and output.is_dir() else Path(".")
    found: dict[str, list[Path]] = {}
    count = 0
    for job in jobs:
        found[job.id] = []
        for i in range(job.recipe.num_images):
            count += 1
            if named and output is not None:
                path = output if total == 1 else output.with_stem(f"{output.stem}-{count:0{len(str(total))}d}")
            else:
                suffix = f"-{i + 1}" if job.recipe.num_images > 1 else ""
                path = folder / f"triptych-{job.id}{suffix}.png"
            found[job.id].append(path)
    return found


def write(job: Job, pictures: Tensor, paths: list[Path]) -> None:
    from protocol.pictures import save_png, to_images

    for index, (image, path) in enumerate(zip(to_images(pictures), paths, strict=True)):
        save_png(image, path, job.recipe, job.id, index)
