"""`join`: this machine's GPUs for a stack on another one, in the foreground."""

import os
import sys
from pathlib import Path

import click

from orchestrator.cli.up import say
from orchestrator.state_folder import StackFolder
from orchestrator.supervisor.host_agent import ENDED_WITH_STACK, HostAgent
from protocol.client.endpoints import default_folder
from protocol.curve_keys import load
from protocol.errors import BadRequest
from protocol.process import end_with_parent
from protocol.sockets import check_endpoint
from protocol.units import parse_seconds


@click.command()
@click.argument("key", type=click.Path(path_type=Path), metavar="KEYFILE")
@click.option(
    "--folder", type=click.Path(path_type=Path), metavar="DIR",
    help="Where logs and LoRAs lie on this machine. [default: triptych-NAME in your state folder]",
)  # fmt: skip
@click.option(
    "--alone", default="10m", show_default=True, metavar="10m", help="End the workers here after so long without a "
    "word of the stack.",
)  # fmt: skip
@click.option("--once", is_flag=True, help="End with the stack, rather than to wait for its next start.")
def join(key: Path, folder: Path | None, alone: str, once: bool) -> None:
    """Let this machine's GPUs work for the stack that KEYFILE is for, until Ctrl-C.

    The stack says which workers run here, watches and restarts them. The models must lie here, too, and the same
    versions of the libraries. On the stack's host:

    \b
    triptych keys new box --role host --endpoint tcp://my-host:5556
    triptych up --listen-workers tcp://0.0.0.0:5556
    """
    peer = load(key)
    if peer.role != "host":
        raise BadRequest(f"{str(key)!r} is a {peer.role}'s key.", "'triptych keys new NAME --role host' makes one.")
    check_endpoint(peer.endpoint, secured=True)
    seconds = parse_seconds(alone)
    place = StackFolder(folder or default_folder().with_name(f"triptych-{peer.name}"))
    place.create()
    os.umask(0o077)
    end_with_parent()
    say(f"{peer.name} joins the stack at {peer.endpoint}; logs in {place.logs}. Stop with Ctrl-C.")
    agent = HostAgent(place, peer, key, seconds, say, once)
    if agent.run() == 0:
        sys.exit(ENDED_WITH_STACK)
