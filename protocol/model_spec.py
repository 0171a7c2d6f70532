"""The model of a stack, as a person named it, and what is added to it."""

import re
from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import Field

from protocol.data import Data

DEMO = "demo"
PARTS = ("revision", "base", "controlnet", "refiner", "ip_adapter", "transformer")  # of a model, beside its name
MODEL_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"
ModelName = Annotated[str, Field(pattern=f"^{MODEL_NAME}$")]
Choice = Literal["controlnet", "refiner"]  # what jobs may choose to be added to a model
WITH = "+"  # between a model's name and that of what its jobs may choose to be added to it
FullName = Annotated[str, Field(pattern=rf"^{MODEL_NAME}(\{WITH}{MODEL_NAME})?$")]  # of one with that added


def name_of(model: str) -> str:
    """Return the name of a model that was given none: the last part of its folder or hub id."""
    name = PurePath(model).name.removesuffix(".safetensors")
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-_.")[:64] or "model"


def with_added(name: str, added: str | None) -> str:
    """Return the name of a model with a ControlNet or a refiner that jobs choose by name; its own without one."""
    return f"{name}{WITH}{added}" if added else name


class ModelSpec(Data):
    """A model and what is added to it; each a folder, a file or a hub id."""

    name: str = DEMO  # a folder, a hub id, a file of safetensors, or demo
    revision: str | None = None  # of a hub model: branch, tag or commit
    base: str | None = None  # of a file: the model whose configuration it goes by, a folder or a hub id
    controlnet: str | None = None  # for jobs that bring a control image
    refiner: str | None = None  # that makes the last steps
    ip_adapter: str | None = None  # weights, as a path or OWNER/NAME/PATH on the hub
    transformer: str | None = None  # the denoiser's weights in one file, likewise
