"""A job as clients see it: the request, the recipe it becomes, and its view while it lives."""

from typing import Annotated, Literal

from pydantic import Field

from protocol.data import Data, Digest, Int64, Text
from protocol.lora import MAX_LORAS, Lora, LoraRequest
from protocol.pictures import named_pictures
from protocol.settings import Given, Settings
from protocol.speedups import Tier
from protocol.stages import STAGES, Stage

JobState = Literal["queued", "text", "denoise", "vae", "done", "failed", "cancelled"]
ENDED: frozenset[JobState] = frozenset(("done", "failed", "cancelled"))
JOB_STATES: tuple[JobState, ...] = ("queued", *STAGES, "done", "failed", "cancelled")
UNFINISHED: tuple[JobState, ...] = tuple(state for state in JOB_STATES if state not in ENDED)
Kept = Literal["text", "latents", ""]  # with the results of jobs of the same text, of this job alone, or nothing
MAX_IMAGES_IN = 16  # pictures that a job may begin from
GivenVideos = Annotated[  # (argument of the pipeline's call, digest)
    tuple[tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{0,64}$")], Digest], ...], Field(max_length=4)
]
JobId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
MAX_SEED = 2**63 - 1


class JobRequest(Data):
    """A prompt and the settings of its picture. None means the model's own default."""

    prompt: Text
    model: Annotated[str, Field(max_length=4096)] | None = None  # its name in the stack; None: the default one
    controlnet: Annotated[str, Field(max_length=256)] | None = None  # one of several that the stack has for the model
    refiner: Annotated[str, Field(max_length=256)] | None = None  # likewise
    negative_prompt: Text | None = None
    width: Int64 | None = None  # pixels
    height: Int64 | None = None  # pixels
    steps: Int64 | None = None
    guidance: float | None = None  # distilled guidance scale, an input of the denoiser
    cfg_scale: float | None = None  # true classifier-free guidance, a second pass with the negative prompt
    seed: Int64 | None = None  # None: one is drawn and recorded
    num_images: Int64 = 1  # pictures, or videos
    max_sequence_length: Int64 | None = None  # tokens
    frames: Int64 | None = None  # of a video
    fps: float | None = None  # of a video: frames a second
    images: Annotated[tuple[Digest, ...], Field(max_length=MAX_IMAGES_IN)] = ()  # pictures that it begins from
    mask: Digest | None = None  # white where the picture is to be made anew
    control: Digest | None = None  # a picture that a ControlNet keeps to, such as edges
    ip_image: Digest | None = None  # a picture for the IP-Adapter
    ip_scale: float | None = None  # how much that counts
    videos: GivenVideos = ()  # that it begins from, by the pipeline's own names; "" is the first one that it takes
    strength: float | None = None  # how much of the picture goes, from 0 to 1
    settings: Given = ()  # further arguments of the pipeline's call, by name
    loras: Annotated[tuple[LoraRequest, ...], Field(max_length=MAX_LORAS)] = ()  # in their order
    priority: Int64 = 0  # higher goes first
    id: JobId | None = None  # the client's own name for it; submitting it twice is harmless

    @property
    def pictures(self) -> tuple[str, ...]:
        """Digests of all pictures and videos that it begins from."""
        return tuple(self.named_pictures.values())

    @property
    def named_pictures(self) -> dict[str, str]:
        """Their digests, by their names beside a task."""
        return named_pictures(self.images, self.mask, self.control, self.ip_image, self.videos)


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
    text_digest: str = ""  # of all that its text stage computes with; empty: that can't be told
    dtype: str
    images: tuple[Digest, ...] = ()
    mask: Digest | None = None
    control: Digest | None = None
    ip_image: Digest | None = None
    ip_scale: float | None = None
    videos: GivenVideos = ()
    strength: float | None = None
    frames: Int64 | None = None  # of a video; None: pictures are made
    fps: float | None = None  # of a video: frames a second
    settings: Settings = ()  # further arguments of the pipeline's call, by name
    loras: Annotated[tuple[Lora, ...], Field(max_length=MAX_LORAS)] = ()  # in their order
    sized: bool = True  # width and height are given to the pipeline; else it finds its own, and these are an estimate
    tier: Tier = "exact"
    speedups: tuple[Annotated[str, Field(max_length=128)], ...] = ()  # of the stack that makes it, see speedups.py

    @property
    def pictures(self) -> tuple[str, ...]:
        """Digests of all pictures and videos that it begins from."""
        return tuple(self.named_pictures.values())

    @property
    def named_pictures(self) -> dict[str, str]:
        """Their digests, by their names beside a task."""
        return named_pictures(self.images, self.mask, self.control, self.ip_image, self.videos)


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
    calls: int = 0  # into components, whose results the job has now
    wants: str = ""  # the call that the next stage is to make, such as `vae.encode`
    kept: Kept = ""  # what it left for the stages to come


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
    pictures: int  # or videos, that can be fetched now
