"""`run`: a stack of its own for as long as it takes."""

import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import click

from orchestrator.cli.options import json_option, quiet_option, recipe_options, requests_from, state_option
from orchestrator.cli.output import check_output
from orchestrator.cli.submit import make, output_option, timeout_option
from orchestrator.cli.up import stack_config, stack_options, wait_for_stack
from orchestrator.folder import StackFolder
from orchestrator.supervisor import Supervisor
from protocol.client import Client
from protocol.jobs import JobRequest

ANSWER_SECONDS = 30.0


@click.command()
@click.argument("prompts", nargs=-1)
@recipe_options
@output_option
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
    requests = requests_from(prompts, options)
    check_output(options["output"])
    if not options["quiet"]:
        print("Starting a stack …", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="triptych-") as scratch:
        make_pictures(options["state"] or Path(scratch), requests, options)


class Errand(threading.Thread):
    """The client's part, beside the supervisor, which needs the main thread for its signals."""

    def __init__(
        self, supervisor: Supervisor, folder: Path, requests: list[JobRequest], options: dict[str, Any]
    ) -> None:
        super().__init__(daemon=True, name="client")
        self._supervisor, self._folder, self._requests, self._options = supervisor, folder, requests, options
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            wait_for_stack(self._folder)
            with Client(self._folder, timeout=ANSWER_SECONDS) as client:
                make(client, self._requests, {**self._options, "no_wait": False})
        except BaseException as error:
            self.error = error
        self._supervisor.stop()


def make_pictures(folder: Path, requests: list[JobRequest], options: dict[str, Any]) -> None:
    stack = StackFolder(folder)
    stack.create()
    supervisor = Supervisor(stack, stack_config(options), lambda line: None)
    errand = Errand(supervisor, folder, requests, options)
    errand.start()
    if supervisor.run() == signal.SIGINT:
        raise KeyboardInterrupt
    if errand.error:
        raise errand.error
