"""A stack's configuration: flags over TRIPTYCH_* variables over a TOML file over the defaults of settings.py.

model = "black-forest-labs/FLUX.1-dev"
dtype = "bfloat16"

[gpus]
0 = "16GB"
1 = "all"

[stages.text]
gpus = [1]

[stages.denoise]
gpus = [0]

A stack of several models has a table for each, whose settings lie over those of the stack:

model = "flux"  # the default

[models.flux]
model = "black-forest-labs/FLUX.1-dev"

[models.turbo]
model = "Tongyi-MAI/Z-Image-Turbo"
stages.text.keep_alive = 60
"""

import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from orchestrator.settings import ModelConfig, StackConfig, StageConfig
from protocol.errors import BadRequest
from protocol.stages import STAGES, Stage


def load_config(path: Path | None, flags: dict[str, Any], stage_flags: dict[Stage, dict[str, Any]]) -> StackConfig:
    """The settings of a file, with flags laid over it; BadRequest names the entry that is wrong."""
    data: dict[str, Any] = {}
    if path is not None:
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise BadRequest(f"The configuration {str(path)!r} can't be read: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise BadRequest(f"The configuration {str(path)!r} is not UTF-8 text.", "Save it as UTF-8.") from error
        except tomllib.TOMLDecodeError as error:
            raise BadRequest(f"The configuration {str(path)!r} is not valid TOML: {error}.") from error
    if "models" in flags:
        data.pop("model", None)
    data |= flags
    stages = data.setdefault("stages", {})
    for stage, values in stage_flags.items():
        if isinstance(stages, dict) and isinstance(stages.setdefault(stage, {}), dict):
            stages[stage] |= values
    try:
        return StackConfig.model_validate(data)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = fault["loc"]
        if place[:1] == ("models",) and len(place) > 2 and place[2] != "[key]":
            place = place[2:]  # a setting of one of several models is one of a model's
        where, said = ".".join(map(str, fault["loc"])), fault["msg"].removeprefix("Value error, ")
        fits = _fits(fault["type"], place, place != fault["loc"])
        if place[:1] == ("stages",) and place[-1] == "[key]":
            where, said = where.removesuffix(".[key]"), "there is no such stage"
            fits = f"Stages are {', '.join(STAGES)}."
        if place[:1] == ("models",) and place[-1] == "[key]":
            where, said = where.removesuffix(".[key]"), "this is no name of a model"
            fits = "Names are letters, digits and the signs . _ -"
        if place[-1:] == ("device",):
            said, fits = f"{fault['input']!r} is no device", "Write auto, cpu, cuda, cuda:0 or mps."
        if not where:
            raise BadRequest(f"The settings don't go together: {said}.") from error
        raise BadRequest(f"The setting {where!r} is not valid: {said}.", fits) from error


def _fits(kind: str, place: tuple[int | str, ...], of_model: bool) -> str:
    if kind != "extra_forbidden":
        return ""
    of_stage = place[0] == "stages" and len(place) > 2
    known = StageConfig if of_stage else ModelConfig if of_model else StackConfig
    return f"Known settings are {', '.join(known.model_fields)}."


def parse_stage_values(option: str, values: tuple[str, ...], every_stage: bool) -> dict[Stage, str]:
    """'denoise=2' gives one stage a value; a bare value, where allowed, gives it to all three."""
    found: dict[Stage, str] = {}
    for value in values:
        name, equals, rest = value.partition("=")
        if not equals and every_stage:
            found |= {stage: value for stage in STAGES if stage not in found}
        elif equals and name in STAGES and rest:
            found[name] = rest
        else:
            shape = f"{option} STAGE=VALUE" + (f" or {option} VALUE" if every_stage else "")
            raise BadRequest(
                f"{option} {value!r} is not right.", f"Write {shape}, with STAGE one of {', '.join(STAGES)}."
            )
    return found
