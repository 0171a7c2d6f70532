"""`logs`: the processes' logs, merged in order of time."""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import click

from orchestrator.cli.options import state_folder, state_option
from orchestrator.state_folder import StackFolder
from protocol.errors import NotFound
from protocol.stages import STAGES
from protocol.visible import visible

STAMP = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ")
POLL_SECONDS = 0.2


@click.command()
@click.argument("stage", required=False, type=click.Choice([*STAGES, "orchestrator", "describer", "door"]))
@click.option("-f", "--follow", is_flag=True, help="Go on as lines come.")
@click.option("-n", "--lines", type=click.IntRange(0), default=100, show_default=True, help="The last N lines.")
@click.option("--job", help="Only lines of this job.")
@state_option
def logs(stage: str | None, follow: bool, lines: int, job: str | None, state: Path | None) -> None:
    """Show the log of a STAGE, or of all processes in order of time. Works without a running stack, too."""
    folder = StackFolder(state_folder(state)).logs
    files = sorted(logs_of(folder, stage))
    if not files and not follow:
        raise NotFound(f"There are no logs in {str(folder)!r}.", "Start a stack with 'triptych up', or give --state.")
    found = sorted((record for path in files for record in records(path)), key=lambda record: record[:24])
    chosen = [record for record in found if job is None or f"job={job} " in record]
    for record in chosen[-lines:] if lines else []:
        print(visible(record, keep="\n\t"))
    if follow:
        for line in following(folder, stage):
            if job is None or f"job={job} " in line:
                print(visible(line, keep="\n\t"), end="", flush=True)


def records(path: Path) -> Iterator[str]:
    """Lines, each with those that belong to it (tracebacks) and have no time of their own."""
    current: list[str] = []
    for line in path.read_text(errors="replace").splitlines():
        if STAMP.match(line) and current:
            yield "\n".join(current)
            current = []
        current.append(line)
    if current:
        yield "\n".join(current)


def logs_of(folder: Path, stage: str | None) -> list[Path]:
    """Return the logs of a stage's processes, whose model's name may stand before it; all for None."""
    return [path for path in folder.glob("*.log") if stage is None or stage in re.split(r"[-.]", path.name)]


def following(folder: Path, stage: str | None) -> Iterator[str]:
    """Lines as they come, in files that may only come to be."""
    files: dict[Path, TextIO] = {}
    for path in logs_of(folder, stage):
        files[path] = path.open(errors="replace")
        files[path].seek(0, os.SEEK_END)
    while True:
        for path in logs_of(folder, stage):
            file = files.get(path) or files.setdefault(path, path.open(errors="replace"))
            if os.fstat(file.fileno()).st_size < file.tell():  # it was put aside, and begins anew
                file.seek(0)
            while line := file.readline():
                yield line
        time.sleep(POLL_SECONDS)
