"""`submit`, `wait` and `retry`: from prompts to files, with progress."""

import json
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli.display import make_display
from orchestrator.cli.options import (
    Asked,
    Command,
    given_pictures,
    json_option,
    picture_options,
    preview_options,
    quiet_option,
    recipe_options,
    requests_from,
    state_folder,
    state_option,
    timeout_option,
)
from orchestrator.cli.output import (
    PICTURES,
    VIDEOS,
    Name,
    Names,
    OutputPath,
    Wanted,
    checked,
    fit_to,
    names_for,
    names_of_pattern,
    write,
)
from orchestrator.cli.previews import PreviewWatch
from orchestrator.cli.table import print_lines
from protocol.client.client import Client
from protocol.client.exchange import raise_unless_done
from protocol.client.lora_files import loras_of
from protocol.errors import BadRequest, NoStack, TriptychError
from protocol.job import ENDED, Job, JobRequest, Recipe
from protocol.lora import LoraRequest
from protocol.model_spec import with_added
from protocol.pictures import CONTROL, IMAGE, IP_IMAGE, MASK, VIDEO, pictures_among
from protocol.recipe import MAX_IMAGES
from protocol.settings import as_given
from protocol.speedups import batch_of
from protocol.tensors import Tensor
from protocol.views import ModelView, WorkerView

if TYPE_CHECKING:
    from PIL.Image import Image

    from protocol.client.picture_files import Made

LOADING_SECONDS = 60.0  # that a stack may take to know its model
MODEL_SECONDS = 600.0  # to load a model's configuration, a download of it included


def output_options(command: Command) -> Command:
    """The options of the files that pictures and videos go to."""
    for option in reversed((
        click.option("-o", "--output", type=OutputPath(path_type=Path),
                     help="FILE.png, .jpg, .webp, a video's .mp4, .webm, .gif or FILE-%04d.png, or a FOLDER/. "
                     "[default: triptych-JOB.png or .mp4 here]"),
        click.option("--output-pattern", metavar="PATTERN",
                     help='Names with {date}, {time}, {job}, {seed}, {prompt} and {index}: "{seed}-{prompt:.40}.png".'),
        click.option("--no-metadata", is_flag=True, help="Leave the recipe out of the files."),
        click.option("--grid", type=click.Path(path_type=Path), metavar="FILE",
                     help="Write a sheet of all pictures besides."),
    )):  # fmt: skip
        command = option(command)
    return command


@click.command()
@click.argument("prompts", nargs=-1)
@click.option(
    "-m",
    "--model",
    "of_model",
    metavar="NAME",
    help="One of the stack's models: 'triptych models' lists them. [default: the first one]",
)
@click.option(
    "--controlnet",
    "of_controlnet",
    metavar="NAME",
    help="Which of the model's ControlNets --control-image is for, where the stack has several.",
)
@click.option("--refiner", "of_refiner", metavar="NAME", help="Which of the model's refiners makes the last steps.")
@recipe_options
@output_options
@click.option("--no-wait", is_flag=True, help="Print the jobs' ids and leave; 'triptych wait JOB' gets the pictures.")
@preview_options
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
    asked = requests_from(prompts, options)
    names = names_for_requests(asked, options)
    with Client(state_folder(state)) as client:
        make(client, asked, names, options)


def names_for_requests(asked: Sequence[Asked], options: dict[str, Any]) -> Names:
    """Return the names of pictures that are yet to be asked for; none where nobody waits for them. BadRequest."""
    if options["no_wait"]:
        return {}
    counts = [max(1, min(a.request.num_images, MAX_IMAGES)) for a in asked]  # the stack refuses others
    wanted = [Wanted(str(a.request.id), n, a.picture) for a, n in zip(asked, counts, strict=True)]
    check_grid(options)
    if (pattern := options.get("output_pattern")) is None:
        return names_for(options["output"], wanted)
    if options["output"] is not None:
        raise BadRequest("-o and --output-pattern say the same.", "Give one or the other.")
    fields = [{"prompt": a.request.prompt, "seed": a.request.seed} for a in asked]
    return names_of_pattern(pattern, list(zip(wanted, fields, strict=True)))


def check_grid(options: dict[str, Any]) -> None:
    """Raise BadRequest where a sheet of all pictures can't take its name."""
    if (grid := options.get("grid")) is not None:
        if grid.suffix.lower() not in PICTURES:
            raise BadRequest(f"--grid {str(grid)!r} is no picture.", f"Name it FILE{PICTURES[0]}.")
        checked({"": [Name(0, grid)]})


def make(client: Client, asked: Sequence[Asked], names: Names, options: dict[str, Any]) -> None:
    """Submit, and unless told not to wait, follow the jobs and write their pictures under these names."""
    models = client.models()
    if not models and not options["quiet"]:
        print("The stack is loading its model …", file=sys.stderr, flush=True)
    for request in (a.request for a in asked):
        if names and (model := model_among(models, request)):
            names |= fit_to({str(request.id): names[str(request.id)]}, model.video)
    try:
        for file in {file.digest: file for a in asked for file in a.loras}.values():
            client.send_lora(file)
        pictures = {picture.name: picture for a in asked for picture in a.inputs}
        jobs = client.submit_many(
            [a.request for a in asked], MODEL_SECONDS, watch=not options["no_wait"], pictures=[*pictures.values()]
        )
    except TriptychError as error:
        if error.item is not None:
            error.message = f"{asked[error.item].where}{error.message}"
        raise
    if options["no_wait"]:
        tell(jobs, [], options)
    else:
        made = {job.id: job.recipe.frames is not None for job in jobs}
        fitted = {job: fit_to({job: rows}, made[job])[job] for job, rows in names.items()}
        collect(client, jobs, fitted, options)


def model_among(models: Sequence[ModelView], request: JobRequest) -> ModelView | None:
    """Return the model that a request names; None where it is not known, or not yet."""
    name = request.model
    found = [model for model in models if (name in (model.name, model.model) if name else model.default)]
    names = [with_added(model.name, request.controlnet or request.refiner) for model in found]
    return next((model for model in models if model.name in names), None)


def collect(client: Client, jobs: list[Job], names: Names, options: dict[str, Any]) -> None:
    """Follow jobs to their end and write each one's pictures as it ends; raises for the first that failed.

    A picture that can't be written costs none of the others.
    """
    written: list[Path] = []
    lost: list[tuple[Job, BadRequest]] = []
    cells: dict[str, list[Image]] = {}  # of a sheet of all, by job
    watch = PreviewWatch(client, bool(options.get("preview")), options.get("preview_dir"))
    with make_display(jobs, options["quiet"]) as display:
        try:
            for event in client.events([job.id for job in jobs], options["timeout"]):
                display.show(event)
                watch.see(event, display)
                if event.state == "done":
                    job, tensors = client.results(event.job)
                    paths, errors = write(job, tensors, names[job.id], not options.get("no_metadata"))
                    if options.get("grid"):
                        cells[job.id] = cells_of(job, pictures_among(tensors), names[job.id])
                    written += paths
                    lost += [(job, error) for error in errors]
        except KeyboardInterrupt:
            display.note(f"The jobs go on. Get them with: triptych wait {' '.join(job.id for job in jobs[:8])}")
            raise
    final = [client.job(job.id) for job in jobs]
    told = [str(name.path) for job in final for name in names[job.id] if name.path in written]
    if sheet := [image for job in final for image in cells.get(job.id, ())]:
        from protocol.client.picture_files import save_grid

        save_grid(sheet, options["grid"])
        told.append(str(options["grid"]))
    tell(final, told, options)
    for job in final:
        for record in job.records:
            for warning in record.warnings:
                print(f"Warning: {warning}", file=sys.stderr)
    for job, error in lost:
        hint = f"Its pictures are kept: triptych wait {job.id} -o {{}}" if options.get("kept", True) else error.hint
        raise BadRequest(error.message, hint.format("FILE.png"))
    for job in final:
        raise_unless_done(job)


def cells_of(job: Job, pictures: Tensor, names: Sequence[Name]) -> "list[Image]":
    """Return a job's pictures for a sheet; of a video its first frame."""
    from protocol.client.picture_files import to_images

    images = to_images(pictures)
    each = len(images) // job.recipe.num_images
    return [images[name.index * each] for name in names]


def tell(jobs: list[Job], paths: list[str], options: dict[str, Any]) -> None:
    """Data on stdout: JSON, or a path a line, or where there are none an id a line."""
    if options["as_json"]:
        rows = [job.model_dump(mode="json") for job in jobs]
        print(json.dumps({"jobs": rows, "paths": paths}))
    else:
        print_lines(paths or [job.id for job in jobs if job.state not in ENDED])


@click.command()
@click.argument("job_ids", nargs=-1, metavar="JOB...")
@output_options
@preview_options
@timeout_option
@json_option
@quiet_option
@state_option
def wait(job_ids: tuple[str, ...], state: Path | None, **options: Any) -> None:
    """Wait for JOBs and write their pictures."""
    with Client(state_folder(state)) as client:
        jobs = [client.job(job_id) for job_id in dict.fromkeys(job_ids)]
        collect(client, jobs, names_for_jobs(jobs, options), options)


def names_for_jobs(jobs: Sequence[Job], options: dict[str, Any]) -> Names:
    """Return the names of jobs' pictures; BadRequest."""
    check_grid(options)
    wanted = [Wanted(job.id, job.recipe.num_images) for job in jobs]
    videos = {job.id: job.recipe.frames is not None for job in jobs}
    if (pattern := options.get("output_pattern")) is None:
        names = names_for(options["output"], wanted)
    else:
        fields = [{"prompt": job.recipe.prompt, "seed": job.recipe.seed} for job in jobs]
        names = names_of_pattern(pattern, list(zip(wanted, fields, strict=True)))
    return {job: fit_to({job: rows}, videos[job])[job] for job, rows in names.items()}


@click.command()
@click.argument("targets", nargs=-1, metavar="JOB|FILE...")
@output_options
@click.option("--no-wait", is_flag=True, help="Print the jobs' ids and leave.")
@click.option("--anyway", is_flag=True, help="Make a file's picture again although this stack may give other bits.")
@picture_options
@click.option("--lora", multiple=True, metavar="FILE", help="A LoRA's file that FILE was made with.")
@timeout_option
@json_option
@quiet_option
@state_option
def retry(targets: tuple[str, ...], state: Path | None, anyway: bool, **options: Any) -> None:
    """Run failed or cancelled JOBs again from their last finished stage, or make a FILE's picture again, all bits."""
    files = [Path(target) for target in targets if target.lower().endswith((*PICTURES, *VIDEOS))]
    if files and len(files) < len(targets):
        raise BadRequest("Jobs and files don't go together.", "Give one kind at a time.")
    with Client(state_folder(state)) as client:
        if files:
            pictures = given_pictures(options).tensors
            for file in loras_of(options["lora"]).files:
                client.send_lora(file)
            asked = [asked_again(client, path, anyway, pictures) for path in files]
            make(client, asked, names_for_requests(asked, options), options)
            return
        before = [client.job(job_id) for job_id in dict.fromkeys(targets)]
        names = {} if options["no_wait"] else names_for_jobs(before, options)
        jobs = client.retry(*targets)
        if options["no_wait"]:
            tell(jobs, [], options)
        else:
            collect(client, jobs, names, options)


def asked_again(client: Client, path: Path, anyway: bool, pictures: tuple[Tensor, ...]) -> Asked:
    """The request that makes a PNG's picture again, if this stack makes the same bits; BadRequest, NoStack."""
    from protocol.client.picture_files import read_recipe

    made = read_recipe(path)
    recipe, models = made.recipe, known_models(client)
    if not models:
        raise NoStack("The stack has no worker yet, so its model is not known.", "Try again once it has loaded.")
    alike = [model for model in models if model.revision == recipe.revision]
    if not alike:
        runs = ", ".join(f"{model.model!r} at {model.revision}" for model in models)
        raise BadRequest(
            f"{str(path)!r} was made with {recipe.model!r} at {recipe.revision}; this stack runs {runs}.",
            f"Start one with: triptych up --model {recipe.model}",
        )
    same = [model for model in alike if (model.speedups, model.dtype) == (recipe.speedups, recipe.dtype)]
    model = (same or alike)[0]
    check_same_pictures(path, recipe, pictures)
    if not anyway:
        workers = [worker for worker in client.workers().workers if worker.revision == model.revision]
        check_same_bits(path, made, model, workers)
    found = set(JobRequest.model_fields) & set(type(recipe).model_fields)
    kept = recipe.model_dump(include=found if recipe.sized else found - {"width", "height"})
    kept["settings"] = as_given(recipe.settings)
    kept["loras"] = tuple(LoraRequest(name=lora.name, weight=lora.weight, digest=lora.digest) for lora in recipe.loras)
    request = JobRequest.model_validate({**kept, "model": model.name or None, "id": secrets.token_hex(6)})
    return Asked(request, f"{path}: ", made.index if recipe.num_images > 1 else None, pictures)


def known_models(client: Client) -> list[ModelView]:
    """Return the stack's models, once it knows any, or has had a while for that."""
    deadline = time.monotonic() + LOADING_SECONDS
    while not (models := client.models()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return models


def check_same_pictures(path: Path, recipe: Recipe, pictures: tuple[Tensor, ...]) -> None:
    """Raise BadRequest where a picture was made of others than these."""
    wanted, given = list(recipe.pictures), [picture.name for picture in pictures]
    if wanted == given:
        return
    flags = {"--mask FILE": recipe.mask, "--control-image FILE": recipe.control, "--ip-image FILE": recipe.ip_image}
    options = " ".join([*(["--image FILE"] * len(recipe.images)), *(flag for flag, given in flags.items() if given),
                        *(f"--video {name}=FILE" for name, _ in recipe.videos)])  # fmt: skip
    if len(wanted) != len(given):
        raise BadRequest(
            f"{str(path)!r} was made of {len(wanted) or 'no'} pictures; {len(given) or 'none'} were given.",
            f"Give those that it was made of: {options}." if wanted else "Leave them out.",
        )
    number = next(i for i, pair in enumerate(zip(wanted, given, strict=True)) if pair[0] != pair[1])
    kind, _, which = [*recipe.named_pictures][number].partition(":")
    words = {
        IMAGE: f"picture {number + 1}",
        MASK: "the mask",
        CONTROL: "the control image",
        IP_IMAGE: "the IP-Adapter's picture",
        VIDEO: f"the video {which}",
    }
    what = words[kind]
    raise BadRequest(
        f"{str(path)!r} was made of another picture: {what} has the digest {given[number][:12]}…, not "
        f"{wanted[number][:12]}….",
        "Give the very one that it was made of.",
    )


def check_same_bits(path: Path, made: "Made", model: ModelView, workers: Sequence[WorkerView]) -> None:
    """Raise BadRequest for what differs between a picture's making and this stack, and what would make it the same."""
    recipe, anyway = made.recipe, "Or take other bits: --anyway."
    if batch_of(recipe.speedups) > 1:
        raise BadRequest(
            f"{str(path)!r} was made by a stack that denoises in batches: its last bits depend on the jobs beside it.",
            f"A stack without --batch makes the same picture, but for rounding. {anyway}",
        )
    if model.speedups != recipe.speedups:
        raise BadRequest(
            f"{str(path)!r} was made with {', '.join(recipe.speedups) or 'no speedups'}; "
            f"this stack runs with {', '.join(model.speedups) or 'none'}, which gives other bits.",
            f"Start one with the same --compile, --attention, --fuse-qkv, --cache and --quantize. {anyway}",
        )
    if model.dtype != recipe.dtype:
        raise BadRequest(
            f"{str(path)!r} was made in {recipe.dtype}; this stack computes in {model.dtype}.",
            f"Start one with: triptych up --dtype {recipe.dtype}. {anyway}",
        )
    for stage, (kind, versions) in made.stages.items():
        here = [worker for worker in workers if worker.stage == stage]
        if here and kind not in {worker.device_kind for worker in here}:
            kinds = ", ".join(sorted({worker.device_kind for worker in here}))
            raise BadRequest(
                f"The {stage} stage of {str(path)!r} ran on {kind}; this stack's runs on {kinds}.",
                f"Start one whose {stage} stage runs on {kind} (--device, --gpus). {anyway}",
            )
        if here and versions not in {worker.versions for worker in here}:
            raise BadRequest(
                f"The {stage} stage of {str(path)!r} was made with {versions}; this stack has {here[0].versions}.",
                f"Install those versions. {anyway}",
            )
