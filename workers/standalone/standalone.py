"""A stage on its own, for debugging: no orchestrator, files in and out, and everything about the run printed."""

import contextlib
import pdb
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from protocol.client.picture_files import metadata_of, to_images
from protocol.client.video_files import save_made, sound_of
from protocol.errors import BadRequest
from protocol.job import JobRequest, Recipe
from protocol.lora import Lora
from protocol.pictures import as_given, extent_of, is_given_picture, pictures_among
from protocol.recipe import resolve
from protocol.settings import as_given as settings_as_given
from protocol.speedups import canonical
from protocol.stages import Stage
from protocol.tensors import Tensor
from protocol.units import format_bytes
from workers.runtime.describer import token_counter
from workers.runtime.executor import Measured, StageRunner, resident_bytes, run_measured
from workers.runtime.worker import Prepared
from workers.stages.checkpoint import ENDED
from workers.stages.contract import Outcome, Saved
from workers.standalone import stage_file

BOUND_TO_RECORD = (
    "prompt", "negative_prompt", "num_images", "max_sequence_length", "cfg_scale", "frames",
    "images", "mask", "control", "ip_image", "videos",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Debugging:
    repeat: int
    profile: Path | None
    pdb: bool


def run_standalone(
    prepared: Prepared,
    given: dict[str, object],
    pictures: Sequence[Tensor],
    input_path: Path | None,
    output: Path,
    debugging: Debugging,
) -> None:
    """Run a stage once or `repeat` times and write what it made; `given` holds the options that were given.

    `pictures` are those to begin from; `given` names them by their digests.
    """
    stage = prepared.spec.stage
    recipe, tensors = read_input(prepared, given, input_path) if input_path else make_input(prepared, given, pictures)
    brought = [tensor for tensor in tensors if is_given_picture(tensor)]
    runner, device_map = prepared.load()
    for part, where in device_map:
        say(f"{part or 'model'}: {where}")
    show("in", tensors)
    for turn in range(debugging.repeat):
        with stop_at_errors(debugging.pdb), profiled(debugging.profile if turn == debugging.repeat - 1 else None):
            measured = run_measured(runner, recipe, tensors, report_steps)
        say(timing(stage, measured, runner, turn, debugging.repeat))
    show("out", measured.outcome.tensors)
    for line in write_output(output, recipe, measured.outcome, brought):
        print(line)
    if following := measured.outcome.next:
        say(f"next: triptych worker {following} --standalone -i {output}")


def make_input(
    prepared: Prepared, given: dict[str, object], pictures: Sequence[Tensor]
) -> tuple[Recipe, tuple[Tensor, ...]]:
    """Make the first stage's input: a recipe, and the pictures that it begins from."""
    counter = token_counter(prepared.source)
    request, by_digest = JobRequest.model_validate(given), {picture.name: picture for picture in pictures}
    extent = extent_of({name: by_digest[digest].shape for name, digest in request.named_pictures.items()})
    loras = [
        Lora(name=lora.name, digest=lora.digest or "", weight=lora.weight, encoders=True)  # maybe
        for lora in request.loras
    ]
    recipe = resolve(
        request, prepared.description, prepared.dtype, counter, prepared.spec.speedups, *extent, loras=loras
    )
    return recipe, tuple(as_given(recipe.named_pictures, by_digest))


def read_input(prepared: Prepared, given: dict[str, object], path: Path) -> tuple[Recipe, tuple[Tensor, ...]]:
    """Read the file of the stage before; the options of this call override its recipe where they still can."""
    stage = prepared.spec.stage
    recipe, tensors = stage_file.read(path, stage)
    if recipe.revision != prepared.source.revision:
        raise BadRequest(f"{str(path)!r} was made with {recipe.model!r} at {recipe.revision}.", "Use the same --model.")
    begun = any(tensor.name.startswith(ENDED) for tensor in tensors)  # loops of it are over
    fixed = [name for name in given if stage == "vae" or begun or name in BOUND_TO_RECORD]
    if fixed:
        raise BadRequest(f"{', '.join(fixed)} can't change any more: {str(path)!r} depends on it.", "Leave it out.")
    kept = recipe.model_dump(include=set(JobRequest.model_fields) & set(Recipe.model_fields))
    kept["settings"] = settings_as_given(recipe.settings)
    kept["loras"] = ()
    request = JobRequest.model_validate({**kept, **given})
    if not recipe.sized:
        request = request.model_copy(update={"width": None, "height": None})
    speedups = canonical({*recipe.speedups, *prepared.spec.speedups})
    size = (recipe.width, recipe.height)
    resolved = resolve(request, prepared.description, recipe.dtype, None, speedups, size, recipe.frames, recipe.loras)
    return resolved, tensors


def report_steps(step: int, steps: int, saved: Saved | None = None) -> None:
    if step:
        print(f"\rstep {step}/{steps}", end="\n" if step == steps else "", file=sys.stderr, flush=True)


def timing(stage: Stage, measured: Measured, runner: StageRunner, turn: int, turns: int) -> str:
    which = f" ({turn + 1} of {turns})" if turns > 1 else ""
    peak = (
        f"{format_bytes(measured.peak_bytes)} of GPU memory at peak"
        if runner.device.type == "cuda"
        else f"{format_bytes(resident_bytes())} of memory resident"
    )
    return f"{stage}{which}: {measured.seconds:.3f} s on {runner.device}, {peak}"


def show(way: str, tensors: tuple[Tensor, ...] | list[Tensor]) -> None:
    for t in tensors:
        say(f"{way}: {t.name} {t.dtype} {list(t.shape)}, {format_bytes(t.nbytes)}")


def say(text: str) -> None:
    print(text, file=sys.stderr)


def write_output(output: Path, recipe: Recipe, outcome: Outcome, brought: Sequence[Tensor]) -> list[str]:
    """Write the stage's outcome, and the pictures that the job begins from; return the paths written."""
    try:
        if outcome.next:
            stage_file.write(output, outcome.next, recipe, [*outcome.tensors, *brought])
            return [str(output)]
        images = to_images(pictures_among(outcome.tensors))
        count = recipe.num_images
        paths = [output if count == 1 else output.with_stem(f"{output.stem}-{i + 1}") for i in range(count)]
        for i, path in enumerate(paths):
            save_made(images, i, path, recipe, metadata_of(recipe, "standalone", i), sound_of(outcome.tensors, i))
        return [str(path) for path in paths]
    except OSError as error:
        raise BadRequest(
            f"{str(output)!r} can't be written: {error.strerror or error}.", "Choose another -o."
        ) from error


@contextlib.contextmanager
def stop_at_errors(wanted: bool) -> Iterator[None]:
    """Start a debugger at the line that failed, with --pdb."""
    try:
        yield
    except Exception:
        if wanted:
            traceback.print_exc()
            pdb.post_mortem(sys.exc_info()[2])
        raise


@contextlib.contextmanager
def profiled(path: Path | None) -> Iterator[None]:
    """Write a trace for chrome://tracing or Perfetto, with --profile."""
    if path is None:
        yield
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        yield
    profile.export_chrome_trace(str(path))
    say(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=12))
    say(f"trace: {path}")
