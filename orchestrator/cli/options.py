"""Options that several commands share, and what they mean."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from protocol.endpoints import default_folder
from protocol.errors import BadRequest
from protocol.jobs import JobRequest

Command = TypeVar("Command", bound=Callable[..., Any])

state_option = click.option(
    "--state", type=click.Path(path_type=Path), envvar="TRIPTYCH_STATE", metavar="DIR",
    help="The stack's folder. [default: triptych in your state folder]",
)  # fmt: skip
json_option = click.option("--json", "as_json", is_flag=True, help="Answer as JSON on stdout.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print ids or paths only.")

RECIPE_FIELDS = ("negative_prompt", "width", "height", "steps", "guidance", "cfg_scale", "seed", "num_images",
                 "max_sequence_length", "priority")  # fmt: skip


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


def recipe_options(command: Command) -> Command:
    """The options that make up a job, by the names that diffusers' and mflux's users know."""
    for option in reversed((
        click.option("--negative-prompt", help="What to keep out; needs --cfg-scale above 1."),
        click.option("--steps", "--num-inference-steps", "steps", type=int, help="Denoising steps."),
        click.option("--guidance", "--guidance-scale", "guidance", type=float, help="Distilled guidance (FLUX.1-dev)."),
        click.option("--cfg-scale", "--true-cfg-scale", "cfg_scale", type=float, help="True classifier-free guidance."),
        click.option("--width", type=int, help="Pixels."),
        click.option("--height", type=int, help="Pixels."),
        click.option("--size", callback=parse_size, metavar="WxH", help="Width and height in one: 1024x768."),
        click.option("--seed", type=int, help="Same seed, same picture. [default: a random one, recorded]"),
        click.option("-n", "--num-images", "num_images", type=int, help="Pictures of each prompt."),
        click.option("--max-sequence-length", type=int, help="Tokens of the prompt that the model reads."),
        click.option("--priority", type=int, help="Higher goes first. [default: 0]"),
        click.option("--prompts", "prompts_file", type=click.Path(path_type=Path), metavar="FILE",
                     help="One prompt a line (.txt), or one JSON object with the options' names a line (.jsonl)."),
    )):  # fmt: skip
        command = option(command)
    return command


def given_recipe(options: dict[str, Any]) -> dict[str, Any]:
    """The recipe options that were given, as JobRequest's fields."""
    given = {name: options[name] for name in RECIPE_FIELDS if options.get(name) is not None}
    if options.get("size"):
        if "width" in given or "height" in given:
            raise BadRequest("--size and --width or --height say the same.", "Give one or the other.")
        given["width"], given["height"] = options["size"]
    return given


def requests_from(prompts: tuple[str, ...], options: dict[str, Any]) -> list[JobRequest]:
    """One request a prompt, from arguments and file; a line's own settings win over the flags."""
    given = given_recipe(options)
    rows: list[tuple[str, dict[str, Any]]] = [("", {"prompt": prompt}) for prompt in prompts]
    if options.get("prompts_file"):
        rows += read_prompts(options["prompts_file"])
    if not rows:
        raise BadRequest("There is no prompt.", 'Give one: triptych submit "a large red circle", or --prompts FILE.')
    return [make_request({**given, **row}, where) for where, row in rows]


def make_request(fields: dict[str, Any], where: str) -> JobRequest:
    from pydantic import ValidationError

    try:
        return JobRequest.model_validate(fields)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(map(str, fault["loc"]))
        known = f"Known are {', '.join(JobRequest.model_fields)}." if fault["type"] == "extra_forbidden" else ""
        raise BadRequest(f"{where}{name}: {fault['msg']}.", known) from error


def read_prompts(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(where, fields) for each line that holds something; every bad line is named at once."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadRequest(f"The prompts file {str(path)!r} can't be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise BadRequest(
            f"The prompts file {str(path)!r} is not UTF-8 text.", "Save it as text, one prompt a line."
        ) from error
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if path.suffix != ".jsonl":
        return [(f"{path}, line {number}: ", {"prompt": line}) for number, line in lines]
    rows: list[tuple[str, dict[str, Any]]] = []
    bad: list[str] = []
    for number, line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("prompt"), str):
            rows.append((f"{path}, line {number}: ", row))
        else:
            bad.append(str(number))
    if bad:
        hint = 'Each line should be an object such as {"prompt": "a red circle", "seed": 1}.'
        raise BadRequest(f"{str(path)!r} has lines that don't fit: {', '.join(bad[:20])}.", hint)
    return rows
