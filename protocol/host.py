"""A host of the stack's beside its own: what it has, and what must be equal there for equal bits."""

import importlib.metadata
from typing import Annotated

from pydantic import Field

from protocol.data import Data

Size = Annotated[int, Field(ge=0, le=2**53)]  # bytes, or a number
Word = Annotated[str, Field(max_length=256)]


class HostGpu(Data):
    """A GPU as the host's driver tells it."""

    index: Size
    name: Word
    total_bytes: Size
    free_bytes: Size  # before the host's first worker was started
    link: float = 0.0  # bytes a second from page-locked memory, at most; 0: unknown


class HostFacts(Data):
    """A host as its agent has found it when it was started."""

    hostname: Word
    version: Word  # of Triptych
    versions: Word  # of the libraries that compute a picture
    memory_bytes: Size  # that can be had
    cores: Size
    gpus: Annotated[tuple[HostGpu, ...], Field(max_length=64)] = ()


def library_versions() -> str:
    """Return the versions of the libraries that compute a picture, as they are installed here."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "diffusers", "transformers"))
