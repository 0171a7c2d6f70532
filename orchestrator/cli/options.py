"""Options that several commands share, and what they mean."""

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from orchestrator.cli.prompts import read_prompts
from protocol.client.endpoints import default_folder
from protocol.client.input_pictures import Inputs, alpha_mask_of, picture_of, split_video, video_of
from protocol.client.lora_files import LoraFile, all_text, loras_of
from protocol.errors import BadRequest
from protocol.job import JobRequest
from protocol.model_spec import Choice
from protocol.recipe import DRAWN
from protocol.tensors import Tensor

Command = TypeVar("Command", bound=Callable[..., Any])

state_option = click.option(
    "--state", type=click.Path(path_type=Path), envvar="TRIPTYCH_STATE", metavar="DIR",
    help="The stack's folder. [default: triptych in your state folder]",
)  # fmt: skip
json_option = click.option("--json", "as_json", is_flag=True, help="Answer as JSON on stdout.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print ids or paths only.")


def parse_timeout(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    if value is not None and not (0 <= value < math.inf):
        raise click.BadParameter(f"{value:g} is no number of seconds to wait; give 0 or more.")
    return value


timeout_option = click.option(
    "--timeout", type=float, metavar="SECONDS", callback=parse_timeout, help="Stop waiting after this; jobs go on."
)  # fmt: skip


def preview_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that show previews of jobs that are waited for."""
    shown = click.option(
        "--preview", is_flag=True, help="Show on the terminal how pictures will look, while they are made."
    )
    kept = click.option(
        "--preview-dir", type=click.Path(path_type=Path), metavar="DIR", help="Write that there, as JOB-STEP.jpg."
    )
    return shown(kept(command))


ALPHA = "alpha"  # for --mask
SINGLE = ("control_image", "ip_image")  # options of one picture
RECIPE_FIELDS = ("negative_prompt", "width", "height", "steps", "guidance", "cfg_scale", "seed", "num_images",
                 "max_sequence_length", "strength", "ip_scale", "frames", "fps", "settings", "priority")  # fmt: skip

CHOSEN: tuple[Choice, ...] = get_args(Choice)


def state_folder(state: Path | None) -> Path:
    return state or default_folder()


def parse_size(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    width, x, height = value.lower().partition("x")
    try:
        return int(width), int(height if x else width)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a size; write it as 1024x768.") from None


def parse_settings(
    context: click.Context, parameter: click.Parameter, value: tuple[str, ...]
) -> tuple[tuple[str, str], ...] | None:
    """Return the names and values of settings; None where there are none."""
    pairs = [text.partition("=") for text in value]
    for name, equals, _ in pairs:
        if not equals or not name.isidentifier():
            raise click.BadParameter(f"{name!r} is no setting; write it as NAME=VALUE, such as clip_skip=1.")
    return tuple((name, text) for name, _, text in pairs) or None


MOST_SEEDS = 1000


def parse_seeds(context: click.Context, parameter: click.Parameter, value: str | None) -> list[int]:
    """Return the seeds of a list of numbers and ranges."""
    found: list[int] = []
    for part in value.split(",") if value else ():
        first, dots, last = part.strip().partition("..")
        try:
            start, end = int(first), int(last if dots else first)
        except ValueError:
            raise click.BadParameter(f"{value!r} is not a list of seeds; write it as 1..4 or 1,5,9.") from None
        if not 0 <= start <= end or end - start + len(found) >= MOST_SEEDS:
            raise click.BadParameter(f"{part!r} is no range of at most {MOST_SEEDS} seeds from 0 on.")
        found += range(start, end + 1)
    return found


def picture_options(command: Command) -> Command:
    """The options for pictures that a job begins from."""
    for option in (
        click.option("--mask", type=click.Path(path_type=Path), metavar="FILE",
                     help="Paint anew what is white in it, and keep the rest of --image; alpha: what is transparent "
                     "in --image."),
        click.option("--control-image", type=click.Path(path_type=Path), metavar="FILE",
                     help="A picture that the model's ControlNet keeps to, such as edges or depths."),
        click.option("--ip-image", type=click.Path(path_type=Path), metavar="FILE",
                     help="A picture for the stack's IP-Adapter."),
        click.option("--ip-scale", type=float, help="How much that picture counts. [default: 1]"),
        click.option("--video", "videos", multiple=True, metavar="[NAME=]FILE",
                     help="A video to begin from (mp4, webm, gif); NAME is for models that take several, such as "
                     "pose_video=FILE."),
        click.option("--mask-blur", type=click.FloatRange(0, 1000), metavar="PIXELS",
                     help="Soften the mask's edge, as diffusers' mask_processor.blur does."),
        click.option("--image", "images", type=click.Path(path_type=Path), multiple=True, metavar="FILE",
                     help="A picture to begin from (PNG, JPEG, WebP); several where the model takes them."),
    ):  # fmt: skip
        command = option(command)
    return command


def recipe_options(command: Command) -> Command:
    """The options that make up a job, by the names that diffusers' and mflux's users know."""
    for option in reversed((
        click.option("--negative-prompt", help="What to keep out."),
        click.option("--steps", "--num-inference-steps", "steps", type=int, help="Denoising steps."),
        click.option("--guidance", "--guidance-scale", "guidance", type=float, help="Distilled guidance (FLUX.1-dev)."),
        click.option("--cfg-scale", "--true-cfg-scale", "cfg_scale", type=float, help="True classifier-free guidance."),
        click.option("--width", type=int, help="Pixels."),
        click.option("--height", type=int, help="Pixels."),
        click.option("--size", callback=parse_size, metavar="WxH", help="Width and height in one: 1024x768."),
        picture_options,
        click.option("--strength", type=float, help="How much of --image goes, from 0 to 1."),
        click.option("--seed", type=int, help="Same seed, same picture. [default, or -1: a random one, recorded]"),
        click.option("--seeds", callback=parse_seeds, metavar="A..B",
                     help="One picture of each prompt for each seed: 1..4, or 1,5,9."),
        click.option("-n", "--num-images", "num_images", type=int, help="Pictures, or videos, of each prompt."),
        click.option("--frames", "--num-frames", "frames", type=int, help="Frames of a video."),
        click.option("--fps", type=float, help="Frames a second of a video."),
        click.option("--max-sequence-length", type=int, help="Tokens of the prompt that the model reads."),
        click.option("--set", "settings", multiple=True, callback=parse_settings, metavar="NAME=VALUE",
                     help="Any other plain argument of the pipeline's call: clip_skip=1, padding_mask_crop=32."),
        click.option("--lora", multiple=True, metavar="NAME[@WEIGHT]",
                     help="A LoRA: a name that 'triptych loras' lists, or your own .safetensors file; several add up."),
        click.option("--priority", type=int, help="Higher goes first. [default: 0]"),
        click.option("--prompts", "prompts_file", type=click.Path(path_type=Path), metavar="FILE",
                     help="One prompt a line (.txt), JSON objects with the options' names (.jsonl, .json), or a table "
                     "with a column 'prompt' (.csv)."),
    )):  # fmt: skip
        command = option(command)
    return command


def given_recipe(options: dict[str, Any]) -> dict[str, Any]:
    """The recipe options that were given, as JobRequest's fields."""
    given = {name: options[name] for name in RECIPE_FIELDS if options.get(name) is not None}
    if options.get("of_model"):
        given["model"] = options["of_model"]
    given |= {kind: options[f"of_{kind}"] for kind in CHOSEN if options.get(f"of_{kind}")}
    if options.get("size"):
        if "width" in given or "height" in given:
            raise BadRequest("--size and --width or --height say the same.", "Give one or the other.")
        given["width"], given["height"] = options["size"]
    return given


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, with an id, and where it was read, for errors; empty for one from the command line."""

    request: JobRequest
    where: str = ""
    picture: int | None = None  # the only one that is wanted of its pictures, counted from 0
    inputs: tuple[Tensor, ...] = ()  # pictures that it begins from
    loras: tuple[LoraFile, ...] = ()  # files of LoRAs that it names


def requests_from(prompts: tuple[str, ...], options: dict[str, Any]) -> list[Asked]:
    """Make one request a prompt, from arguments and file; a line's own settings win over the flags."""
    given = given_recipe(options)
    inputs = given_pictures(options)
    given |= inputs.fields
    rows: list[tuple[str, dict[str, Any]]] = [("", {"prompt": prompt}) for prompt in prompts]
    if options.get("prompts_file"):
        rows += read_prompts(options["prompts_file"])
        if not rows:
            raise BadRequest(f"{str(options['prompts_file'])!r} holds no prompt.")
    if not rows and inputs.tensors:
        rows = [("", {"prompt": ""})]  # for models that take none
    if not rows:
        raise BadRequest("There is no prompt.", 'Give one: triptych submit "a large red circle", or --prompts FILE.')
    seeds = options.get("seeds") or [None]
    if seeds != [None] and "seed" in given:
        raise BadRequest("--seed and --seeds say the same.", "Give one or the other.")
    given_loras = loras_of(options.get("lora") or ())
    given |= {"loras": given_loras.requests} if given_loras.requests else {}
    named_by_seed = "{seed" in (options.get("output_pattern") or "")
    asked: list[Asked] = []
    for where, row in rows:
        for seed in seeds:
            fields = {**given, **row} | ({} if seed is None else {"seed": seed})
            own = given_loras
            if all_text(row.get("loras")):
                own = loras_of(row["loras"])
                fields["loras"] = own.requests
            if named_by_seed and fields.get("seed") in (None, DRAWN):
                fields["seed"] = secrets.randbelow(2**32)  # known before it is queued
            asked.append(Asked(make_request(fields, where), where, inputs=inputs.tensors, loras=own.files))
    return asked


def given_pictures(options: dict[str, Any]) -> Inputs:
    """Read the pictures and videos that the options name; BadRequest."""
    control, ip_image = (picture_of(path) if (path := options.get(name)) else None for name in SINGLE)
    images = tuple(map(picture_of, options.get("images") or ()))
    videos = tuple((name, video_of(path)) for name, path in sorted(map(split_video, options.get("videos") or ())))
    return Inputs(images, given_mask(options), control, ip_image, videos)


def given_mask(options: dict[str, Any]) -> Tensor | None:
    paths, mask, blur = options.get("images") or (), options.get("mask"), options.get("mask_blur") or 0
    if mask is None:
        if blur:
            raise BadRequest("There is no mask to be softened.", "Give one: --mask FILE.")
        return None
    if str(mask) != ALPHA:
        return picture_of(mask, mask=True, blur=blur)
    if not paths:
        raise BadRequest("--mask alpha is what is transparent in a picture.", "Give it: --image FILE.")
    return alpha_mask_of(paths[0], blur)


def make_request(fields: dict[str, Any], where: str) -> JobRequest:
    from pydantic import ValidationError

    try:
        request = JobRequest.model_validate(fields)
        return request if request.id else request.model_copy(update={"id": secrets.token_hex(6)})
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(map(str, fault["loc"]))
        known = f"Known are {', '.join(JobRequest.model_fields)}." if fault["type"] == "extra_forbidden" else ""
        raise BadRequest(f"{where}{name}: {fault['msg']}.", known) from error
