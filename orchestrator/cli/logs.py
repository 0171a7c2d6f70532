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
from protocol.visible import visible

STAMP = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ")
POLL_SECONDS = 0.2


@click.command()
@click.argument("name", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on as lines come.")
@click.option("-n", "--lines", type=click.IntRange(0), default=100, show_default=True, help="The last N lines.")
@click.option("--job", help="Only lines of this job.")
@state_option
def logs(name: str | None, follow: bool, lines: int, job: str | None, state: Path | None) -> None:
    """Show the log of NAME, or of all processes in order of time. Works without a running stack, too.

    NAME is a stage, a process (orchestrator, describer, door, http) or another host.
    """
    folder = StackFolder(state_folder(state)).logs
    files = sorted(logs_of(folder, name))
    if name and not files and (there := names_in(folder)):
        raise NotFound(f"There is no log of {name!r}.", f"There are logs of {', '.join(there)}.")
    if not files and not follow:
        raise NotFound(f"There are no logs in {str(folder)!r}.", "Start a stack with 'triptych up', or give --state.")
    found = sorted((record for path in files for record in records(path)), key=lambda record: record[:24])
    chosen = [record for record in found if job is None or f"job={job} " in record]
    for record in chosen[-lines:] if lines else []:
        print(visible(record, keep="\n\t"))
    if follow:
        for line in following(folder, name):
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


def logs_of(folder: Path, name: str | None) -> list[Path]:
    """Return the logs of a stage's or host's processes, whose model's name may stand before it; all for None."""
    return [path for path in folder.glob("*.log") if name is None or name in parts_of(path)]


def parts_of(path: Path) -> list[str]:
    """Return the parts of a process's name, as in [MODEL-]STAGE-NUMBER[@HOST]; and the whole of it."""
    process, _, host = path.name.removesuffix(".log").partition("@")
    return [path.name.removesuffix(".log"), host, *process.split("-")]


def names_in(folder: Path) -> list[str]:
    """Return the names by which there are logs: stages, processes without their numbers, and hosts."""
    found = {part for path in folder.glob("*.log") for part in parts_of(path)[1:]}
    return sorted(part for part in found if part and not part.isdigit())


def following(folder: Path, name: str | None) -> Iterator[str]:
    """Lines as they come, in files that may only come to be."""
    files: dict[Path, TextIO] = {}
    for path in logs_of(folder, name):
        files[path] = path.open(errors="replace")
        files[path].seek(0, os.SEEK_END)
    while True:
        for path in logs_of(folder, name):
            file = files.get(path) or files.setdefault(path, path.open(errors="replace"))
            if os.fstat(file.fileno()).st_size < file.tell():  # it was put aside, and begins anew
                file.seek(0)
            while line := file.readline():
                yield line
        time.sleep(POLL_SECONDS)
