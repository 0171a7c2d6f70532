"""`run`: a stack of its own for as long as it takes."""

import contextlib
import os
import shutil
import signal
import stat
import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import click

from orchestrator.cli.options import (
    Asked,
    json_option,
    quiet_option,
    recipe_options,
    requests_from,
    state_option,
    timeout_option,
)
from orchestrator.cli.output import Names
from orchestrator.cli.stack_options import stack_config, stack_options
from orchestrator.cli.submit import make, names_for_requests, output_options
from orchestrator.cli.up import wait_for_stack, waiting_is_told
from orchestrator.state_folder import StackFolder
from orchestrator.supervisor.supervisor import Supervisor
from protocol.client.client import Client
from protocol.errors import BadRequest, Interrupted, TriptychError

ANSWER_SECONDS = 30.0
SCRATCH = "triptych-run-"  # how the folders of such stacks begin, in the system's folder for temporary files


@click.command()
@click.argument("prompts", nargs=-1)
@recipe_options
@output_options
@timeout_option
@json_option
@quiet_option
@state_option
@stack_options
def run(prompts: tuple[str, ...], **options: Any) -> None:
    """Make pictures of PROMPTS without a running stack: start one, make them, stop it.

    The default model is a small demo that draws colored shapes at 128x128; it knows nothing else. For real pictures
    give --model: FLUX.1-schnell (Apache-2.0) or FLUX.1-dev (non-commercial licence), both of Black Forest Labs.

    \b
    triptych run "a large red circle at the top left and a small blue star on a yellow background"
    triptych run "a lighthouse in a storm" --model black-forest-labs/FLUX.1-schnell --steps 4
    """
    options |= {"no_wait": False, "kept": options["state"] is not None}
    asked = requests_from(prompts, options)
    names = names_for_requests(asked, options)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    if options["controlnet_alias"] or options["refiner_alias"]:
        raise BadRequest("A single run has nothing to choose among.", "Name it: --controlnet MODEL or --refiner MODEL.")
    if not options["quiet"]:
        print("Starting a stack …", file=sys.stderr, flush=True)
    with waiting_is_told(options["model"], options["quiet"]):
        if options["state"] is not None:
            make_pictures(options["state"], asked, names, options)
            return
        remove_left_behind()
        with tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch:
            make_pictures(Path(scratch), asked, names, options)


def end(number: int, frame: FrameType | None) -> None:
    """Raise Interrupted at a signal that comes before the supervisor heeds signals."""
    raise Interrupted(number)


def remove_left_behind() -> None:
    """Remove the folders of runs that were killed: ours by name and owner, with a lock that nobody holds."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SCRATCH}????????"):
        with contextlib.suppress(OSError, TriptychError):
            status = folder.lstat()
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and (folder / "supervisor.lock").is_file():
                with StackFolder(folder).lock("supervisor"):
                    shutil.rmtree(folder)


class Errand(threading.Thread):
    """The client's part, beside the supervisor, which needs the main thread for its signals."""

    def __init__(
        self, supervisor: Supervisor, folder: Path, asked: list[Asked], names: Names, options: dict[str, Any]
    ) -> None:
        super().__init__(daemon=True, name="client")
        self._supervisor, self._folder, self._asked, self._names = supervisor, folder, asked, names
        self._options = options
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            wait_for_stack(self._folder)
            with Client(self._folder, timeout=ANSWER_SECONDS) as client:
                make(client, self._asked, self._names, self._options)
        except BaseException as error:
            self.error = error
        self._supervisor.stop()


def make_pictures(folder: Path, asked: list[Asked], names: Names, options: dict[str, Any]) -> None:
    stack = StackFolder(folder)
    stack.create()
    supervisor = Supervisor(stack, stack_config(options), lambda line: None)
    errand = Errand(supervisor, folder, asked, names, options)
    errand.start()
    if number := supervisor.run():
        raise Interrupted(number)
    if errand.error:
        raise errand.error
