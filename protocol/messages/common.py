"""Messages that several kinds of peers send and receive."""

from typing import Annotated, ClassVar

from pydantic import Field

from protocol.data import Data
from protocol.gpu_memory import Lease
from protocol.job import JobId
from protocol.stages import Stage

MOST_MODELS = 256  # of a stack
MAX_JOBS = 1024  # in one Submit, and ids in one question
MAX_PARTS = 4096  # of a job's pictures
MOST_PREVIEWED = 500_000  # bytes of a preview
MOST_LISTED = 100  # jobs in one answer that weren't asked for by id
Name = Annotated[str, Field(max_length=128)]
ProcessName = Annotated[str, Field(max_length=512)]  # MODEL-STAGE-NUMBER@HOST
Line = Annotated[str, Field(max_length=10_000)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Counts = Annotated[tuple[Count, ...], Field(max_length=64)]  # one for each GPU
Leases = Annotated[tuple[Lease, ...], Field(max_length=64)]
JobIds = Annotated[tuple[JobId, ...], Field(max_length=MAX_JOBS)]


class Message(Data):
    kind: ClassVar[str]


class Error(Message):
    """The answer to what can't be done; `request` is 0 where the question couldn't be read.

    `item` tells which of several jobs of a submission is at fault, counted from 0.
    """

    kind = "error"
    request: Count = 0
    code: Name
    message: Line
    hint: Line = ""
    item: Count | None = None


class Heartbeat(Message):
    """A sign of life from the worker's own loop, every second or so."""

    kind = "heartbeat"
    rss_bytes: Count
    gpu_bytes: Count


class Welcome(Message):
    kind = "welcome"
    heartbeat_seconds: float


class Beat(Message):
    """Answer to a heartbeat, or to the supervisor's hello: a peer that hears none knows that something is wrong."""

    kind = "beat"
    proven: Annotated[tuple[Count, ...], Field(max_length=4096)] = ()  # processes that work; to a supervisor


class TaskKey(Message):
    """The job, the stage and the number of the try that a message is about."""

    job: JobId
    stage: Stage
    attempt: Count
