"""Components of other stages: real classes and configurations on the meta device, said to be on the stage's own."""

from typing import Any

import torch

MARK = "_triptych_placeholder"


def is_placeholder(component: torch.nn.Module) -> bool:
    return MARK in component.__dict__


def of_the_same_name(cls: type, **attributes: Any) -> type:
    """Return a subclass with some attributes, by the name and module that libraries know the class by."""
    return type(cls.__name__, (cls,), {"__module__": cls.__module__, "__qualname__": cls.__qualname__, **attributes})


def where_another_is(cls: type, pipeline: Any) -> Any:
    """Return a pipeline's class, with the devices that another one, which it works for, has at any time."""
    device, computing = property(lambda _: pipeline.device), property(lambda _: pipeline._execution_device)
    return of_the_same_name(cls, device=device, _execution_device=computing)


def said_to_be(module: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """Let a module on the meta device say that it is on `device`, as pipelines ask; `to` changes but its dtype.

    Its class keeps its name and module, by which pipelines and libraries know it.
    """
    cls = type(module)

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            found = value.dtype if isinstance(value, torch.Tensor) else value
            if isinstance(found, torch.dtype):
                self.__dict__[MARK] = found
                cls.to(self, dtype=found)
        return self

    dtype_now = property(lambda self: self.__dict__[MARK])
    module.__class__ = of_the_same_name(cls, device=property(lambda self: device), dtype=dtype_now, to=to)
    module.__dict__[MARK] = dtype
    return module.eval()
