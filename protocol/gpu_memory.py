"""GPUs and their memory: what a stage needs of it, and what is leased to a worker."""

from typing import Annotated, NamedTuple

from pydantic import Field

from protocol.data import Data


class GpuId(NamedTuple):
    """A GPU of one of the hosts: the host's name, and the number that its driver gives it."""

    host: str
    number: int

    def __str__(self) -> str:
        return str(self.number)


class WeightNeed(Data):
    """The bytes of a GPU's memory that a stage needs."""

    weights: Annotated[int, Field(ge=0)]  # all of them
    least: Annotated[int, Field(ge=0)]  # of weights, where as much of them as can be is streamed
    workspace: Annotated[int, Field(ge=0)]  # beside them, for a picture of 1024 × 1024; an estimate that errs high


class Lease(Data):
    """The bytes of one GPU that a worker may use beside its context."""

    bytes: Annotated[int, Field(ge=0)]
    weight_bytes: Annotated[int, Field(ge=0)]  # of them, at most, for weights
