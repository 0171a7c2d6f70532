"""`models`: the models of a stack, where their weights are, and which have workers."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from orchestrator.cli.options import json_option, quiet_option, state_folder, state_option
from orchestrator.cli.stack_options import parse_models
from orchestrator.cli.table import print_lines, print_table
from protocol.client.client import Client
from protocol.model_spec import ModelSpec
from protocol.units import format_bytes
from protocol.views import ComponentView, ModelView, WorkerView

PLAN_SECONDS = 600.0  # to look at a model, a download of its configuration included


@click.group(invoke_without_command=True)
@json_option
@quiet_option
@state_option
@click.pass_context
def models(context: click.Context, as_json: bool, quiet: bool, state: Path | None) -> None:
    """List the stack's models: which are in, streamed or out, how large they are, and their jobs.

    A model that rests has no workers. They start when a job asks for it, or with 'load'.

    \b
    triptych up --model demo --model turbo=Tongyi-MAI/Z-Image-Turbo
    triptych submit "a red circle" --model turbo
    triptych models unload turbo
    """
    if context.invoked_subcommand:
        return
    with Client(state_folder(state)) as client:
        found, workers = client.models(), client.workers().workers
    if as_json:
        print(json.dumps([model.model_dump(mode="json") for model in found]))
    elif quiet:
        print_lines([model.name for model in found])
    else:
        header = ("name", "model", "pipeline", "dtype", "workers", "weights", "came in", "jobs")
        print_table(header, [row(model, workers) for model in found], wide=1)
        for model in found:
            if model.reason:
                print(f"{model.name} can't be run: {model.reason}", file=sys.stderr)
        if not found:
            print("No model is known yet: the stack is loading.", file=sys.stderr)


def row(model: ModelView, workers: Sequence[WorkerView]) -> list[str]:
    own = [w for w in workers if (w.revision, w.dtype, w.speedups) == (model.revision, model.dtype, model.speedups)]
    parts = [component for worker in own for component in worker.residency]
    loading = any(worker.state == "loading" for worker in own)
    there = "rests" if model.resting else f"{len(own)}, loading" if loading or not own else str(len(own))
    place = [there, weights(parts), came_in(parts)]
    return [model.name, model.model, model.pipeline, model.dtype, *place, str(model.jobs)]


def weights(parts: Sequence[ComponentView]) -> str:
    """'in, 12.3 GB', 'streamed, 9.1 GB of 33.7 GB', 'out, 33.7 GB'."""
    held, total = sum(part.device_bytes for part in parts), sum(part.total_bytes for part in parts)
    if not parts:
        return "-"
    if all(part.state == "out" for part in parts):
        return f"out, {format_bytes(total)}"
    state = "in" if all(part.state == "in" for part in parts) else "streamed" if held else "out"
    size = format_bytes(total) if state == "in" else f"{format_bytes(held)} of {format_bytes(total)}"
    return f"{state}, {size}"


def came_in(parts: Sequence[ComponentView]) -> str:
    """The seconds that the copies of its weights took which are there now."""
    seconds = [part.swap_seconds for part in parts if part.state != "out" and part.swap_seconds]
    return f"{sum(seconds):.2f} s" if seconds else "-"


@models.command()
@click.argument("name")
@state_option
def load(name: str, state: Path | None) -> None:
    """Start the workers of the model NAME, before a job asks for it."""
    with Client(state_folder(state)) as client:
        client.load_model(name)
    print(f"Starting {name}.", file=sys.stderr)


@models.command()
@click.argument("name")
@state_option
def unload(name: str, state: Path | None) -> None:
    """End the workers of the model NAME, which has no unfinished jobs; the next job starts them again."""
    with Client(state_folder(state)) as client:
        client.load_model(name, load=False)
    print(f"{name} rests.", file=sys.stderr)


@models.command()
@click.argument("model", metavar="[NAME=]MODEL")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--base", metavar="MODEL", help="Of a model that is one file: whose configuration it goes by.")
@click.option("--controlnet", metavar="MODEL", help="A ControlNet for jobs with a control image.")
@click.option("--refiner", metavar="MODEL", help="A refiner (SDXL) that makes the last steps.")
@click.option("--ip-adapter", metavar="FILE", help="An IP-Adapter's weights.")
@click.option("--transformer", metavar="FILE", help="The denoiser's weights in one file.")
@state_option
def add(model: str, state: Path | None, **parts: str | None) -> None:
    """Add MODEL to the running stack, as long as that runs. Its other settings are the stack's; it rests until used."""
    ((name, given),) = parse_models((model,), named=True)["models"].items()
    print(f"Looking at {given['model']} …", file=sys.stderr)
    spec = ModelSpec(name=found(given["model"]), **{part: text and found(text) for part, text in parts.items()})
    with Client(state_folder(state)) as client:
        client.add_model(name, spec, PLAN_SECONDS)
    print(f"{name} is here: triptych submit --model {name} …", file=sys.stderr)


def found(text: str) -> str:
    """Return what names a file or a folder of this shell's, so that the stack finds it, too; else the text."""
    path = Path(text).expanduser()
    return str(path.resolve()) if path.exists() else text


@models.command()
@click.argument("name")
@state_option
def remove(name: str, state: Path | None) -> None:
    """Remove the model NAME, which has no unfinished jobs, from the running stack."""
    with Client(state_folder(state)) as client:
        client.remove_model(name)
    print(f"{name} is removed.", file=sys.stderr)
