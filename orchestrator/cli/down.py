"""`down`: the end of a stack, and of what it has started on other hosts."""

import sys
from pathlib import Path

import click

from orchestrator.cli.options import state_folder, state_option
from orchestrator.state_folder import end_stack
from orchestrator.supervisor.ray_process import check_installed
from protocol.client.endpoints import no_stack


@click.command()
@click.option(
    "--ray", metavar="auto|HOST:PORT", help="End what a stack that died has left on the hosts of a Ray cluster, too."
)  # fmt: skip
@state_option
def down(ray: str | None, state: Path | None) -> None:
    """Stop the running stack in good order, its workers on other hosts, too. Its jobs wait for the next 'up'."""
    folder = state_folder(state)
    running = end_stack(folder)
    if running:
        print("The stack has stopped.", file=sys.stderr)
    if ray is not None:
        check_installed()
        from orchestrator.ray_launcher.launcher import end_leftovers

        found = end_leftovers(folder, ray)
        print(f"{len(found)} actors of this stack's have ended.", file=sys.stderr)
    elif not running:
        raise no_stack(f"in {str(folder)!r}")
