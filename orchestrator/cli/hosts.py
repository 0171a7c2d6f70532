"""`hosts`: the other hosts of a stack."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from orchestrator.cli.options import json_option, quiet_option, state_folder, state_option
from orchestrator.cli.table import print_lines, print_table
from protocol.client.client import Client
from protocol.messages.client import Workers
from protocol.units import format_bytes
from protocol.views import HostView, Placing, ProcessView


@click.group(invoke_without_command=True)
@json_option
@quiet_option
@state_option
@click.pass_context
def hosts(context: click.Context, as_json: bool, quiet: bool, state: Path | None) -> None:
    """List the stack's other hosts: their GPUs, what of those is leased, their workers, versions and health.

    \b
    triptych keys new box --role host      (there: triptych join box.key)
    triptych hosts drain box               (before its machine is switched off)
    """
    if context.invoked_subcommand:
        return
    with Client(state_folder(state)) as client:
        found, workers = client.hosts(), client.workers()
    if as_json:
        print(json.dumps([host.model_dump(mode="json") for host in found]))
        return
    if quiet:
        print_lines([host.name for host in found])
        return
    header = ("name", "state", "host", "workers", "GPUs", "leased", "models", "memory", "versions")
    print_table(header, [row(host, workers) for host in found], wide=8)
    for line in troubles(found, workers.processes):
        print(line, file=sys.stderr)
    if not found:
        print("There are no others: 'triptych keys new NAME --role host' makes a key for one.", file=sys.stderr)


def row(host: HostView, found: Workers) -> list[str]:
    mine = [worker for worker in found.workers if worker.host == host.name]
    ready = sum(worker.state != "loading" for worker in mine)
    gpus = ", ".join(f"{gpu.name} {format_bytes(gpu.total_bytes)}" for gpu in host.facts.gpus) or "none"
    budget = sum(gpu.budget for gpu in found.gpus if gpu.host == host.name)
    leased = sum(size for worker in mine for size in worker.lease_bytes)
    state = f"{host.state}, {host.placing}" if host.placing else host.state
    return [
        host.name, state, host.facts.hostname, f"{ready} of {host.workers}", gpus,
        f"{format_bytes(leased)} of {format_bytes(budget)}" if budget else "-",
        ", ".join(sorted({Path(worker.model).name for worker in mine})) or "-",
        format_bytes(host.facts.memory_bytes), host.facts.versions,
    ]  # fmt: skip


def troubles(found: Sequence[HostView], processes: Sequence[ProcessView]) -> list[str]:
    """Return in words what keeps hosts from working."""
    told = [f"{host.name} is refused: {host.reason}" for host in found if host.reason]
    told += [f"{host.name} was heard last {host.heard:.0f} s ago" for host in found if host.state == "silent"]
    ends = tuple(f"@{host.name}" for host in found)
    down = [process for process in processes if process.name.endswith(ends) and process.state == "waiting"]
    return told + [f"{process.name} is down: {process.reason}" for process in down if process.reason]


def place(name: str, placing: Placing, state: Path | None) -> None:
    with Client(state_folder(state)) as client:
        client.place_on_host(name, placing)


@hosts.command()
@click.argument("name")
@state_option
def cordon(name: str, state: Path | None) -> None:
    """Give the workers of host NAME nothing new to do; what they have they finish."""
    place(name, "cordoned", state)
    print(f"{name} gets nothing new to do; let it work again with: triptych hosts resume {name}", file=sys.stderr)


@hosts.command()
@click.argument("name")
@state_option
def drain(name: str, state: Path | None) -> None:
    """End the workers of host NAME; their tasks go on elsewhere, from their checkpoints."""
    place(name, "drained", state)
    print(f"The workers of {name} end; let it work again with: triptych hosts resume {name}", file=sys.stderr)


@hosts.command()
@click.argument("name")
@state_option
def resume(name: str, state: Path | None) -> None:
    """Let host NAME work again."""
    place(name, "", state)
    print(f"{name} works again.", file=sys.stderr)
