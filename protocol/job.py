"""A job as clients see it: the request, the recipe it becomes, and its view while it lives."""

from typing import Annotated, Literal

from pydantic import Field

from protocol.data import Data, Int64, Text
from protocol.speedups import Tier
from protocol.stages import STAGES, Stage

JobState = Literal["queued", "text", "denoise", "vae", "done", "failed", "cancelled"]
ENDED: frozenset[JobState] = frozenset(("done", "failed", "cancelled"))
JOB_STATES: tuple[JobState, ...] = ("queued", *STAGES, "done", "failed", "cancelled")
JobId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
MAX_SEED = 2**63 - 1


class JobRequest(Data):
    """A prompt and the settings of its picture. None means the model's own default."""

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

    @property
    def true_cfg(self) -> bool:
        """Return whether the denoiser runs twice a step, with the negative prompt, too."""
        return uses_true_cfg(self.cfg_scale)


def uses_true_cfg(cfg_scale: float | None) -> bool:
    """Return whether a scale of classifier-free guidance has an effect; None is that of a model without."""
    return cfg_scale is not None and cfg_scale > 1


class StageRecord(Data):
    """The record of one stage of a job."""

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
