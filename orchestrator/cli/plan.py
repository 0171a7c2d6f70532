"""`plan`: the plan of a stack on these GPUs or on others, before anything is downloaded, loaded or bought."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from orchestrator.cli.options import json_option, parse_size, state_folder, state_option
from orchestrator.cli.plan_words import HEADER, as_data, rows, summary
from orchestrator.cli.stack_options import stack_config, stack_options
from orchestrator.cli.table import print_table
from orchestrator.gpu_driver import list_gpus
from orchestrator.planning.calibration import Measurements, measurements_in
from orchestrator.planning.gpu_budgets import check_budgets
from orchestrator.planning.hardware import Hardware, all_memory, imagined, this_hardware, with_link
from orchestrator.planning.model_profile import find_profile
from orchestrator.planning.placement import stand_ins
from orchestrator.planning.planner import Plan, choose
from orchestrator.planning.stack_plan import stack_dtype
from orchestrator.settings import StackConfig
from orchestrator.state_folder import StackFolder
from protocol.curve_keys import NAME
from protocol.errors import BadRequest
from protocol.model_profile import ModelProfile
from protocol.units import format_bytes, parse_bytes

NUMBERS = re.compile(r"(\w+=)?\d+(,\d+)*")  # of GPUs, of a stage or all; anything else are the GPUs to plan for


@click.command()
@stack_options
@click.option("--link", metavar="25GB/s", help="What a GPU gets from memory, each. [default: as the driver tells]")
@click.option("--ram", metavar="64GB", help="Memory of the machine. [default: this one's]")
@click.option(
    "--hosts", multiple=True, metavar="NAME=16GB,16GB", help="Another host, and its GPUs as for --gpus; several times."
)  # fmt: skip
@click.option("--size", callback=parse_size, metavar="WxH", help="Of the pictures. [default: the model's own]")
@click.option("--steps", type=int, help="Denoising steps. [default: the model's own]")
@click.option("--cfg-scale", type=float, help="True classifier-free guidance. [default: the model's own]")
@click.option("--frames", type=int, help="Of a video. [default: the model's own]")
@json_option
@state_option
def plan(
    state: Path | None, as_json: bool, link: str | None, ram: str | None, hosts: tuple[str, ...], **options: Any
) -> None:
    """Say what a stack would do: what lies where, what is streamed, seconds a step and a picture, and what would help.

    Nothing is loaded, and of a hub model only its small files are downloaded. --gpus may give GPUs that aren't here, by
    their memory or as NAME:MEMORY; otherwise the options are those of 'triptych up', which goes by the same plan.

    \b
    triptych plan --model black-forest-labs/FLUX.1-dev
    triptych plan --model black-forest-labs/FLUX.1-dev --gpus 16GB,16GB --link 25GB/s
    triptych plan --model black-forest-labs/FLUX.1-dev --gpus "RTX 4090:24GB,RTX 3060:12GB" --optimize latency
    triptych plan --model black-forest-labs/FLUX.1-dev --gpus 16GB --hosts "box=RTX 4090:24GB,RTX 4090:24GB"
    """
    thought = [value for value in options["gpus"] if not NUMBERS.fullmatch(value)]
    options["gpus"] = tuple(value for value in options["gpus"] if value not in thought)
    if len(thought) > 1:
        raise BadRequest("--gpus is given twice.", "Write --gpus 16GB,16GB for two.")
    if thought:
        count = len(imagined(thought[0]))
        options["budget"] = [f"{gpu}={b}" for b in options["budget"] for gpu in range(count) if "=" not in b] + [
            b for b in options["budget"] if "=" in b
        ]
    config = with_recipe(stack_config(options), options)
    gpus, measurements = list_gpus(), Measurements()
    if not thought:
        check_budgets(config, gpus)
        measurements = measurements_in(StackFolder(state_folder(state)))
    told: list[dict[str, Any]] = []
    several = len(config.each()) > 1
    others = dict(map(parse_host, hosts))
    for name, alone in config.each().items():
        hardware = this_hardware(gpus, alone.gpus, stand_ins(alone), alone.host_memory or all_memory())
        if thought:
            hardware = replace(hardware, cards=imagined(thought[0], alone.gpus))
        if ram is not None:
            hardware = replace(hardware, ram=parse_bytes(ram))
        if link is not None:
            hardware = with_link(hardware, link)
        dtype = stack_dtype(alone, bool(hardware.cards or others))
        profile = find_profile(alone, dtype)
        places = {"": (alone, hardware)} if hardware.cards or not others else {}
        for host, cards in others.items():
            there = alone.on_host(host, hardware.ram, dtype)
            machine = Hardware(imagined(cards, there.gpus), there.host_memory or hardware.ram, hardware.cores)
            places[host] = there, with_link(machine, link) if link is not None else machine
        pictures = 0.0
        for host, (settings, machine) in places.items():
            known = measurements.of(machine, profile, settings.speedups())
            found = choose(settings, profile, known, measurements.terms(settings, profile))
            pictures += found.prediction.pictures_an_hour
            named = ({"name": name} if several else {}) | ({"host": host} if host else {})
            if as_json:
                told.append(as_data(found, profile, machine) | named)
            else:
                show(found, profile, machine, settings.optimize, "".join(f"{part}: " for part in named.values()))
        if len(places) > 1 and not as_json:
            print(f"All hosts together: {pictures:.0f} pictures an hour.")
    if as_json:
        print(json.dumps(told if several or others else told[0]))
    elif several:
        print("Note: models that have jobs at once take turns, and each is planned as if it were alone.")


def parse_host(text: str) -> tuple[str, str]:
    """Split NAME=GPUS; BadRequest."""
    name, equals, cards = text.partition("=")
    if not (equals and cards and NAME.fullmatch(name)):
        raise BadRequest(f"--hosts {text!r} is not right.", 'Write --hosts box=16GB,16GB, or "box=RTX 4090:24GB".')
    return name, cards


def show(found: Plan, profile: ModelProfile, hardware: Hardware, optimize: str, prefix: str) -> None:
    """Print the plan of a model."""
    recipe = profile.recipe
    print(f"{prefix}{profile.model.pipeline}, {recipe.width}x{recipe.height}, {recipe.steps} steps, {recipe.dtype}")
    for card in hardware.cards:
        link_speed = f"{format_bytes(int(card.rate.link))}/s"
        print(f"GPU {card.index}: {card.name}, {format_bytes(card.budget)}, {link_speed} from memory")
    if not hardware.cards:
        print("There is no GPU here. To plan for others: --gpus 16GB,16GB")
    print_table(HEADER, rows(found), wide=1)
    print(summary(found))
    for note in found.notes:
        print(f"Note: {note}.")
    for change in found.better:
        print(f"Better with {change} a picture." if optimize == "throughput" else f"Better with {change} a job.")


def with_recipe(config: StackConfig, options: Mapping[str, Any]) -> StackConfig:
    width, height = options["size"] or (None, None)
    wanted = {"width": width, "height": height} | {name: options[name] for name in ("steps", "cfg_scale", "frames")}
    return config.model_copy(update={name: value for name, value in wanted.items() if value is not None})
