"""All that a process of `workers/` is started with: data, sent to its launcher (fork server, plain process)."""

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from protocol.data import Data
from protocol.model import ModelDescription
from protocol.model_spec import ModelSpec
from protocol.stages import Stage

Bytes = Annotated[int, Field(ge=0)]
Index = Annotated[int, Field(ge=0)]


class WorkerSpec(Data):
    """A stage worker. GPUs are told by their driver's numbers on the host that it runs on."""

    kind: Literal["worker"] = "worker"
    stage: Stage
    name: str  # how the stack calls it
    endpoint: str = ""  # the orchestrator's for workers; empty for a stage that runs alone
    key: str | None = None  # path of the key file with which it comes in there; None: it needs none
    model: ModelSpec = ModelSpec()
    description: ModelDescription | None = None  # of the model, if it is known already
    same_revision: bool = False  # it must have the files of that description
    device: str = "auto"  # auto, cpu, mps, cuda, cuda:N
    dtype: str = "auto"  # or float32, bfloat16, float16
    visible_gpus: tuple[Index, ...] | None = None  # all others are hidden from it; None: it sees all
    leased_gpus: tuple[Index, ...] = ()  # it works in leases of their memory
    max_memory: tuple[Bytes, ...] = ()  # of each GPU: one for all, one each, or () for all that is free
    workspace: Bytes | None = None  # bytes of max_memory to be left beside weights; None: an estimate
    cut: tuple[Index, ...] = ()  # blocks of a denoiser on each of its GPUs
    jobs: Annotated[int, Field(ge=1, le=8)] = 1  # at once
    speedups: tuple[str, ...] = ()  # of its whole stack
    checkpoint_seconds: float | None = None  # between two of a denoising job at least; None: none are made
    cuda_graphs: bool = True  # where a denoiser's GPU waits for its host
    locked_bytes: Bytes | None = None  # of its weights, to be page-locked in host memory at most; None: all
    loras: str | None = None  # path of the folder where LoRAs' files lie by their digests
    cpu_lock: str | None = None  # path of the lock file of those that compute on this CPU


class DescriberSpec(Data):
    """The process without weights that checks a model and counts prompts' tokens."""

    kind: Literal["describer"] = "describer"
    name: str = ""  # of the model in the stack
    endpoint: str
    model: ModelSpec
    dtype: str
    stages: tuple[Stage, ...]  # those that have workers here
    devices: tuple[tuple[Stage, str], ...] = ()  # the kind of each stage's, by which bits may differ
    speedups: tuple[str, ...] = ()
    loras: str | None = None  # path of the folder where LoRAs' files are to lie by their digests
    lora_folder: str | None = None  # path of a folder whose LoRAs are known by their files' names
    lora_aliases: tuple[tuple[str, str], ...] = ()  # (name, path or hub id)


ProcessSpec = Annotated[WorkerSpec | DescriberSpec, Field(discriminator="kind")]
PROCESS_SPEC: TypeAdapter[WorkerSpec | DescriberSpec] = TypeAdapter(ProcessSpec)
