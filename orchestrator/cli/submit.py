"""`submit`, `wait` and `retry`: from prompts to files, with progress."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from orchestrator.cli.display import make_display
from orchestrator.cli.options import (
    json_option,
    quiet_option,
    recipe_options,
    requests_from,
    state_folder,
    state_option,
)
from orchestrator.cli.output import OutputPath, check_output, paths_for, write
from protocol.client import Client
from protocol.conversation import raise_unless_done
from protocol.errors import BadRequest, NoStack
from protocol.jobs import ENDED, Job, JobRequest

MODEL_SECONDS = 600.0  # to load a model's configuration, a download of it included

output_option = click.option(
    "-o", "--output", type=OutputPath(path_type=Path), help="A PNG file or a FOLDER/. [default: triptych-JOB.png here]"
)
timeout_option = click.option("--timeout", type=float, metavar="SECONDS", help="Stop waiting after this; jobs go on.")


@click.command()
@click.argument("prompts", nargs=-1)
@recipe_options
@output_option
@click.option("--no-wait", is_flag=True, help="Print the jobs' ids and leave; 'triptych wait JOB' gets the pictures.")
@timeout_option
@json_option
@quiet_option
@state_option
def submit(prompts: tuple[str, ...], state: Path | None, **options: Any) -> None:
    """Submit PROMPTS to the running stack and wait for the pictures.

    \b
    triptych submit "a large red circle at the top left" -o circle.png --seed 7
    triptych submit "a small blue star" "a green ring" -n 4 -o folder/
    triptych submit --prompts prompts.jsonl --no-wait
    """
    requests = requests_from(prompts, options)
    if not options["no_wait"]:
        check_output(options["output"])
    with Client(state_folder(state)) as client:
        make(client, requests, options)


def make(client: Client, requests: Sequence[JobRequest], options: dict[str, Any]) -> None:
    """Submit, and unless told not to wait, follow the jobs and write their pictures."""
    if client.stack().model is None and not options["quiet"]:
        print("The stack is loading its model …", file=sys.stderr, flush=True)
    jobs = client.submit_many(requests, timeout=MODEL_SECONDS, watch=not options["no_wait"])
    if options["no_wait"]:
        tell(jobs, [], options)
    else:
        collect(client, jobs, options)


def collect(client: Client, jobs: list[Job], options: dict[str, Any]) -> None:
    """Follow jobs to their end and write each one's pictures as it ends; raises for the first that failed."""
    paths = paths_for(options["output"], jobs)
    written: list[Path] = []
    with make_display(jobs, options["quiet"]) as display:
        try:
            for event in client.events([job.id for job in jobs], options["timeout"]):
                display.show(event)
                if event.state == "done":
                    job, pictures = client.raw_pictures(event.job)
                    write(job, pictures, paths[job.id])
                    written += paths[job.id]
        except KeyboardInterrupt:
            display.note(f"The jobs go on. Get them with: triptych wait {' '.join(job.id for job in jobs[:8])}")
            raise
    final = [client.job(job.id) for job in jobs]
    tell(final, [str(path) for job in final for path in paths[job.id] if path in written], options)
    for job in final:
        for record in job.records:
            for warning in record.warnings:
                print(f"Warning: {warning}", file=sys.stderr)
    for job in final:
        raise_unless_done(job)


def tell(jobs: list[Job], paths: list[str], options: dict[str, Any]) -> None:
    """Data on stdout: JSON, or a path a line, or where there are none an id a line."""
    if options["as_json"]:
        rows = [job.model_dump(mode="json") for job in jobs]
        print(json.dumps({"jobs": rows, "paths": paths}))
    else:
        print("\n".join(paths or [job.id for job in jobs if job.state not in ENDED]))


@click.command()
@click.argument("job_ids", nargs=-1, required=True, metavar="JOB...")
@output_option
@timeout_option
@json_option
@quiet_option
@state_option
def wait(job_ids: tuple[str, ...], state: Path | None, **options: Any) -> None:
    """Wait for JOBs and write their pictures."""
    check_output(options["output"])
    with Client(state_folder(state)) as client:
        collect(client, [client.job(job_id) for job_id in job_ids], options)


@click.command()
@click.argument("targets", nargs=-1, required=True, metavar="JOB|PNG...")
@output_option
@click.option("--no-wait", is_flag=True, help="Print the jobs' ids and leave.")
@timeout_option
@json_option
@quiet_option
@state_option
def retry(targets: tuple[str, ...], state: Path | None, **options: Any) -> None:
    """Run failed or cancelled JOBs again from their last finished stage, or make a PNG's picture again, bit for bit."""
    check_output(options["output"])
    files = [Path(target) for target in targets if target.lower().endswith(".png")]
    if files and len(files) < len(targets):
        raise BadRequest("Jobs and PNG files don't go together.", "Give one kind at a time.")
    with Client(state_folder(state)) as client:
        if files:
            make(client, [request_from(client, path) for path in files], options)
            return
        jobs = client.retry(*targets)
        if options["no_wait"]:
            tell(jobs, [], options)
        else:
            collect(client, jobs, options)


def request_from(client: Client, path: Path) -> JobRequest:
    """The request that makes a PNG's job again, if this stack can make the same bits."""
    from protocol.pictures import read_recipe

    recipe, _ = read_recipe(path)
    stack = client.stack()
    if stack.model is None:
        raise NoStack("The stack has no worker yet, so its model is not known.", "Try again once it has loaded.")
    if stack.model.revision != recipe.revision:
        raise BadRequest(
            f"{str(path)!r} was made with {recipe.model!r} at {recipe.revision}; "
            f"this stack runs {stack.model.model!r} at {stack.model.revision}.",
            f"Start one with: triptych up --model {recipe.model}",
        )
    if stack.speedups != recipe.speedups:
        raise BadRequest(
            f"{str(path)!r} was made with {', '.join(recipe.speedups) or 'no speedups'}; "
            f"this stack runs with {', '.join(stack.speedups) or 'none'}, which gives other bits.",
            "Start one with the same --compile, --attention, --fuse-qkv, --cache and --quantize.",
        )
    kept = recipe.model_dump(include=set(JobRequest.model_fields) & set(type(recipe).model_fields))
    return JobRequest.model_validate(kept)
