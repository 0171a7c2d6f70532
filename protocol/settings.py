"""Further arguments of a pipeline's call, as `--set NAME=VALUE` gives them: by name, of plain kinds, checked."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

from protocol.data import Data, Int64
from protocol.errors import BadRequest

SettingKind = Literal["bool", "int", "float", "str", "ints", "floats"]
Number = bool | Int64 | float
Value = Number | Annotated[str, Field(max_length=100_000)] | Annotated[tuple[Number, ...], Field(max_length=4096)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
Given = Annotated[tuple[tuple[Name, Annotated[str, Field(max_length=100_000)]], ...], Field(max_length=64)]
Settings = Annotated[tuple[tuple[Name, Value], ...], Field(max_length=64)]
TRUTHS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class Setting(Data):
    """An argument that a pipeline takes."""

    name: Name
    kind: SettingKind


def number(text: str) -> float:
    found = float(text)
    if not math.isfinite(found):
        raise ValueError
    return found


def whole(text: str) -> int:
    found = int(text)
    if not -(2**63) <= found < 2**63:
        raise ValueError
    return found


def truth(text: str) -> bool:
    return TRUTHS[text.lower()]


READ: Mapping[SettingKind, tuple[str, Callable[[str], Value]]] = {
    "bool": ("true or false", truth),
    "int": ("a whole number of 64 bits", whole),
    "float": ("a number", number),
    "str": ("a text", str),
    "ints": ("whole numbers with commas", lambda text: tuple(whole(part) for part in text.split(","))),
    "floats": ("numbers with commas", lambda text: tuple(number(part) for part in text.split(","))),
}


def read_settings(given: Given, known: Sequence[Setting], pipeline: str) -> Settings:
    """Return settings by their kinds, sorted by name; BadRequest for what a pipeline doesn't take."""
    kinds = {setting.name: setting.kind for setting in known}
    found: dict[str, Value] = {}
    for name, text in given:
        if name not in kinds:
            raise BadRequest(f"{pipeline} has no setting {name!r}.", f"It has {', '.join(kinds) or 'none'}.")
        if name in found:
            raise BadRequest(f"The setting {name!r} is given twice.", "Give it once.")
        words, read = READ[kinds[name]]
        try:
            found[name] = read(text.strip() if kinds[name] != "str" else text)
        except (ValueError, KeyError, OverflowError):
            raise BadRequest(f"{name} is {text[:100]!r}; it should be {words}.", f"As in --set {name}=…") from None
    return tuple(sorted(found.items()))


def as_given(settings: Settings) -> Given:
    """Return settings as a request gives them."""
    return tuple((name, text_of(value)) for name, value in settings)


def text_of(value: Value) -> str:
    if isinstance(value, tuple):
        return ",".join(map(text_of, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
