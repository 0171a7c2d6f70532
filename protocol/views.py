"""Workers and processes as clients are shown them."""

from typing import Literal

from protocol.data import Data
from protocol.host import HostFacts
from protocol.model import ModelDescription
from protocol.stages import Stage


class ComponentView(Data):
    """The residency of one model component in a worker."""

    component: str
    state: Literal["in", "streamed", "out"]
    device_bytes: int  # of weights on the device, where a part is streamed with the ring that it passes through
    total_bytes: int
    swap_seconds: float  # of the last swap in or out


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
    revision: str
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
    lends: bool  # a part of its lease, for a moment, which lease_bytes are without
    since: float


class GpuView(Data):
    """A GPU whose memory is leased to workers."""

    host: str  # as workers' views name it
    index: int  # by the driver's count
    name: str
    budget: int  # bytes that are leased, and what workers keep beside
    kept: int  # bytes of the budget that workers keep for themselves
    foreign: int  # bytes that were in use before the stack came
    used: int | None  # bytes in use by the driver's account; None: there is none

    def has(self, worker: WorkerView) -> bool:
        """Return whether a worker works in leases of it."""
        return worker.host == self.host and self.index in worker.gpus


Placing = Literal["", "cordoned", "drained", "leaving"]  # what keeps new work from a host; or it is let go


class HostView(Data):
    """A host of the stack's beside its own."""

    name: str  # of its key
    state: Literal["planning", "here", "silent", "refused", "gone"]
    placing: Placing
    reason: str  # why it was refused
    facts: HostFacts
    workers: int  # that it is to have
    heard: float  # seconds since its last word


class ModelView(Data):
    """A model of the stack."""

    name: str  # by which jobs name it; empty where there is but one, without a supervisor
    model: str  # a folder, or a hub id
    revision: str
    pipeline: str
    dtype: str
    speedups: tuple[str, ...]
    video: bool  # it makes videos
    description: ModelDescription  # what it takes, and its defaults
    default: bool  # jobs that name no model are for it
    resting: bool  # it has no workers, until a job asks for it
    reason: str  # why they could not be started when it was last asked for, for the stack's user alone
    jobs: int  # unfinished


class ProcessView(Data):
    """A process of the supervisor's, also while no worker of it is registered."""

    name: str
    stage: Stage | None
    model: str = ""  # by its name in the stack; empty: it is of no model
    pid: int | None
    state: Literal["starting", "running", "stopping", "waiting"]
    restarts: int
    reason: str  # why it last ended
