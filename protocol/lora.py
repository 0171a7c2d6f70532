"""LoRAs of a job: how a request names them, and how its recipe does."""

import math
import re
from typing import Annotated

from pydantic import Field

from protocol.data import Data, Digest
from protocol.errors import BadRequest

MAX_LORAS = 8  # of a job
MAX_DIFFERENT = 64  # of a submission
MAX_JOB_BYTES = 4 << 30  # of a job's files together
MAX_LORA_BYTES = 2 << 30  # of a file
LORA_PART_BYTES = 4 << 20  # of a file, in one message
MAX_WEIGHT = 100.0
LORA_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_. -]{0,126}")

LoraName = Annotated[str, Field(max_length=127, pattern=rf"^{LORA_NAME.pattern}$")]


class LoraRequest(Data):
    """A LoRA that a job asks for: an alias of the stack's, or where `digest` is given a file of the client's."""

    name: LoraName
    weight: float = 1.0
    digest: Digest | None = None  # sha256 of the file


class Lora(Data):
    """A LoRA as a picture's bits depend on it."""

    name: LoraName
    digest: Digest  # sha256 of its file
    weight: float
    encoders: bool = False  # it changes text encoders, too


class LoraInfo(Data):
    """A LoRA's file, as far as it can be told without loading it."""

    name: LoraName
    bytes: Annotated[int, Field(ge=0)]
    rank: Annotated[int, Field(ge=0)] = 0  # the largest of its layers'; 0: it can't be told
    base: Annotated[str, Field(max_length=200)] = ""  # the model that it was made for, by its own word or its layers
    triggers: Annotated[str, Field(max_length=300)] = ""  # words that it was trained with, by its own word
    components: Annotated[tuple[str, ...], Field(max_length=8)] = ()  # of this stack's model, that it changes


def parse_lora(text: str) -> tuple[str, float]:
    """Split NAME[@WEIGHT] into name and weight; BadRequest. A name may hold an @ of its own if a weight follows."""
    name, at, weight = text.rpartition("@")
    if not at:
        return text, 1.0
    try:
        value = float(weight)
    except ValueError:
        raise BadRequest(
            f"The weight of --lora {text!r} is {weight!r}, which is no number.", "Write NAME@0.8, for instance."
        ) from None
    check_weight(name, value)
    return name, value


def check_weight(name: str, weight: float) -> None:
    """Raise BadRequest for a weight that means nothing."""
    if not (math.isfinite(weight) and abs(weight) <= MAX_WEIGHT):
        limits = f"It goes from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}."
        raise BadRequest(f"The weight of LoRA {name!r} is {weight}.", limits)
