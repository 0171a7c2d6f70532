"""The messages of protocol version 1: one small class a kind, unknown fields refused.

`request` is the client's number for its question; the answer carries it back. Tensors travel beside a message, as
frames: see wire.py.
"""

from typing import Annotated, ClassVar

from pydantic import Field

from protocol.jobs import (
    ComponentView,
    Data,
    Grant,
    Job,
    JobId,
    JobRequest,
    JobState,
    ModelDescription,
    Needs,
    ProcessView,
    Recipe,
    Stage,
    Text,
    WorkerView,
)

MAX_JOBS = 1024  # in one Submit, and ids in one question
MOST_LISTED = 1000  # jobs in one answer that weren't asked for by id
Name = Annotated[str, Field(max_length=128)]
Line = Annotated[str, Field(max_length=10_000)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Counts = Annotated[tuple[Count, ...], Field(max_length=64)]  # one for each GPU
Grants = Annotated[tuple[Grant, ...], Field(max_length=64)]
JobIds = Annotated[tuple[JobId, ...], Field(max_length=MAX_JOBS)]


class Message(Data):
    kind: ClassVar[str]


# -- both ways --------------------------------------------------------------------------------------


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


# -- worker → orchestrator --------------------------------------------------------------------------


class WorkerHello(Message):
    """First word of each incarnation."""

    kind = "worker-hello"
    name: Name
    stage: Stage
    pid: Count
    host: Name
    device: Name
    device_kind: Name = ""  # cpu, or a GPU's name
    versions: Name = ""  # of the libraries that it computes with
    dtype: Name
    model: ModelDescription
    speedups: Annotated[tuple[Name, ...], Field(max_length=16)] = ()  # of its whole stack
    gpus: Counts = ()  # it works in leases of these GPUs' memory; none: in memory of its own
    part: Count = 0  # where one process is several workers, which of them; the first one has their leases
    parts: Annotated[int, Field(ge=1, le=64)] = 1  # how many they are


class Ready(Message):
    """The model is loaded and the hands are free: exactly one task, or a lease, may come.

    With `in_hand` they are not: a worker that has come back still works at that task, or has its result.
    """

    kind = "ready"
    device_map: tuple[tuple[str, str], ...] = ()
    residency: tuple[ComponentView, ...] = ()
    needs: Annotated[tuple[Needs, ...], Field(max_length=64)] = ()  # of each of its GPUs, where it works in leases
    context_bytes: Counts = ()  # of its CUDA contexts with their libraries
    kept_bytes: Counts = ()  # that it holds beside contexts and leases, whatever it gives back
    grants: Grants = ()  # that it holds
    in_hand: tuple[JobId, Stage, Count] | None = None  # job, stage, attempt


class Leased(Message):
    """A lease is in force; after one of nothing all is given back, which the driver confirms.

    `kept_bytes` are what the process holds beside its context and any lease, as last measured: nobody can ask for them.
    """

    kind = "leased"
    grants: Grants
    kept_bytes: Counts = ()
    context_bytes: Counts = ()
    residency: tuple[ComponentView, ...] = ()
    reason: Line = ""  # why the weights could not be brought in; then nothing is held


class Heartbeat(Message):
    """From the worker's own loop, every second or so."""

    kind = "heartbeat"
    rss_bytes: Count
    gpu_bytes: Count


class TaskKey(Message):
    """Which try of which stage of which job a message is about."""

    job: JobId
    stage: Stage
    attempt: Count


class Progress(TaskKey):
    """Some steps are done, and more are to come. A checkpoint of `saved` steps may lie beside it, for any worker."""

    kind = "progress"
    step: Count
    steps: Count
    saved: Count = 0


class Result(TaskKey):
    """A stage's outcome, its tensors beside it. Kept by the worker until the orchestrator says Committed."""

    kind = "result"
    seconds: float
    peak_bytes: Count = 0
    workspace_bytes: Count = 0  # of a GPU's memory beside the weights, at most
    warnings: Annotated[tuple[Line, ...], Field(max_length=16)] = ()


class TaskFailed(TaskKey):
    """`retry` is False where another try can't help."""

    kind = "task-failed"
    reason: Line
    retry: bool
    cancelled: bool = False
    out_of_memory: bool = False


class WorkerGoodbye(Message):
    kind = "worker-goodbye"


# -- describer → orchestrator -----------------------------------------------------------------------


class DescriberHello(Message):
    """First word of the process without weights: it has found the model to be whole, and says what it takes."""

    kind = "describer-hello"
    pid: Count
    dtype: Name  # of the stack
    speedups: Annotated[tuple[Name, ...], Field(max_length=16)] = ()
    model: ModelDescription


class TokenCounts(Message):
    """How many tokens each text of a question has; none, and why, where they can't be counted."""

    kind = "token-counts"
    request: Count
    counts: Annotated[tuple[Count, ...], Field(max_length=2 * MAX_JOBS)] = ()
    reason: Line = ""


# -- orchestrator → describer -----------------------------------------------------------------------


class CountTokens(Message):
    kind = "count-tokens"
    request: Count
    texts: Annotated[tuple[Text, ...], Field(max_length=2 * MAX_JOBS)]


# -- orchestrator → worker --------------------------------------------------------------------------


class Welcome(Message):
    kind = "welcome"
    heartbeat_seconds: float


class Task(TaskKey):
    """One stage of one job; the tensors of the stage before it lie beside it."""

    kind = "task"
    recipe: Recipe
    make_do: bool = True  # no more GPU memory can be had than there is; else running short of it is to be told


class Lease(Message):
    """From now on a worker may use so much of its GPUs; of nothing, it gives all back. It comes only to free hands."""

    kind = "lease"
    grants: Grants  # one for each GPU, all of them of something or all of nothing


class CancelTask(TaskKey):
    kind = "cancel-task"


class Committed(TaskKey):
    """The result is safe, or superseded; the worker lets go of it."""

    kind = "committed"


class Beat(Message):
    """Answer to a heartbeat, or to the supervisor's hello: who hears none knows that something is wrong."""

    kind = "beat"
    proven: Annotated[tuple[Count, ...], Field(max_length=4096)] = ()  # processes that work; to a supervisor


# -- supervisor ↔ orchestrator ----------------------------------------------------------------------


class SupervisorHello(Message):
    kind = "supervisor-hello"
    pid: Count


class Processes(Message):
    """All processes that the supervisor keeps, whenever one changes."""

    kind = "processes"
    processes: Annotated[tuple[ProcessView, ...], Field(max_length=4096)]
    exited_pids: Annotated[tuple[Count, ...], Field(max_length=4096)] = ()
    stopped_pids: Annotated[tuple[Count, ...], Field(max_length=4096)] = ()  # of them, which no task can have ended


class SetScale(Message):
    kind = "set-scale"
    stage: Stage
    count: Annotated[int, Field(ge=0, le=1024)]


class RestartProcess(Message):
    """End a worker's process in good order, and start another."""

    kind = "restart-process"
    name: Name


class KillProcess(Message):
    """A process has shown no sign of life, or of progress: it is to be ended, and another started."""

    kind = "kill-process"
    pid: Count
    reason: Line


# -- client → orchestrator --------------------------------------------------------------------------


class Question(Message):
    request: Count


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
    kind = "fetch-pictures"
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


class Restart(Question):
    kind = "restart"
    stage: Stage


class Scale(Question):
    kind = "scale"
    stage: Stage
    count: Annotated[int, Field(ge=0, le=1024)]


class Drain(Question):
    """Give a stage's workers nothing more to do; or, with `on` False, again."""

    kind = "drain"
    stage: Stage
    on: bool = True


class CollectGarbage(Question):
    """Remove jobs that ended longer ago than `older`, with what they left."""

    kind = "collect-garbage"
    older: Count  # seconds


# -- orchestrator → client --------------------------------------------------------------------------


class Jobs(Message):
    kind = "jobs"
    request: Count
    jobs: tuple[Job, ...]


class JobEvent(Message):
    """Something moved in a watched job; `step` counts within `state`."""

    kind = "job-event"
    job: JobId
    state: JobState
    running: bool  # a worker has it in hand
    step: Count = 0
    steps: Count = 0
    cached: bool = False
    ahead: Count = 0  # jobs before it in its queue
    reason: Line = ""


class Pictures(Message):
    """The frame `pictures` beside it is uint8 (n, height, width, 3), RGB."""

    kind = "pictures"
    request: Count
    job: Job


class Workers(Message):
    kind = "workers"
    request: Count
    workers: tuple[WorkerView, ...]
    processes: tuple[ProcessView, ...]
    drained: tuple[Stage, ...] = ()


class Stack(Message):
    """The stack itself: its version, its model once known, and how many jobs stand where."""

    kind = "stack"
    request: Count
    version: Name
    pid: Count
    started: float
    model: ModelDescription | None
    speedups: tuple[Name, ...]
    counts: tuple[tuple[JobState, int], ...]
    queue_limit: Count


class Collected(Message):
    """What was removed."""

    kind = "collected"
    request: Count
    jobs: Count
    bytes: Count


class Done(Message):
    """It was done; nothing more to say."""

    kind = "done"
    request: Count


FROM_WORKER: tuple[type[Message], ...] = (
    WorkerHello,
    Ready,
    Leased,
    Heartbeat,
    Progress,
    Result,
    TaskFailed,
    WorkerGoodbye,
)
FROM_SUPERVISOR: tuple[type[Message], ...] = (SupervisorHello, Processes)
FROM_DESCRIBER: tuple[type[Message], ...] = (DescriberHello, TokenCounts, Heartbeat)
FROM_CLIENT: tuple[type[Message], ...] = (
    Submit,
    Watch,
    GetJobs,
    FetchPictures,
    Cancel,
    Retry,
    GetWorkers,
    GetStack,
    Restart,
    Scale,
    Drain,
    CollectGarbage,
)
TO_WORKER: tuple[type[Message], ...] = (Welcome, Task, Lease, CancelTask, Committed, Beat, Error)
TO_DESCRIBER: tuple[type[Message], ...] = (Welcome, CountTokens, Beat, Error)
TO_SUPERVISOR: tuple[type[Message], ...] = (SetScale, RestartProcess, KillProcess, Beat, Error)
TO_CLIENT: tuple[type[Message], ...] = (Jobs, JobEvent, Pictures, Workers, Stack, Collected, Done, Error)
EVERY_MESSAGE: tuple[type[Message], ...] = tuple(
    dict.fromkeys(
        (
            *FROM_WORKER,
            *FROM_SUPERVISOR,
            *FROM_DESCRIBER,
            *FROM_CLIENT,
            *TO_WORKER,
            *TO_SUPERVISOR,
            *TO_DESCRIBER,
            *TO_CLIENT,
        )
    )
)
