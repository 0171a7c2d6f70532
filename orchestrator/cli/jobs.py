"""`jobs`, `show`, `cancel` and `gc`."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click

from orchestrator.cli.display import prompt_line
from orchestrator.cli.options import json_option, quiet_option, state_folder, state_option
from orchestrator.cli.strays import wanting
from orchestrator.cli.table import print_lines, print_table
from protocol.client.client import Client
from protocol.errors import BadRequest
from protocol.job import ENDED, JOB_STATES, Job, JobState
from protocol.messages.common import MOST_LISTED
from protocol.units import format_bytes, parse_seconds
from protocol.visible import visible


@click.command()
@click.argument("states", nargs=-1, type=click.Choice(JOB_STATES))
@click.option("--failed", is_flag=True, help="The same as the state 'failed'.")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True)
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
        print_lines([job.id for job in found])
    else:
        rows = [[job.id, where(job), age(job.created), size(job), prompt_line(job)] for job in found]
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
@click.argument("job_ids", nargs=-1, metavar="JOB...")
@json_option
@state_option
def show(job_ids: tuple[str, ...], as_json: bool, state: Path | None) -> None:
    """Show everything about JOBs: recipe, stages, times, workers, reasons of failures."""
    with Client(state_folder(state)) as client:
        found = [client.job(job_id) for job_id in job_ids]
        workers, models = client.workers().workers, client.models()
    if as_json:
        print(json.dumps([job.model_dump(mode="json") for job in found]))
        return
    for job in found:
        print("\n".join(map(visible, describe(job))))
        if wanted := wanting(job, workers, models):
            print(f"  waits: no worker of this stack is what it was accepted for ({wanted})")


def told_loras(job: Job) -> str:
    return ", ".join(f"{lora.name}@{lora.weight:g} ({lora.digest[:12]})" for lora in job.recipe.loras)


def describe(job: Job) -> list[str]:
    took = f", {job.finished - job.created:.2f} s after it came" if job.finished else ""
    lines = [f"job {job.id}: {where(job)}{took}"]
    given = job.recipe.model_dump() | {"loras": told_loras(job)}
    lines += [f"  {name}: {value}" for name, value in given.items() if value not in (None, (), "")]
    for record in job.records:
        how = (
            "from the cache"
            if record.cached
            else f"{record.seconds:.3f} s by {record.worker}, attempt {record.attempt}"
        )
        lines.append(f"  {record.stage}: {how}" + (f"; next: {record.wants}" if record.wants else ""))
        lines += [f"    warning: {warning}" for warning in record.warnings]
    lines += [f"  failed: {reason}" for reason in job.reasons]
    return lines


@click.command()
@click.argument("job_ids", nargs=-1, metavar="JOB...")
@click.option("--all", "everything", is_flag=True, help="All unfinished ones, or those in the STATES that are named.")
@json_option
@quiet_option
@state_option
def cancel(job_ids: tuple[str, ...], everything: bool, as_json: bool, quiet: bool, state: Path | None) -> None:
    """Cancel JOBs; one that is being denoised stops at its next step.

    \b
    triptych cancel JOB JOB
    triptych cancel --all
    triptych cancel --all queued
    """
    with Client(state_folder(state)) as client:
        if everything:
            job_ids = unfinished(client, job_ids)
        found = client.cancel(*job_ids)
    if as_json:
        print(json.dumps([job.model_dump(mode="json") for job in found]))
    else:
        print_lines([job.id if quiet else f"{job.id} {job.state}" for job in found])


def unfinished(client: Client, states: Sequence[str]) -> tuple[str, ...]:
    """Ids of all jobs in these states, or of all that have not ended; BadRequest."""
    open_states = [state for state in JOB_STATES if state not in ENDED]
    if wrong := [state for state in states if state not in open_states]:
        raise BadRequest(f"{wrong[0]!r} is no state to cancel jobs in.", f"Choose of {', '.join(open_states)}.")
    wanted = [state for state in open_states if state in states] or open_states
    return tuple(job.id for job in client.jobs(wanted, limit=client.stack().queue_limit + MOST_LISTED))


@click.command()
@click.option("--older-than", default="7d", show_default=True, metavar="30d", help="Since they ended: 30d, 12h, 0.")
@state_option
def gc(older_than: str, state: Path | None) -> None:
    """Remove jobs that ended long ago, with their pictures. A stack does so by itself after --keep-jobs (30 days)."""
    seconds = parse_seconds(older_than)
    with Client(state_folder(state)) as client:
        count, size = client.collect_garbage(int(seconds))
    print(f"{count} jobs removed, {format_bytes(size)} freed.", file=sys.stderr)
