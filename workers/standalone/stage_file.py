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

FORMAT = "triptych-stage-2"


def write(path: Path, following: Stage, recipe: Recipe, tensors: list[Tensor]) -> None:
    """Save the record of the stages so far, for the one that is next."""
    metadata = {"format": FORMAT, "next": following, "recipe": recipe.model_dump_json()}
    save_file({t.name: from_wire(t).clone() for t in tensors}, path, metadata)


def read(path: Path, stage: Stage) -> tuple[Recipe, tuple[Tensor, ...]]:
    """Read the recipe and the record that were left for a stage; BadRequest for any other file."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            names = sorted(file.keys(), key=_by_number)
            tensors: list[tuple[str, torch.Tensor]] = [(name, file.get_tensor(name)) for name in names]
        if metadata.get("format") != FORMAT:
            raise BadRequest(
                f"{str(path)!r} was not written by a stage.", "Begin with: triptych worker text --standalone."
            )
        recipe = Recipe.model_validate_json(metadata["recipe"])
    except (OSError, SafetensorError, ValidationError, ValueError, KeyError) as error:
        raise BadRequest(f"{str(path)!r} can't be read as a stage's output: {error}".splitlines()[0]) from error
    if metadata["next"] != stage:
        raise BadRequest(
            f"{str(path)!r} is for the {metadata['next']} stage.",
            f"Continue with: triptych worker {metadata['next']} --standalone -i {path}.",
        )
    return recipe, tuple(to_wire(name, tensor) for name, tensor in tensors)


def _by_number(name: str) -> tuple[str, int]:
    base, _, number = name.partition(".")
    return base, int(number) if number.isdigit() else -1
