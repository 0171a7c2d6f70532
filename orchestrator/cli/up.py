"""`up`: a stack in the foreground."""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from orchestrator.cli.options import state_folder, state_option
from orchestrator.cli.plan_words import in_words
from orchestrator.cli.stack import place_of
from orchestrator.cli.stack_options import stack_config, stack_options
from orchestrator.cli.strays import strays
from orchestrator.settings import StackConfig
from orchestrator.state_folder import StackFolder
from orchestrator.supervisor.supervisor import Supervisor
from protocol.client.client import Client
from protocol.client.endpoints import published
from protocol.errors import NoStack, TriptychError
from protocol.job import JobRequest
from protocol.sockets import is_loopback_host
from protocol.visible import visible

POLL_SECONDS = 0.05
FIRST_PROMPT, LEAST_PRIORITY = "a large red circle", -1000
SLOW_SECONDS = 3.0  # without a word
FIRST_WORD_SECONDS, NEXT_WORD_SECONDS = 8.0, 60.0  # of a wait for the hub


@click.command()
@stack_options
@click.option(
    "--warm-up/--no-warm-up", default=None,
    help="Make a picture before any is asked for, so that compiling and learning are over. [default: with --compile]",
)  # fmt: skip
@click.option("--restore", is_flag=True, help="Begin with the last backup of the job database, in its place.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line once the stack is ready.")
@state_option
def up(state: Path | None, as_json: bool, restore: bool, warm_up: bool | None, **options: Any) -> None:
    """Start the orchestrator and the three stages' workers, and keep them running until Ctrl-C.

    With no options it runs the small demo model, which draws colored shapes and knows nothing else.

    \b
    triptych up
    triptych up --model black-forest-labs/FLUX.1-dev --optimize latency
    triptych up --config stack.toml --state ~/stacks/flux
    """
    folder = StackFolder(state_folder(state))
    config = stack_config(options)
    folder.create()
    if restore:
        go_back_to_backup(folder)
    os.umask(0o077)
    start = time.monotonic()
    names = [alone.model for alone in config.each().values()]
    with waiting_is_told(names) as arrived:
        looking = f"looking at {' and '.join(names)}: what it takes of memory and time (once for each size) …"
        with told_if_slow(looking):
            supervisor = Supervisor(folder, config, say)
        warms_up = supervisor.models[0].config.compile if warm_up is None else warm_up
        run_stack(Announcer(supervisor, as_json, start, arrived, warms_up))


@dataclass(frozen=True, slots=True)
class Announcer:
    """Says when a stack, begun at monotonic seconds `start`, is ready; `arrived` is called once models are loaded."""

    supervisor: Supervisor
    as_json: bool
    start: float
    arrived: Callable[[], None]
    warm_up: bool

    def run(self) -> None:
        """Say once when all workers have loaded their model, and made a first picture if they are to."""
        folder = self.supervisor.folder.path
        default, *others = self.supervisor.models
        wanted = sum(post.jobs for post in default.plan.posts)
        wait_for_stack(folder)
        with contextlib.suppress(TriptychError), Client(folder) as client:
            while not all_here(client, default.name, wanted):
                time.sleep(POLL_SECONDS)
            self.arrived()
            seconds = time.monotonic() - self.start
            say(f'ready after {seconds:.1f} s. In another terminal: triptych submit "a large red circle" -o circle.png')
            if not wanted:
                say("no worker runs here; jobs wait for those of other hosts, or that are started by hand")
            if self.supervisor.http_url:
                say(f"by HTTP: {self.supervisor.http_url}{who_comes(self.supervisor.config)}")
            for model in others:
                say(f"{model.name} starts when a job asks for it: triptych submit --model {model.name} …")
            if told := strays(client):
                say(told)
            if self.warm_up:
                make_first(client, default.config)
            if self.as_json:
                seconds = time.monotonic() - self.start
                said = {"state": str(folder), "clients": published(folder).clients, "seconds": seconds}
                if self.supervisor.http_url:
                    said["http"] = self.supervisor.http_url
                print(json.dumps(said), flush=True)


def who_comes(config: StackConfig) -> str:
    """Return what a person must know of who comes in by HTTP; nothing where that is this machine's users."""
    if not config.http_needs_keys:
        return ""
    plain = (
        ""
        if is_loopback_host(config.http_host) or config.http_certificate
        else "; it travels unencrypted (--http-certificate)"
    )
    return f"; whoever comes needs a key: triptych keys new NAME --http{plain}"


def all_here(client: Client, model: str, wanted: int) -> bool:
    """Return whether a model has so many workers that have loaded, or rests already; the supervisor must be known."""
    found = client.workers()
    here = {place_of(process) for process in found.processes if process.model == model}
    loaded = sum(worker.state != "loading" and place_of(worker) in here for worker in found.workers)
    rests = any(view.resting for view in client.models() if view.name == model)
    return bool(found.processes) and (loaded >= wanted or rests)


def make_first(client: Client, config: StackConfig) -> None:
    """Make a picture that nobody has asked for, after all that somebody has."""
    request = JobRequest(
        prompt=FIRST_PROMPT, priority=LEAST_PRIORITY, width=config.width, height=config.height, steps=config.steps,
        cfg_scale=config.cfg_scale, frames=config.frames,
    )  # fmt: skip
    say("making a first picture, of the size that is planned for: it compiles, and learns what tasks take …")
    start = time.monotonic()
    try:
        client.wait(client.submit(request).id)
        say(f"made it in {time.monotonic() - start:.1f} s; the next ones take no longer than they must")
    except TriptychError as error:  # it takes none without a picture, say
        say(f"made none: {error}")


def run_stack(announcer: Announcer) -> None:
    """Say what a stack does and run it."""
    supervisor = announcer.supervisor
    folder, models = supervisor.folder, supervisor.models
    threading.Thread(target=announcer.run, daemon=True).start()
    names = " and ".join(model.config.model for model in models)
    say(f"Triptych on {names}, state in {folder.path}. Stop with Ctrl-C.")
    for model in models:
        prefix = f"{model.name}: " if len(models) > 1 else ""
        for line in in_words(model.plan.plan) if model.plan.plan else [model.plan.unplanned]:
            if line:
                say(prefix + line)
    supervisor.run()


def go_back_to_backup(folder: StackFolder) -> None:
    """Put the last backup in the place of the job database, which is kept beside it."""
    from orchestrator.storage.database import restore

    with folder.lock("supervisor"), folder.lock("orchestrator"):
        made = time.time() - folder.backup.stat().st_mtime if folder.backup.exists() else 0
        aside = restore(folder.database, folder.backup)
    say(f"went back to a backup of {made / 60:.0f} minutes ago" + (f"; what was there is {aside}" if aside else ""))


def say(line: str) -> None:
    print(f"triptych: {visible(line)}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def waiting_is_told(models: Sequence[str], quiet: bool = False) -> Iterator[Callable[[], None]]:
    """Say now and then that models from the hub are waited for, until the block ends or what it gets is called."""
    over = threading.Event()

    def tell() -> None:
        pause = FIRST_WORD_SECONDS
        while not over.wait(pause):
            pause = NEXT_WORD_SECONDS
            say(f"still waiting for {' and '.join(hub)}: files are looked up at the hub, or downloaded "
                "(HF_HUB_OFFLINE=1 uses those that are here; 'triptych pull' shows a download's progress)")  # fmt: skip

    hub = [model for model in models if "/" in model and not os.path.exists(os.path.expanduser(model))]
    if hub and not quiet:
        threading.Thread(target=tell, daemon=True, name="waiting").start()
    try:
        yield over.set
    finally:
        over.set()


@contextlib.contextmanager
def told_if_slow(line: str) -> Iterator[None]:
    """Say a line once the block has taken some seconds."""
    timer = threading.Timer(SLOW_SECONDS, say, [line])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def wait_for_stack(folder: Path) -> None:
    """Wait until the orchestrator has said where it listens."""
    while True:
        with contextlib.suppress(NoStack):
            published(folder)
            return
        time.sleep(POLL_SECONDS)
