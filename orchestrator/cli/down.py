"""`down`: the end of a stack, and of what it has started on other hosts."""

import fcntl
import importlib.util
import os
import signal
import sys
import time
from pathlib import Path

import click

from orchestrator.cli.options import state_folder, state_option
from protocol.client.endpoints import no_stack
from protocol.errors import BadRequest, WaitTimeout

PATIENCE_SECONDS = 60.0
POLL_SECONDS = 0.05


@click.command()
@click.option(
    "--ray", metavar="auto|HOST:PORT", help="End what a stack that died has left on the hosts of a Ray cluster, too."
)  # fmt: skip
@state_option
def down(ray: str | None, state: Path | None) -> None:
    """Stop the running stack in good order, its workers on other hosts, too. Its jobs wait for the next 'up'."""
    folder = state_folder(state)
    running = end(folder)
    if running:
        print("The stack has stopped.", file=sys.stderr)
    if ray is not None:
        if importlib.util.find_spec("ray") is None:
            raise BadRequest("--ray needs ray, which is not installed.", "pip install 'triptych[ray]'")
        from orchestrator.ray_launcher.launcher import end_leftovers

        found = end_leftovers(folder, ray)
        print(f"{len(found)} actors of this stack's have ended.", file=sys.stderr)
    elif not running:
        raise no_stack(f"in {str(folder)!r}")


def end(folder: Path) -> bool:
    """Stop the stack in a folder, and wait until it has ended; return whether there was one. WaitTimeout."""
    lock = folder / "supervisor.lock"
    if not lock.exists() or not is_held(lock):
        return False
    owner = lock.read_text().strip()
    if owner.isdigit():
        os.kill(int(owner), signal.SIGTERM)
    until = time.monotonic() + PATIENCE_SECONDS
    while is_held(lock):
        if time.monotonic() > until:
            raise WaitTimeout(f"The stack, process {owner}, has not stopped yet.", "Look at: triptych logs")
        time.sleep(POLL_SECONDS)
    return True


def is_held(lock: Path) -> bool:
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
