"""`jobs`, `show`, `cancel` and `gc`."""

import json
import sys
import time
from pathlib import Path

import click

from orchestrator.cli.options import json_option, quiet_option, state_folder, state_option
from orchestrator.cli.strays import wanting
from orchestrator.cli.table import print_table
from protocol.client import Client
from protocol.jobs import JOB_STATES, Job, JobState
from protocol.units import format_bytes, parse_seconds


@click.command()
@click.argument("states", nargs=-1, type=click.Choice(JOB_STATES))
@click.option("--failed", is_flag=True, help="The same as the state 'failed'.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@json_option
@quiet_option
@state_option
def jobs(
    states: tuple[JobState, ...], failed: bool, limit: int, as_json: bool, quiet: bool, state: Path | None
) -> None:
    """List the newest jobs, newest first, or those in STATES."""
    if failed:
        states = (*states, "failed")
    with Client(state_folder(state)) as client:
        found = client.jobs(states, limit)
        counts = dict(client.stack().counts)
    if as_json:
        print(json.dumps([job.model_dump(mode="json") for job in found]))
    elif quiet:
        print("\n".join(job.id for job in found))
    else:
        rows = [[job.id, where(job), age(job.created), size(job), " ".join(job.recipe.prompt.split())] for job in found]
        print_table(("job", "state", "age", "size", "prompt"), rows, wide=4)
        print(", ".join(f"{count} {name}" for name, count in counts.items()) or "No jobs yet.", file=sys.stderr)


def where(job: Job) -> str:
    return f"denoise {job.step}/{job.recipe.steps}" if job.state == "denoise" and job.step else job.state


def size(job: Job) -> str:
    count = f" ×{job.recipe.num_images}" if job.recipe.num_images > 1 else ""
    return f"{job.recipe.width}x{job.recipe.height}{count}"


def age(since: float) -> str:
    seconds = max(0, int(time.time() - since))
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


@click.command()
@click.argument("job_ids", nargs=-1, required=True, metavar="JOB...")
@json_option
@state_option
def show(job_ids: tuple[str, ...], as_json: bool, state: Path | None) -> None:
    """Show everything about JOBs: recipe, stages, times, workers, reasons of failures."""
    with Client(state_folder(state)) as client:
        found = [client.job(job_id) for job_id in job_ids]
        workers = client.workers().workers
    if as_json:
        print(json.dumps([job.model_dump(mode="json") for job in found]))
        return
    for job in found:
        print("\n".join(describe(job)))
        if wanted := wanting(job, workers):
            print(f"  waits: no worker of this stack is what it was accepted for ({wanted})")


def describe(job: Job) -> list[str]:
    took = f", {job.finished - job.created:.2f} s after it came" if job.finished else ""
    lines = [f"job {job.id}: {where(job)}{took}"]
    lines += [f"  {name}: {value}" for name, value in job.recipe.model_dump().items() if value is not None]
    for record in job.records:
        how = (
            "from the cache"
            if record.cached
            else f"{record.seconds:.3f} s by {record.worker}, attempt {record.attempt}"
        )
        lines.append(f"  {record.stage}: {how}")
        lines += [f"    warning: {warning}" for warning in record.warnings]
    lines += [f"  failed: {reason}" for reason in job.reasons]
    return lines


@click.command()
@click.argument("job_ids", nargs=-1, required=True, metavar="JOB...")
@json_option
@quiet_option
@state_option
def cancel(job_ids: tuple[str, ...], as_json: bool, quiet: bool, state: Path | None) -> None:
    """Cancel JOBs; one that is being denoised stops at its next step."""
    with Client(state_folder(state)) as client:
        found = client.cancel(*job_ids)
    if as_json:
        print(json.dumps([job.model_dump(mode="json") for job in found]))
    else:
        print("\n".join(job.id if quiet else f"{job.id} {job.state}" for job in found))


@click.command()
@click.option("--older-than", default="7d", show_default=True, metavar="30d", help="Since they ended: 30d, 12h, 0.")
@state_option
def gc(older_than: str, state: Path | None) -> None:
    """Remove jobs that ended long ago, with their pictures. A stack does so by itself after --keep-jobs (30 days)."""
    seconds = parse_seconds(older_than)
    with Client(state_folder(state)) as client:
        count, size = client.collect_garbage(int(seconds))
    print(f"{count} jobs removed, {format_bytes(size)} freed.", file=sys.stderr)
