"""The file that passes between stages that run alone: a safetensors file with the job's recipe in its metadata."""

from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from protocol.errors import BadRequest
from protocol.job import Recipe
from protocol.stages import Stage
from protocol.tensors import Tensor
from workers.tensors import from_wire, to_wire

FORMAT = "triptych-stage-1"


def write(path: Path, stage: Stage, recipe: Recipe, tensors: list[Tensor]) -> None:
    """Save what `stage` made."""
    metadata = {"format": FORMAT, "stage": stage, "recipe": recipe.model_dump_json()}
    save_file({t.name: from_wire(t).clone() for t in tensors}, path, metadata)


def read(path: Path, expected: Stage) -> tuple[Recipe, tuple[Tensor, ...]]:
    """The recipe and tensors that the stage `expected` left; BadRequest for any other file."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            names = sorted(file.keys(), key=_by_number)
            tensors: list[tuple[str, torch.Tensor]] = [(name, file.get_tensor(name)) for name in names]
        if metadata.get("format") != FORMAT:
            raise BadRequest(
                f"{str(path)!r} was not written by a stage.", f"It should come from: triptych worker {expected}."
            )
        recipe = Recipe.model_validate_json(metadata["recipe"])
    except (OSError, SafetensorError, ValidationError, ValueError, KeyError) as error:
        raise BadRequest(f"{str(path)!r} can't be read as a stage's output: {error}".splitlines()[0]) from error
    if metadata["stage"] != expected:
        raise BadRequest(
            f"{str(path)!r} was written by the {metadata['stage']} stage.", f"This needs the {expected} stage's."
        )
    return recipe, tuple(to_wire(name, tensor) for name, tensor in tensors)


def _by_number(name: str) -> tuple[str, int]:
    base, _, number = name.partition(".")
    return base, int(number) if number.isdigit() else -1
