"""Clients' questions, and the orchestrator's answers and events."""

from typing import Annotated

from pydantic import Field

from protocol.data import Digest
from protocol.job import Job, JobId, JobRequest, JobState
from protocol.lora import LoraInfo
from protocol.messages.common import (
    MAX_JOBS,
    MAX_PARTS,
    MOST_LISTED,
    MOST_PREVIEWED,
    Count,
    Error,
    JobIds,
    Line,
    Message,
    Name,
)
from protocol.metrics import Metric
from protocol.model import ModelDescription
from protocol.model_spec import FullName, ModelName, ModelSpec
from protocol.stages import Stage
from protocol.views import GpuView, HostView, ModelView, Placing, ProcessView, WorkerView

ModelOf = Annotated[str, Field(max_length=4096)] | None  # its name in the stack; None: the default one


class Question(Message):
    """`owner` names the key on whose behalf this machine's user asks, as the HTTP process does; empty: on its own."""

    request: Count
    owner: Annotated[str, Field(max_length=64)] = ""


class Submit(Question):
    """Jobs to accept, all or none; or only to be judged, as if so many `earlier` ones had been accepted before."""

    kind = "submit"
    jobs: Annotated[tuple[JobRequest, ...], Field(min_length=1, max_length=MAX_JOBS)]
    watch: bool = False
    judge: bool = False
    earlier: Count = 0


class Watch(Question):
    """Tell of these jobs from now on; the answer is how they stand."""

    kind = "watch"
    jobs: JobIds


class GetJobs(Question):
    """These jobs, or the newest `limit` in `states`, of those with lower numbers than `before`; 0: of all."""

    kind = "get-jobs"
    jobs: JobIds = ()
    states: tuple[JobState, ...] = ()
    before: Count = 0
    limit: Annotated[int, Field(ge=1, le=MOST_LISTED)] = 100


class FetchPictures(Question):
    """A part of a job's pictures: of many, or of a video's frames, there are several."""

    kind = "fetch-pictures"
    job: JobId
    part: Annotated[int, Field(ge=0, le=MAX_PARTS)] = 0


class GetPreview(Question):
    """Ask how a job's picture will look; whoever asks again within seconds has newer ones made."""

    kind = "get-preview"
    job: JobId


class Cancel(Question):
    kind = "cancel"
    jobs: JobIds


class Retry(Question):
    """Run failed or cancelled jobs again from their last finished stage."""

    kind = "retry"
    jobs: JobIds


class GetWorkers(Question):
    kind = "get-workers"


class GetStack(Question):
    kind = "get-stack"


class GetMetrics(Question):
    kind = "get-metrics"


class Restart(Question):
    kind = "restart"
    stage: Stage


class Scale(Question):
    kind = "scale"
    model: ModelOf = None
    stage: Stage
    count: Annotated[int, Field(ge=0, le=1024)]


class GetHosts(Question):
    kind = "get-hosts"


class PlaceOnHost(Question):
    """Give a host nothing new to do (cordoned), nor let it keep what it has (drained), or let it work again."""

    kind = "place-on-host"
    host: Name
    placing: Placing


class Drain(Question):
    """Give a stage's workers nothing more to do; or, with `on` False, again."""

    kind = "drain"
    stage: Stage
    on: bool = True


class CollectGarbage(Question):
    """Remove jobs that ended longer ago than `older`, with what they left."""

    kind = "collect-garbage"
    older: Count  # seconds


class GetLoras(Question):
    kind = "get-loras"
    model: ModelOf = None


class GetModels(Question):
    kind = "get-models"


class LoadModel(Question):
    """Start the workers of a model; or, with `load` False, end them until a job asks for it."""

    kind = "load-model"
    model: ModelOf
    load: bool = True


class AddModel(Question):
    """Add a model to the running stack; a name that is taken by the very same model is no error."""

    kind = "add-a-model"
    model: ModelName
    spec: ModelSpec


class RemoveModel(Question):
    """Remove a model from the running stack, which must have no unfinished jobs."""

    kind = "remove-a-model"
    model: FullName


class OfferLora(Question):
    """Ask how many bytes of a LoRA's file are here, before it is sent."""

    kind = "offer-lora"
    digest: Digest
    bytes: Count


class PutLora(Question):
    """A part of a LoRA's file, from `offset` on: the tensor beside it, uint8."""

    kind = "put-lora"
    digest: Digest
    offset: Count


class Jobs(Message):
    kind = "jobs"
    request: Count
    jobs: tuple[Job, ...]


class JobEvent(Message):
    """A change in a watched job; `step` counts within `state`."""

    kind = "job-event"
    job: JobId
    state: JobState
    running: bool  # a worker has its task
    step: Count = 0
    steps: Count = 0
    cached: bool = False
    queue_position: Count = 0  # jobs before it in its queue
    reason: Line = ""


class Pictures(Message):
    """The tensor `pictures` beside it is uint8 (n, height, width, 3), RGB: pictures, or frames of videos, in order.

    Beside the first part there may be `sound`, float32 (videos, channels, samples), and `sound_rate`, int32 (1,).
    """

    kind = "pictures"
    request: Count
    job: Job
    parts: Count = 1  # that there are


class Preview(Message):
    """A JPEG of how a job's picture will look, by what is known after so many steps; empty while there is none."""

    kind = "preview"
    request: Count
    step: Count
    steps: Count
    file: Annotated[bytes, Field(max_length=MOST_PREVIEWED)] = b""


class Workers(Message):
    kind = "workers"
    request: Count
    workers: tuple[WorkerView, ...]
    processes: tuple[ProcessView, ...]
    drained: tuple[Stage, ...] = ()
    gpus: tuple[GpuView, ...] = ()


class Stack(Message):
    """The stack itself: its version, its default model once known, and how many jobs stand where.

    `waiting_seconds` are what nobody has begun takes of workers, as far as that is known.
    """

    kind = "stack"
    request: Count
    version: Name
    pid: Count
    started: float
    model: ModelDescription | None
    speedups: tuple[Name, ...]
    counts: tuple[tuple[JobState, int], ...]
    queue_limit: Count
    waiting_seconds: float = 0.0


class Metrics(Message):
    """What was counted since the orchestrator was started."""

    kind = "metrics"
    request: Count
    metrics: Annotated[tuple[Metric, ...], Field(max_length=64)]


class Collected(Message):
    """The jobs and bytes that were removed."""

    kind = "collected"
    request: Count
    jobs: Count
    bytes: Count


class Hosts(Message):
    """The hosts of the stack beside its own."""

    kind = "hosts"
    request: Count
    hosts: tuple[HostView, ...]


class Loras(Message):
    """The LoRAs that have a name in the stack."""

    kind = "loras"
    request: Count
    loras: tuple[LoraInfo, ...]


class Models(Message):
    """The models of the stack that are known, the default one first."""

    kind = "models"
    request: Count
    models: tuple[ModelView, ...]


class LoraHere(Message):
    """So many bytes of a LoRA's file are here; all of them: it can be used."""

    kind = "lora-here"
    request: Count
    bytes: Count


class Done(Message):
    """The answer to a question that was done, with nothing more to say."""

    kind = "done"
    request: Count


FROM_CLIENT: tuple[type[Message], ...] = (
    Submit,
    Watch,
    GetJobs,
    FetchPictures,
    GetPreview,
    Cancel,
    Retry,
    GetWorkers,
    GetStack,
    GetMetrics,
    Restart,
    Scale,
    Drain,
    GetHosts,
    PlaceOnHost,
    CollectGarbage,
    GetLoras,
    GetModels,
    LoadModel,
    AddModel,
    RemoveModel,
    OfferLora,
    PutLora,
)
TO_CLIENT: tuple[type[Message], ...] = (
    Jobs, JobEvent, Pictures, Preview, Workers, Stack, Metrics, Collected, Loras, Models, LoraHere, Hosts,
    Done, Error,
)  # fmt: skip
