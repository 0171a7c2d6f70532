"""The places where pictures go: every final name is known and checked before anything is queued."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from orchestrator.state_folder import shortened
from protocol.errors import BadRequest
from protocol.job import Job
from protocol.tensors import Tensor


class OutputPath(click.Path):
    """A file, or a folder; one that is named with a slash at its end is made."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if str(value).endswith(os.sep) and not (ctx and ctx.resilient_parsing):
            try:
                Path(value).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise BadRequest(
                    f"The folder {str(value)!r} can't be made: {error.strerror}.", "Choose another place with -o."
                ) from error
        return super().convert(value, param, ctx)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A job's pictures: all of them, or the only one that is wanted, counted from 0."""

    job: str
    count: int
    only: int | None = None

    @property
    def indices(self) -> Sequence[int]:
        return range(self.count) if self.only is None else (self.only,)


Names = dict[str, list[tuple[int, Path]]]  # by job, its pictures' numbers and final names


def names_for(output: Path | None, jobs: Sequence[Wanted]) -> Names:
    """A name for each picture: as given for a single one, else numbered; jobs' ids where none is given. BadRequest."""
    try:
        folder = output if output is not None and output.is_dir() else None
    except OSError as error:
        raise unwritable(output, error) from error
    if output is not None and folder is None and output.suffix.lower() != ".png":
        raise BadRequest(
            f"-o {str(output)!r} is not a PNG file or a folder that is there.", "Name it FILE.png, or FOLDER/."
        )
    total = sum(len(job.indices) for job in jobs)
    found: Names = {}
    count = 0
    for job in jobs:
        found[job.job] = []
        for index in job.indices:
            count += 1
            if output is not None and folder is None:
                path = output if total == 1 else output.with_stem(f"{output.stem}-{count:0{len(str(total))}d}")
            else:
                suffix = f"-{index + 1}" if job.count > 1 else ""
                path = (folder or Path(".")) / f"triptych-{job.job}{suffix}.png"
            found[job.job].append((index, path))
    for rows in found.values():
        for _, path in rows:
            check(path)
    for parent in {path.parent for rows in found.values() for _, path in rows}:
        check_folder(parent)
    return found


def check(path: Path) -> None:
    """Raise BadRequest if a picture can't take this name."""
    try:
        if path.is_dir():
            raise BadRequest(f"{str(path)!r} is a folder, where a picture is to go.", "Choose another -o.")
        if path.exists() and not os.access(path, os.W_OK):
            raise BadRequest(f"{str(path)!r} can't be written.", "Choose another -o.")
    except OSError as error:
        raise unwritable(path, error) from error


def check_folder(folder: Path) -> None:
    """Raise BadRequest if no file can be made there."""
    if not folder.is_dir():
        raise BadRequest(f"There is no folder {str(folder)!r} for pictures.", "Make it first, or choose another.")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise unwritable(folder, error) from error


def unwritable(path: Path | None, error: OSError) -> BadRequest:
    shown = shortened(path) if path else "."
    return BadRequest(f"{shown!r} can't be written: {error.strerror}.", "Choose another place with -o.")


def write(job: Job, pictures: Tensor, names: Sequence[tuple[int, Path]]) -> tuple[list[Path], list[BadRequest]]:
    """Write a job's pictures; return the files that were written, and why others were not."""
    from protocol.client.png import save_png, to_images

    images = to_images(pictures)
    written: list[Path] = []
    errors: list[BadRequest] = []
    for index, path in names:
        try:
            save_png(images[index], path, job.recipe, job.id, index, job.records)
            written.append(path)
        except BadRequest as error:
            errors.append(error)
    return written, errors
