"""The places where pictures go: every final name is known and checked before anything is queued."""

import os
import re
import string
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from orchestrator.state_folder import shortened
from protocol.errors import BadRequest
from protocol.job import Job
from protocol.pictures import pictures_among
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


@dataclass(frozen=True, slots=True)
class Name:
    """The final name of a job's picture or video, counted from 0."""

    index: int
    path: Path
    chosen: bool = True  # by the user; else its suffix is the usual one of what is made


Names = dict[str, list[Name]]  # by job

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
VIDEOS = (".mp4", ".webm", ".gif")
FIELDS = ("date", "time", "job", "seed", "prompt", "index")  # of --output-pattern


def names_for(output: Path | None, jobs: Sequence[Wanted]) -> Names:
    """A name for each picture: as given for a single one, else numbered; jobs' ids where none is given. BadRequest."""
    try:
        folder = output if output is not None and output.is_dir() else None
    except OSError as error:
        raise unwritable(output, error) from error
    if output is not None and folder is None:
        check_suffix(output, "-o")
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
            found[job.job].append(Name(index, path, output is not None and folder is None))
    return checked(found)


def checked(names: Names) -> Names:
    """Return names that files can take; BadRequest."""
    paths = [name.path for rows in names.values() for name in rows]
    for path in paths:
        check(path)
    for parent in {path.parent for path in paths}:
        check_folder(parent)
    return names


def check_suffix(path: Path, option: str) -> None:
    if path.suffix.lower() not in (*PICTURES, *VIDEOS):
        raise BadRequest(
            f"{option} {str(path)!r} is not a picture, a video or a folder that is there.",
            f"Name it FILE.png ({', '.join(PICTURES[1:])}), FILE.mp4 ({', '.join(VIDEOS[1:])}), or FOLDER/.",
        )


def names_of_pattern(pattern: str, jobs: Sequence[tuple[Wanted, Mapping[str, Any]]]) -> Names:
    """A name for each picture by a pattern, such as "{date}-{seed}-{prompt:.40}.png"; two that are equal get numbers.

    Each job comes with its fields of FIELDS. BadRequest.
    """
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None]
    except ValueError as error:
        raise BadRequest(f"--output-pattern {pattern!r} can't be read: {error}.") from error
    if unknown := sorted(set(fields) - set(FIELDS)):
        raise BadRequest(f"--output-pattern has no {unknown[0]!r}.", f"It has {', '.join(FIELDS)}.")
    check_suffix(Path(pattern), "--output-pattern")
    now = datetime.now()
    found: Names = {}
    taken: set[Path] = set()
    for job, values in jobs:
        found[job.job] = []
        for index in job.indices:
            told = {"date": f"{now:%Y-%m-%d}", "time": f"{now:%H-%M-%S}", "job": job.job, "index": index + 1, **values}
            told["prompt"] = re.sub(r"[^\w .,()+-]+", "_", str(told["prompt"])).strip() or "_"
            try:
                path = first = Path(pattern.format_map(told))
            except (ValueError, LookupError, AttributeError, TypeError) as error:
                raise BadRequest(f"--output-pattern {pattern!r} can't be filled: {error}.") from error
            number = 1
            while path in taken:
                number += 1
                path = first.with_stem(f"{first.stem}-{number}")
            taken.add(path)
            found[job.job].append(Name(index, path))
    return checked(found)


def fit_to(names: Names, video: bool) -> Names:
    """Return names for what is made; BadRequest where one that was chosen is for something else."""
    return {job: [fitting(name, video) for name in rows] for job, rows in names.items()}


def fitting(name: Name, video: bool) -> Name:
    from protocol.client.video_files import SEQUENCE

    if not name.chosen:
        return replace(name, path=name.path.with_suffix(".mp4" if video else ".png"))
    fits = name.path.suffix.lower() in (VIDEOS if video else PICTURES)
    if video and SEQUENCE.search(name.path.name):
        fits = name.path.suffix.lower() in PICTURES
    if not fits:
        stem, shown = name.path.stem, str(name.path)
        if video:
            hint = f"Name it {stem}.mp4 ({', '.join(VIDEOS[1:])}), or {stem}-%04d.png for its frames."
            raise BadRequest(f"{shown!r} is no name for a video, which this model makes.", hint)
        raise BadRequest(f"{shown!r} is a video's name; this model makes pictures.", f"Name it {stem}.png.")
    return name


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


def write(
    job: Job, tensors: Sequence[Tensor], names: Sequence[Name], metadata: bool = True
) -> tuple[list[Path], list[BadRequest]]:
    """Write a job's pictures or videos; return the files that were written, and why others were not."""
    from protocol.client.picture_files import metadata_of, to_images
    from protocol.client.video_files import save_made, sound_of

    images = to_images(pictures_among(tensors))
    written: list[Path] = []
    errors: list[BadRequest] = []
    for name in names:
        told = metadata_of(job.recipe, job.id, name.index, job.records) if metadata else None
        try:
            save_made(images, name.index, name.path, job.recipe, told, sound_of(tensors, name.index))
            written.append(name.path)
        except BadRequest as error:
            errors.append(error)
    return written, errors
