"""The plain arguments of a pipeline's call that have no option of their own, found by its annotations."""

import contextlib
import functools
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from diffusers import DiffusionPipeline

from protocol.settings import Setting, SettingKind
from workers.models.tasks import FRAMES, RATE, parameters_of

WITH_OPTIONS = (
    "self", "prompt", "negative_prompt", "height", "width", "num_inference_steps", "guidance_scale", "true_cfg_scale",
    "num_images_per_prompt", "num_videos_per_prompt", "max_sequence_length", "strength", *FRAMES, *RATE,
)  # fmt: skip
# What a job decides, or what is no setting of what is made: outputs, and inner values that stages pass on.
NOT_PLAIN = ("output_type", "return_dict", "generator", "latents", "callback", "embeds", "attention_mask")
PLAIN: dict[Any, SettingKind] = {bool: "bool", int: "int", float: "float", str: "str"}


def settings_of(cls: type[DiffusionPipeline]) -> tuple[Setting, ...]:
    """Return the arguments that `--set` may give to a pipeline class's call, sorted by name."""
    hints = _hints(cls.__call__)
    found = []
    for name, parameter in parameters_of(cls).items():
        if name in WITH_OPTIONS or any(word in name for word in NOT_PLAIN):
            continue
        if kind := kind_of(hints.get(name, parameter.annotation)):
            found.append(Setting(name=name, kind=kind))
    return tuple(sorted(found, key=lambda setting: setting.name))


def tuples_of(cls: type[DiffusionPipeline]) -> frozenset[str]:
    """Return the names of a call's arguments that are tuples; others of several values are lists."""
    return _tuples(cls.__call__)


@functools.cache
def _tuples(call: Callable[..., Any]) -> frozenset[str]:
    hints = _hints(call).items()
    return frozenset(n for n, hint in hints if any(typing.get_origin(m) is tuple for m in members_of(hint)))


@functools.cache
def _hints(call: Callable[..., Any]) -> Mapping[str, Any]:
    try:
        return typing.get_type_hints(call)
    except (NameError, TypeError):  # of what isn't installed: the others, one by one
        return {name: hint for name in call.__annotations__ if (hint := _hint(call, name)) is not None}


def _hint(call: Callable[..., Any], name: str) -> Any:
    alone = types.SimpleNamespace(__annotations__={name: call.__annotations__[name]}, __wrapped__=None)
    with contextlib.suppress(NameError, TypeError):
        return typing.get_type_hints(alone, vars(sys.modules[call.__module__])).get(name)
    return None


def kind_of(hint: Any) -> SettingKind | None:
    """Return the kind of an argument by its annotation; None where it isn't plain."""
    members = [member for member in members_of(hint) if member is not type(None) and not is_nested(member)]
    kinds = [plain_kind(member) for member in members]
    if not kinds or None in kinds:
        return None
    singles = [kind for kind in kinds if kind in PLAIN.values()]
    return singles[0] if singles else kinds[0]


def is_nested(hint: Any) -> bool:
    """Return whether a hint is of lists of lists of plain values: of several pictures, where one has a plain list."""
    inner = [member for member in flat(hint) if typing.get_origin(member) is list]
    return typing.get_origin(hint) is list and bool(inner) and all(plain_kind(member) for member in inner)


def members_of(hint: Any) -> Iterable[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def plain_kind(hint: Any) -> SettingKind | None:
    if hint in PLAIN:
        return PLAIN[hint]
    if typing.get_origin(hint) in (list, tuple):
        inner = set(flat(hint)) - {...}
        if inner <= {int}:
            return "ints"
        if inner <= {int, float}:
            return "floats"
        if inner <= {str}:
            return "str"
    return None


def flat(hint: Any) -> Iterator[Any]:
    for member in typing.get_args(hint):
        yield from members_of(member)
