"""Hypothesis strategies for every message, made from its fields' types."""

import types
import typing
from typing import Any, Literal, get_args, get_origin

from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from protocol.messages.common import Message
from protocol.tensors import ITEMSIZE, Tensor

TEXT = st.text(max_size=40)


def of_model(cls: type[BaseModel]) -> st.SearchStrategy[Any]:
    return st.builds(cls, **{name: of_field(field) for name, field in cls.model_fields.items()})


def of_field(field: FieldInfo) -> st.SearchStrategy[Any]:
    bounds = {}
    for item in field.metadata:
        if getattr(item, "pattern", None):
            return st.from_regex(item.pattern, fullmatch=True)
        for name in ("ge", "le", "min_length"):
            if getattr(item, name, None) is not None:
                bounds[name] = getattr(item, name)
    return of_type(field.annotation, bounds)


def of_type(kind: Any, bounds: dict[str, int]) -> st.SearchStrategy[Any]:
    origin = get_origin(kind)
    if origin is typing.Annotated:
        base, *metadata = get_args(kind)
        return of_field(FieldInfo.from_annotation(kind)) if metadata else of_type(base, bounds)
    if origin is Literal:
        return st.sampled_from(get_args(kind))
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*(of_type(part, bounds) for part in get_args(kind)))
    if origin is tuple:
        parts = get_args(kind)
        if parts[-1] is Ellipsis:
            return st.lists(of_type(parts[0], {}), min_size=bounds.get("min_length", 0), max_size=3).map(tuple)
        return st.tuples(*(of_type(part, {}) for part in parts))
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return of_model(kind)
    return {
        str: TEXT,
        bytes: st.binary(max_size=40),
        bool: st.booleans(),
        float: st.floats(allow_nan=False),
        int: st.integers(max(bounds.get("ge", -(2**60)), -(2**60)), min(bounds.get("le", 2**60), 2**60)),
        type(None): st.none(),
    }[kind]


def messages(cls: type[Message]) -> st.SearchStrategy[Message]:
    return of_model(cls)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(sorted(ITEMSIZE)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    size = ITEMSIZE[dtype]
    for n in shape:
        size *= n
    return Tensor(draw(st.text(min_size=1, max_size=20)), dtype, shape, draw(st.binary(min_size=size, max_size=size)))
