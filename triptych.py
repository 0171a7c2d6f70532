"""Triptych's public face: `Client`, `AsyncClient` and the errors. Everything else may change between releases."""

from importlib.metadata import version

from protocol.client.async_client import AsyncClient
from protocol.client.client import Client
from protocol.errors import (
    BadRequest,
    Conflict,
    DoesNotFit,
    JobCancelled,
    JobFailed,
    ModelMissing,
    NoStack,
    NotFound,
    ProtocolError,
    QueueFull,
    TriptychError,
    VersionMismatch,
    WaitTimeout,
)
from protocol.job import Job, JobRequest, Recipe
from protocol.messages.client import JobEvent

__version__ = version("triptych")
__all__ = [
    "AsyncClient",
    "BadRequest",
    "Client",
    "Conflict",
    "DoesNotFit",
    "Job",
    "JobCancelled",
    "JobEvent",
    "JobFailed",
    "JobRequest",
    "ModelMissing",
    "NoStack",
    "NotFound",
    "ProtocolError",
    "QueueFull",
    "Recipe",
    "TriptychError",
    "VersionMismatch",
    "WaitTimeout",
    "__version__",
]
