"""Messages between the describer, a process without weights, and the orchestrator."""

from typing import Annotated

from pydantic import Field

from protocol.data import Text
from protocol.job import MAX_IMAGES_IN, Recipe
from protocol.lora import Lora, LoraInfo, LoraRequest
from protocol.messages.common import MAX_JOBS, Beat, Count, Error, Heartbeat, Line, Message, Name, Welcome
from protocol.model import ModelDescription
from protocol.route import Route, Shape

MOST_LORAS = 2000  # that are listed


class DescriberHello(Message):
    """First word of the process without weights: it has found the model to be whole, and says what it takes."""

    kind = "describer-hello"
    name: Annotated[str, Field(max_length=64)] = ""  # of the model in the stack
    pid: Count
    dtype: Name  # of the stack
    speedups: Annotated[tuple[Name, ...], Field(max_length=16)] = ()
    model: ModelDescription


class TokenCounts(Message):
    """The number of tokens of each text of a question; none, and the reason, where they can't be counted."""

    kind = "token-counts"
    request: Count
    counts: Annotated[tuple[Count, ...], Field(max_length=2 * MAX_JOBS)] = ()
    reason: Line = ""


class CountTokens(Message):
    kind = "count-tokens"
    request: Count
    texts: Annotated[tuple[Text, ...], Field(max_length=2 * MAX_JOBS)]


class LookAt(Message):
    """Ask for the route of jobs of this template."""

    kind = "look-at"
    request: Count
    recipe: Recipe
    shapes: Annotated[tuple[Shape, ...], Field(max_length=MAX_IMAGES_IN + 2)] = ()  # of its pictures


class Looked(Message):
    kind = "looked"
    request: Count
    route: Route


class FindLora(Message):
    """Ask for a LoRA's file, and whether all of it is for the model."""

    kind = "find-lora"
    request: Count
    lora: LoraRequest


class FoundLora(Message):
    """The LoRA; or none, and the reason as a line and a hint."""

    kind = "found-lora"
    request: Count
    lora: Lora | None = None
    bytes: Count = 0  # of its file
    reason: Line = ""
    hint: Line = ""


class ListLoras(Message):
    kind = "list-loras"
    request: Count


class KnownLoras(Message):
    """All LoRAs that have a name in the stack."""

    kind = "known-loras"
    request: Count
    loras: Annotated[tuple[LoraInfo, ...], Field(max_length=MOST_LORAS)] = ()


FROM_DESCRIBER: tuple[type[Message], ...] = (DescriberHello, TokenCounts, Looked, FoundLora, KnownLoras, Heartbeat)
TO_DESCRIBER: tuple[type[Message], ...] = (Welcome, CountTokens, LookAt, FindLora, ListLoras, Beat, Error)
