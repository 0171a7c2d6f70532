"""`up`: a stack in the foreground."""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from orchestrator.cli.options import state_folder, state_option
from orchestrator.cli.plan_words import in_words
from orchestrator.cli.stack_options import stack_config, stack_options
from orchestrator.cli.strays import strays
from orchestrator.state_folder import StackFolder
from orchestrator.supervisor.supervisor import Supervisor
from protocol.client.client import Client
from protocol.client.endpoints import published
from protocol.errors import NoStack, TriptychError
from protocol.visible import visible

POLL_SECONDS = 0.05
SLOW_SECONDS = 3.0  # without a word
FIRST_WORD_SECONDS, NEXT_WORD_SECONDS = 8.0, 60.0  # of a wait for the hub


@click.command()
@stack_options
@click.option("--restore", is_flag=True, help="Begin with the last backup of the job database, in its place.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line once the stack is ready.")
@state_option
def up(state: Path | None, as_json: bool, restore: bool, **options: Any) -> None:
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
    with waiting_is_told(config.model) as arrived:
        with told_if_slow(f"looking at {config.model}: what it takes of memory and time (once for each size) …"):
            supervisor = Supervisor(folder, config, say)
        run_stack(supervisor, as_json, start, arrived)


def run_stack(supervisor: Supervisor, as_json: bool, start: float, arrived: Callable[[], None]) -> None:
    """Say what a stack does and run it; `arrived` is called once its workers have loaded their model.

    It was begun at monotonic seconds `start`.
    """
    folder, config, plan = supervisor.folder, supervisor.config, supervisor.plan
    wanted = sum(post.jobs for post in plan.posts)
    threading.Thread(target=announce_ready, args=(folder.path, wanted, as_json, start, arrived), daemon=True).start()
    say(f"Triptych on {config.model}, state in {folder.path}. Stop with Ctrl-C.")
    if plan.plan:
        for line in in_words(plan.plan):
            say(line)
    elif plan.unplanned:
        say(plan.unplanned)
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
def waiting_is_told(model: str | None, quiet: bool = False) -> Iterator[Callable[[], None]]:
    """Say now and then that a model from the hub is waited for, until the block ends or what it gets is called."""
    over = threading.Event()

    def tell() -> None:
        pause = FIRST_WORD_SECONDS
        while not over.wait(pause):
            pause = NEXT_WORD_SECONDS
            say(f"still waiting for {model}: its files are looked up at the hub, or downloaded (HF_HUB_OFFLINE=1 uses "
                "only those that are here; --debug and 'triptych logs' say more)")  # fmt: skip

    if model and not quiet and "/" in model and not os.path.exists(os.path.expanduser(model)):
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


def announce_ready(folder: Path, wanted: int, as_json: bool, start: float, arrived: Callable[[], None]) -> None:
    """Say once when so many workers have loaded their model."""
    wait_for_stack(folder)
    with contextlib.suppress(TriptychError), Client(folder) as client:
        while sum(worker.state != "loading" for worker in client.workers().workers) < wanted:
            time.sleep(POLL_SECONDS)
        arrived()
        seconds = time.monotonic() - start
        say(f'ready after {seconds:.1f} s. In another terminal: triptych submit "a large red circle" -o circle.png')
        if told := strays(client):
            say(told)
        if as_json:
            print(
                json.dumps({"state": str(folder), "clients": published(folder).clients, "seconds": seconds}), flush=True
            )
