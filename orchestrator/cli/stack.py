"""`workers`, `restart`, `drain` and `scale`."""

import json
import sys
import time
from pathlib import Path
from typing import get_args

import click

from orchestrator.cli.jobs import age
from orchestrator.cli.options import json_option, quiet_option, state_folder, state_option
from orchestrator.cli.table import print_table
from protocol.client.client import Client
from protocol.client.endpoints import published
from protocol.errors import BadRequest
from protocol.messages.client import Workers
from protocol.stages import STAGES, Stage
from protocol.units import format_bytes
from protocol.views import ComponentView, ProcessView, WorkerView

POLL_SECONDS = 0.1


@click.command()
@click.option("--map", "device_map", is_flag=True, help="Show which module lies on which device.")
@json_option
@quiet_option
@state_option
def workers(device_map: bool, as_json: bool, quiet: bool, state: Path | None) -> None:
    """Show the workers: what they do, where they run, and why one was restarted."""
    with Client(state_folder(state)) as client:
        found = client.workers()
    if as_json:
        print(json.dumps(found.model_dump(mode="json", exclude={"request"})))
    elif quiet:
        print("\n".join(worker.name for worker in found.workers))
    elif device_map:
        print_table(
            ("worker", "module", "device"), [[w.name, *place] for w in found.workers for place in w.device_map], wide=1
        )
    else:
        print_table(
            ("worker", "state", "pid", "device", "dtype", "tasks", "memory", "up", "note"), table(found), wide=8
        )
        for stage in found.drained:
            print(f"{stage} is drained: triptych drain {stage} --off", file=sys.stderr)
        print(f"Workers may join at {published(state_folder(state)).workers}", file=sys.stderr)


def table(found: Workers) -> list[list[str]]:
    """The registered workers, then processes that have no worker to show."""
    processes = {place_of(process): process for process in found.processes if process.pid}
    rows = [row(worker, processes.get(place_of(worker))) for worker in sorted(found.workers, key=lambda w: w.name)]
    shown = {place_of(worker) for worker in found.workers}
    for process in found.processes:
        if process.stage is not None and place_of(process) not in shown:
            note = process.reason if process.state == "waiting" else "loading its libraries"
            rows.append([process.name, process.state, str(process.pid or "-"), "-", "-", "-", "-", "-", note])
    return rows


def place_of(one: WorkerView | ProcessView) -> tuple[str, int | None]:
    """Return where a process is: its host, empty for the stack's own, and its number there."""
    return one.name.partition("@")[2], one.pid


def row(worker: WorkerView, process: ProcessView | None) -> list[str]:
    state = f"busy with {worker.job}" if worker.job else worker.state
    memory = format_bytes(worker.gpu_bytes or worker.rss_bytes)
    notes = [weights(component) for component in worker.residency if component.state != "in" or worker.gpus]
    if worker.gpus:  # told of the first of several workers in a process
        notes = [lease(worker), *notes] if worker.lease_bytes else []
    if process and process.restarts:
        notes.append(f"restarted {process.restarts}×: {process.reason}")
    device = ", ".join(sorted({place for _, place in worker.device_map})) or worker.device
    return [
        worker.name,
        state,
        str(worker.pid),
        device,
        worker.dtype,
        str(worker.done),
        memory,
        age(worker.since),
        "; ".join(notes),
    ]


def lease(worker: WorkerView) -> str:
    """'holds 12.3 GB of GPU 0, and lends some for a moment'."""
    sizes = zip(worker.lease_bytes, worker.gpus, strict=True)
    held = ", ".join(f"{format_bytes(size)} of GPU {gpu}" for size, gpu in sizes)
    return f"holds {held}{', and lends some for a moment' if worker.lends else ''}"


def weights(component: ComponentView) -> str:
    """'transformer streamed, 14.9 GB of 23.8 GB on the device (swapped in 0.27 s)'."""
    swap = f" (swapped in {component.swap_seconds:.2f} s)" if component.swap_seconds else ""
    if component.state == "out":
        return f"{component.component} out, {format_bytes(component.total_bytes)}{swap}"
    held = f"{format_bytes(component.device_bytes)} of {format_bytes(component.total_bytes)} on the device"
    return f"{component.component} {component.state}, {held}{swap}"


@click.command()
@click.argument("stage", type=click.Choice(get_args(Stage)))
@state_option
def restart(stage: Stage, state: Path | None) -> None:
    """Restart the workers of STAGE, one after the other; the others go on with their tasks, and nothing is lost."""
    with Client(state_folder(state)) as client:
        client.restart(stage)
    print(f"Restarting {stage}.", file=sys.stderr)


@click.command()
@click.argument("stage", type=click.Choice(get_args(Stage)))
@click.option("--off", is_flag=True, help="Let it work again.")
@click.option("--no-wait", is_flag=True, help="Don't wait for the tasks that its workers have.")
@state_option
def drain(stage: Stage, off: bool, no_wait: bool, state: Path | None) -> None:
    """Give the workers of STAGE nothing more to do, and wait until they are free. Jobs wait for --off."""
    with Client(state_folder(state)) as client:
        client.drain(stage, on=not off)
        while not (off or no_wait) and any(w.job for w in client.workers().workers if w.stage == stage):
            time.sleep(POLL_SECONDS)
    print(f"{stage} {'works again' if off else 'is drained; let it work again with --off'}.", file=sys.stderr)


@click.command()
@click.argument("counts", nargs=-1, required=True, metavar="STAGE=N...")
@click.option("-m", "--model", metavar="NAME", help="Of one of several models. [default: the first one]")
@state_option
def scale(counts: tuple[str, ...], model: str | None, state: Path | None) -> None:
    """Change how many workers stages have, while the stack runs: triptych scale denoise=2 vae=0."""
    wanted: list[tuple[Stage, int]] = []
    for text in counts:
        name, _, number = text.partition("=")
        if name not in STAGES or not number.isdigit() or int(number) > 64:
            raise BadRequest(
                f"{text!r} is not right.", f"Write STAGE=N, with STAGE one of {', '.join(STAGES)} and N up to 64."
            )
        wanted.append((name, int(number)))
    with Client(state_folder(state)) as client:
        for stage, count in wanted:
            client.scale(stage, count, model)
            print(f"{stage}: {count}", file=sys.stderr)
