"""`top`: what the stack does, again and again, until Ctrl-C."""

import time
from pathlib import Path

import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orchestrator.cli.options import state_folder, state_option
from orchestrator.gpu_driver import label_of
from protocol.client.client import Client
from protocol.errors import NoStack
from protocol.job import JOB_STATES
from protocol.messages.client import Stack, Workers
from protocol.metrics import Metric
from protocol.stages import STAGES
from protocol.units import format_bytes
from protocol.views import GpuView, WorkerView

BAR = 40  # characters of a GPU's bar
COLORS = {"text": "blue", "denoise": "red", "vae": "green"}


@click.command()
@click.option("--interval", type=click.FloatRange(min=0.1), default=1.0, show_default=True, help="Seconds.")
@click.option("--once", is_flag=True, help="Print it once, and end.")
@state_option
def top(state: Path | None, interval: float, once: bool) -> None:
    """Show GPUs, workers, jobs and their pace, until Ctrl-C."""
    console = Console()
    with Client(state_folder(state)) as client:
        if once:
            console.print(picture(client))
            return
        with Live(picture(client), console=console, auto_refresh=False, screen=console.is_terminal) as live:
            while True:
                time.sleep(interval)
                try:
                    live.update(picture(client), refresh=True)
                except NoStack as error:  # it may be started again
                    live.update(Text(str(error)), refresh=True)


def picture(client: Client) -> Group:
    stack, workers, counted = client.stack(), client.workers(), client.metrics()
    bars = [bar(gpu, workers) for gpu in workers.gpus]
    return Group(jobs_line(stack), pace_line(counted), *bars, table(workers))


def jobs_line(stack: Stack) -> Text:
    counts = dict(stack.counts)
    return Text("jobs: " + (", ".join(f"{counts[s]} {s}" for s in JOB_STATES if counts.get(s)) or "none"))


def pace_line(counted: list[Metric]) -> Text:
    """Say how long stages take, jobs wait, and what was recovered, swapped and streamed since the start."""
    by_name = {metric.name: metric for metric in counted}
    said = []
    for stage in STAGES:
        samples = [sample for sample in by_name["stage_seconds"].samples if sample.labels[0] == stage]
        if count := sum(sum(sample.counts) for sample in samples):
            said.append(f"{stage} {sum(sample.value for sample in samples) / count:.2f} s")
    for sample in by_name["queue_wait_seconds"].samples:
        if count := sum(sample.counts):
            said.append(f"wait {sample.value / count:.1f} s")
    totals = {name: sum(sample.value for sample in by_name[f"{name}_total"].samples) for name in
              ("recoveries", "swaps", "streamed_bytes", "cached_prompts")}  # fmt: skip
    said += [f"{totals['recoveries']:.0f} recoveries", f"{totals['swaps']:.0f} swaps"]
    said += [f"{format_bytes(int(totals['streamed_bytes']))} streamed", f"{totals['cached_prompts']:.0f} prompts known"]
    return Text("since the start, on average: " + ", ".join(said))


def bar(gpu: GpuView, workers: Workers) -> Text:
    """Return a GPU as a bar of its leases."""
    line = Text(f"GPU {label_of(gpu.host, gpu.index)} ")
    free, words = BAR, []
    for worker in (worker for worker in workers.workers if gpu.has(worker)):
        size = held(worker, gpu.index)
        cells = min(free, round(BAR * size / gpu.budget))
        free -= cells
        line.append("█" * cells, COLORS[worker.stage])
        words.append(f"{worker.name} {format_bytes(size)}")
    line.append("·" * free)
    used = "" if gpu.used is None else f" {format_bytes(gpu.used)} in use of"
    return line.append(f"{used} {format_bytes(gpu.budget)}: {', '.join(words)}")


def held(worker: WorkerView, gpu: int) -> int:
    place = worker.gpus.index(gpu)
    return sum(sizes[place] for sizes in (worker.lease_bytes, worker.context_bytes) if place < len(sizes))


def table(workers: Workers) -> Table:
    found = Table(box=None, pad_edge=False)
    for name in ("worker", "state", "job", "done", "weights"):
        found.add_column(name)
    for worker in workers.workers:
        parts = ", ".join(
            f"{part.component} {part.state} {format_bytes(part.device_bytes)}" for part in worker.residency
        )
        found.add_row(worker.name, worker.state, worker.job or "", str(worker.done), parts)
    return found
