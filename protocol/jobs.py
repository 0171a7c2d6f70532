"""What a job is to those who ask for it: the request, the recipe it becomes, and its view while it lives."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Stage = Literal["text", "denoise", "vae"]
STAGES: tuple[Stage, ...] = ("text", "denoise", "vae")
BEFORE: dict[Stage, Stage] = {"denoise": "text", "vae": "denoise"}  # whose output a stage takes

JobState = Literal["queued", "text", "denoise", "vae", "done", "failed", "cancelled"]
ENDED: frozenset[JobState] = frozenset(("done", "failed", "cancelled"))
JOB_STATES: tuple[JobState, ...] = ("queued", *STAGES, "done", "failed", "cancelled")

Tier = Literal["exact", "numeric", "approximate"]

JobId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Text = Annotated[str, Field(max_length=100_000)]
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Positive = Annotated[int, Field(ge=1, le=2**40)]
MAX_SEED = 2**63 - 1


class Data(BaseModel):
    """A frozen record whose fields are exactly these, of exactly these types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class JobRequest(Data):
    """One prompt and how to picture it. None means the model's own default."""

    prompt: Text
    negative_prompt: Text | None = None
    width: Int64 | None = None  # pixels
    height: Int64 | None = None  # pixels
    steps: Int64 | None = None
    guidance: float | None = None  # distilled guidance scale, an input of the denoiser
    cfg_scale: float | None = None  # true classifier-free guidance, a second pass with the negative prompt
    seed: Int64 | None = None  # None: one is drawn and recorded
    num_images: Int64 = 1
    max_sequence_length: Int64 | None = None  # tokens
    priority: Int64 = 0  # higher goes first
    id: JobId | None = None  # the client's own name for it; submitting it twice is harmless


class Recipe(Data):
    """Everything that the bits of a picture depend on, with no default left open."""

    prompt: Text
    negative_prompt: Text | None
    width: Int64
    height: Int64
    steps: Int64
    guidance: float | None
    cfg_scale: float | None
    seed: Int64
    num_images: Int64
    max_sequence_length: Int64 | None
    model: str
    revision: str  # commit of a hub model, fingerprint of a folder
    dtype: str
    tier: Tier = "exact"
    speedups: tuple[Annotated[str, Field(max_length=128)], ...] = ()  # of the stack that makes it, see speedups.py


class StageRecord(Data):
    """How one stage of a job went."""

    stage: Stage
    worker: str
    attempt: int
    seconds: float
    cached: bool = False
    peak_bytes: int = 0  # of GPU memory; 0 on a CPU
    warnings: tuple[str, ...] = ()
    device_kind: str = ""  # cpu, or a GPU's name: what equal bits depend on
    versions: str = ""  # of the libraries that computed it


class Job(Data):
    """A job as the orchestrator tells it."""

    id: str
    number: int  # in order of acceptance
    state: JobState
    priority: int
    recipe: Recipe
    attempt: int  # number of its last task; some are left out where the orchestrator was killed
    step: int  # denoising steps done
    cached: bool  # its prompt's embeddings were known
    records: tuple[StageRecord, ...]
    reasons: tuple[str, ...]  # why attempts failed
    created: float  # seconds since the epoch, UTC
    finished: float | None
    pictures: int  # that can be fetched now


class ModelDescription(Data):
    """What a model takes, read from its configuration by a worker; the orchestrator judges requests by it."""

    model: str  # as it was given: a folder or a hub repo id
    revision: str
    pipeline: str  # class name in diffusers
    size_multiple: Positive  # pixels
    width: Positive  # default, pixels
    height: Positive
    max_pixels: Positive
    steps: Positive
    guidance: float | None  # default; None where the denoiser takes none
    cfg_scale: float | None  # default; None where the pipeline has no true CFG
    negative_prompt: bool
    max_sequence_length: int | None  # default; None where the pipeline has no such argument
    max_sequence_limit: Positive  # tokens that fit a prompt at most
    demo: bool = False


class ComponentView(Data):
    """Where a worker has the weights of one model component."""

    component: str
    state: Literal["in", "streamed", "out"]
    device_bytes: int  # of weights on the device, where a part is streamed with the ring that it passes through
    total_bytes: int
    swap_seconds: float  # of the last swap in or out


class Needs(Data):
    """What a stage takes of a GPU, in bytes."""

    weights: Annotated[int, Field(ge=0)]  # all of them
    least: Annotated[int, Field(ge=0)]  # of weights, where as much of them as can be is streamed
    workspace: Annotated[int, Field(ge=0)]  # beside them, for a picture of 1024 × 1024; an estimate that errs high


class Grant(Data):
    """What a worker may use of one GPU beside its context, in bytes."""

    bytes: Annotated[int, Field(ge=0)]
    weights: Annotated[int, Field(ge=0)]  # of them, at most, for weights


class WorkerView(Data):
    """A worker as `triptych workers` shows it."""

    id: str  # of this incarnation
    name: str
    stage: Stage
    state: Literal["loading", "idle", "busy", "swapping"]
    pid: int
    host: str
    device: str
    device_kind: str  # cpu, or a GPU's name
    versions: str  # of its libraries
    dtype: str
    model: str
    speedups: tuple[str, ...]
    job: str | None
    done: int  # tasks since it started
    rss_bytes: int
    gpu_bytes: int
    device_map: tuple[tuple[str, str], ...]  # (module, device), where the weights are spread
    residency: tuple[ComponentView, ...]  # of components on one device of their own
    gpus: tuple[int, ...]  # whose memory the orchestrator leases to its process
    lease_bytes: tuple[int, ...]  # of each; told of the first of several workers in a process
    context_bytes: tuple[int, ...]  # of its CUDA contexts with their libraries
    since: float


class ProcessView(Data):
    """A process of the supervisor's, also while no worker of it is registered."""

    name: str
    stage: Stage | None
    pid: int | None
    state: Literal["starting", "running", "stopping", "waiting"]
    restarts: int
    reason: str  # why it last ended
