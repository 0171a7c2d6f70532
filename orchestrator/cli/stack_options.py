"""The options that describe a stack, made of the fields of its settings; and the configuration that they give."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from orchestrator.config import load_config, parse_stage_values
from orchestrator.gpu_driver import list_gpus
from orchestrator.settings import Flag, HttpSettings, JobSettings, RaySettings, Settings, StackConfig, StageConfig
from protocol.errors import BadRequest
from protocol.model_spec import MODEL_NAME, name_of
from protocol.stages import STAGES, Stage

PARTS_OF_STACK: tuple[type[Settings], ...] = (JobSettings, HttpSettings, RaySettings)
Command = TypeVar("Command", bound=Callable[..., Any])


def stack_options(command: Command) -> Command:
    """Add an option for each setting that has a flag, and `--config`."""
    options = [click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="Settings as TOML.")]
    apart = {name for part in PARTS_OF_STACK for name in part.model_fields}
    options += [stack_option(field, flag) for name, field, flag in flags_of(StackConfig) if name not in apart]
    options += [stage_option(field, flag) for _, field, flag in flags_of(StageConfig)]
    options += [stack_option(field, flag) for part in PARTS_OF_STACK for _, field, flag in flags_of(part)]
    for option in reversed(options):
        command = option(command)
    return command


def flags_of(settings: type[Settings]) -> Iterator[tuple[str, FieldInfo, Flag]]:
    """The settings that have a flag: name, field and flag."""
    for name, field in settings.model_fields.items():
        for extra in field.metadata:
            if isinstance(extra, Flag):
                yield name, field, extra


def stack_option(field: FieldInfo, flag: Flag) -> Callable[[Any], Any]:
    names = [flag.short, flag.option] if flag.short else [flag.option]
    if field.annotation is bool:
        if field.default:
            names = [f"{flag.option}/--no-{flag.option.removeprefix('--')}"]
        return click.option(*names, parameter(flag), is_flag=True, default=None, help=field.description)
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    kind = click.Choice(choices) if choices else None
    several = flag.option in PARSERS
    metavar = None if choices else flag.metavar
    return click.option(
        *names, parameter(flag), type=kind or str, multiple=several, metavar=metavar, help=help_of(field, flag)
    )


def stage_option(field: FieldInfo, flag: Flag) -> Callable[[Any], Any]:
    return click.option(
        flag.option, parameter(flag), multiple=True, metavar=flag.metavar, help=help_of(field, flag)
    )  # fmt: skip


def parameter(flag: Flag) -> str:
    """The name of a flag's value among a command's arguments."""
    return flag.option.removeprefix("--").replace("-", "_")


def help_of(field: FieldInfo, flag: Flag) -> str:
    default = flag.default or field.default
    if isinstance(default, bool):
        default = "yes" if default else "no"
    shown = f"{default:g}" if isinstance(default, float) else default
    return f"{field.description} [default: {shown}]"


def stack_config(options: dict[str, Any]) -> StackConfig:
    """The configuration of flags and file; BadRequest."""
    given: dict[str, Any] = {}
    for name, _, flag in flags_of(StackConfig):
        value = options.get(parameter(flag))
        if value is not None and value != ():
            given |= PARSERS[flag.option](value) if flag.option in PARSERS else {name: value}
    stages: dict[Stage, dict[str, Any]] = {stage: {} for stage in STAGES}
    for name, _, flag in flags_of(StageConfig):
        for stage, text in parse_stage_values(flag.option, options[parameter(flag)], every_stage=flag.bare).items():
            stages[stage][name] = text
    config = load_config(options["config"], given, {stage: values for stage, values in stages.items() if values})
    for alone in config.each().values():
        alone.speedups()  # raises where they can't be
    return config


def parse_models(values: tuple[str, ...], named: bool = False) -> dict[str, Any]:
    """'MODEL', or NAME=MODEL; of several the first is the default. A single one gets a name if it is to be `named`."""
    found: dict[str, dict[str, str]] = {}
    for value in values:
        name, equals, model = value.partition("=")
        says = bool(equals and model) and re.fullmatch(MODEL_NAME, name) is not None
        name, model = (name, model) if says else (name_of(value), value)
        if len(values) == 1 and not (says or named):
            return {"model": value}
        if name in found:
            raise BadRequest(
                f"Two models are called {name!r}: {found[name]['model']} and {model}.",
                f"Give one of them another name: --model NAME={model}",
            )
        found[name] = {"model": model}
    return {"models": found, "model": next(iter(found))}


def parse_aliases(option: str, setting: str, values: tuple[str, ...]) -> dict[str, Any]:
    """'ink=FILE' gives a LoRA's file, or what else jobs name, a name."""
    pairs = [value.partition("=") for value in values]
    if wrong := [name for name, equals, file in pairs if not (name and equals and file)]:
        raise BadRequest(f"{option} {wrong[0]!r} is not right.", f"Write {option} NAME=FILE.")
    return {setting: {name: file for name, _, file in pairs}}


def parse_budgets(values: tuple[str, ...]) -> dict[str, Any]:
    """'0=16GB' is one GPU's; a bare '16GB' is that of all that there are."""
    found: dict[int, str] = {}
    gpus = list_gpus()
    for value in values:
        index, equals, amount = value.rpartition("=")
        if equals and not index.isdigit():
            raise BadRequest(f"--budget {value!r} is not right.", "Write --budget GPU=AMOUNT, as in --budget 0=16GB.")
        if not equals and not gpus:
            raise BadRequest("There is no GPU here to have a budget.", "With --device cpu:0, write --budget 0=14MB.")
        indices = [int(index)] if equals else [gpu.index for gpu in gpus if gpu.index not in found]
        found |= dict.fromkeys(indices, amount)
    return {"gpus": found}


def parse_texts(setting: str, values: tuple[str, ...]) -> dict[str, Any]:
    return {setting: values}


TEXTS = {"--http-host": "http_hosts", "--http-origin": "http_origins", "--ray-host": "ray_hosts"}
ALIASES = {
    "--ray-label": "ray_labels",
    "--lora-alias": "loras",
    "--controlnet-alias": "controlnets",
    "--refiner-alias": "refiners",
}
PARSERS: dict[str, Callable[[tuple[str, ...]], dict[str, Any]]] = {  # of flags that may be given several times
    "--model": parse_models,
    "--budget": parse_budgets,
    **{option: partial(parse_aliases, option, name) for option, name in ALIASES.items()},
    **{option: partial(parse_texts, name) for option, name in TEXTS.items()},
}
