"""Messages between workers and the orchestrator."""

from typing import Annotated

from pydantic import Field

from protocol.data import Digest
from protocol.gpu_memory import WeightNeed
from protocol.job import JobId, Recipe
from protocol.messages.common import (
    MAX_PARTS,
    MOST_PREVIEWED,
    Beat,
    Count,
    Counts,
    Error,
    Heartbeat,
    Leases,
    Line,
    Message,
    Name,
    TaskKey,
    Welcome,
)
from protocol.model import ModelDescription
from protocol.stages import Stage
from protocol.views import ComponentView

PREVIEW_LATENTS = "preview-latents"  # the tensor that a map to colors is fitted to, beside a task of the vae stage


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
    """The model is loaded and the worker is free: exactly one task, or a lease, may come.

    With `current_task` it is not: a worker that has come back still works at that task, or has its result.
    """

    kind = "ready"
    device_map: tuple[tuple[str, str], ...] = ()
    residency: tuple[ComponentView, ...] = ()
    needs: Annotated[tuple[WeightNeed, ...], Field(max_length=64)] = ()  # of each of its GPUs, where it works in leases
    context_bytes: Counts = ()  # of its CUDA contexts with their libraries
    kept_bytes: Counts = ()  # that it holds beside contexts and leases, whatever it gives back
    leases: Leases = ()  # that it holds
    lent_bytes: Count = 0  # of its lease, see Lent
    lendable_bytes: Count = 0  # of weights, see Leased
    current_task: tuple[JobId, Stage, Count] | None = None  # job, stage, attempt


class Leased(Message):
    """A lease is in force; after one of nothing all is given back, which the driver confirms.

    `kept_bytes` are what the process holds beside its context and any lease, as last measured: nobody can ask for them.
    """

    kind = "leased"
    leases: Leases
    kept_bytes: Counts = ()
    context_bytes: Counts = ()
    residency: tuple[ComponentView, ...] = ()
    lendable_bytes: Count = 0  # of weights that can be let go between two steps
    reason: Line = ""  # why the weights could not be brought in; then nothing is held


class Lent(Message):
    """So many bytes of the lease are free, by the driver's count, and nothing is computed until Returned.

    0: the wanted bytes can't be freed, and it goes on with all that it had.
    """

    kind = "lent"
    bytes: Count


class Progress(TaskKey):
    """Some steps are done, and more are to come. A checkpoint of `saved` steps may lie beside it, for any worker.

    `preview` is a JPEG of how the picture will look, by what is known after these steps.
    """

    kind = "progress"
    step: Count
    steps: Count
    saved: Count = 0
    preview: Annotated[bytes, Field(max_length=MOST_PREVIEWED)] = b""


class PreviewFit(TaskKey):
    """A map from latents to colors, fitted to so many jobs: the tensor beside it, float32 (features, colors)."""

    kind = "preview-fit"
    jobs: Count


class Part(TaskKey):
    """A part of a job's pictures, beside it; the first one, of number 0, comes with the result, as the last."""

    kind = "part"
    number: Annotated[int, Field(ge=1, le=MAX_PARTS)]


class Result(TaskKey):
    """A stage's outcome, its tensors beside it. Kept by the worker until the orchestrator says Committed."""

    kind = "result"
    seconds: float
    next: Stage | None = None  # the stage to visit; None: that was the last visit, and pictures lie beside this
    wants: Name = ""  # the call that the next stage is to make
    calls: Count = 0  # into components, whose results it leaves
    parts: Annotated[int, Field(ge=0, le=MAX_PARTS)] = 0  # of pictures that came before this
    visits_left: Count | None = None  # to the end of the job, `next` included; None: as usual
    peak_bytes: Count = 0
    workspace_bytes: Count = 0  # of a GPU's memory beside the weights, at most
    alone: bool = True  # nothing was done along with it, nor it along with another: these figures are its own
    warnings: Annotated[tuple[Line, ...], Field(max_length=16)] = ()


class TaskFailed(TaskKey):
    """`retry` is False where another try can't help."""

    kind = "task-failed"
    reason: Line
    retry: bool
    cancelled: bool = False
    out_of_memory: bool = False


class FetchLora(Message):
    """Ask for a part of the file of a LoRA that the task names, from `offset` on."""

    kind = "fetch-lora"
    digest: Digest
    offset: Count


class WorkerGoodbye(Message):
    kind = "worker-goodbye"


MOST_AHEAD = 15  # recipes beside a task
MOST_PROMPTS = 7  # of them, beside one of the text stage
AHEAD = "ahead:"  # begins the names of their tensors: ahead:NUMBER:NAME


class Task(TaskKey):
    """A stage of a job to be done; the tensors of the stage before it lie beside it."""

    kind = "task"
    recipe: Recipe
    ahead: Annotated[tuple[Recipe, ...], Field(max_length=MOST_AHEAD)] = ()  # of tasks like it that come next, maybe
    allow_tiling: bool = True  # no more GPU memory can be had than there is; else running short of it is to be told
    learn_previews: bool = False  # its last latents are to go on to the vae stage, for a map to colors


class WantPreview(TaskKey):
    """Make a preview at the next step, with the map to colors beside it; without one where none is known yet."""

    kind = "want-preview"


class LoraPart(Message):
    """The part of a LoRA's file that was asked for, beside it as uint8; `bytes` has the file, 0: it is not here."""

    kind = "lora-part"
    digest: Digest
    offset: Count
    bytes: Count


class SetLease(Message):
    """The bytes of its GPUs that a worker may use from now on; of nothing, it gives all back. Only free ones get it."""

    kind = "lease"
    leases: Leases  # one for each GPU, all of them of something or all of nothing


class Borrow(Message):
    """Free so many bytes of the lease until Returned: at the end of the step that is computed, or else at once."""

    kind = "borrow"
    bytes: Annotated[int, Field(ge=1)]


class Returned(Message):
    """The bytes that were lent are the worker's again: so many are in its lease now, maybe some less than before."""

    kind = "returned"
    bytes: Count


class CancelTask(TaskKey):
    kind = "cancel-task"


class Committed(TaskKey):
    """The result is safe, or superseded; the worker lets go of it."""

    kind = "committed"


FROM_WORKER: tuple[type[Message], ...] = (
    WorkerHello,
    Ready,
    Leased,
    Lent,
    Heartbeat,
    Progress,
    PreviewFit,
    Part,
    Result,
    TaskFailed,
    FetchLora,
    WorkerGoodbye,
)
TO_WORKER: tuple[type[Message], ...] = (
    Welcome, Task, WantPreview, SetLease, Borrow, Returned, LoraPart, CancelTask, Committed, Beat, Error,
)  # fmt: skip
