"""The way from a worker's spec to a stage that runs: find the model, describe it, load it onto its devices."""

import functools
import importlib.util
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from diffusers.utils import is_bitsandbytes_available, is_torchao_available

from protocol.curve_keys import PeerKey
from protocol.errors import BadRequest
from protocol.host import library_versions
from protocol.messages.worker import WorkerHello
from protocol.model import ModelDescription
from protocol.speedups import batch_of
from protocol.worker_spec import WorkerSpec
from workers.models.description import describe
from workers.models.devices import WORKSPACE, Devices
from workers.models.loading import Loaded, load
from workers.models.skeleton import quiet
from workers.models.source import BITSANDBYTES, INSTALL_QUANTIZE, TORCHAO, Source, locate, quantization_method
from workers.models.speedups import StageSpeedups
from workers.runtime.executor import Executor, StageRunner
from workers.runtime.launch import FRESH, NeedsFreshProcess
from workers.runtime.ranks import Group, LeadStage, follow, form
from workers.runtime.session import Session
from workers.runtime.warmup import WarmUp
from workers.stages.batch import BatchedDenoiseStage
from workers.stages.denoise import DenoiseStage
from workers.stages.text import TextStage
from workers.stages.vae import VaeStage
from workers.tensors import DTYPES
from workers.weights.gpu_lease import AnyGpuLease, GpuLease
from workers.weights.page_locks import PAGE_LOCKER

log = logging.getLogger(__name__)

STOP_SECONDS = 2.0  # that a worker beside another may take for its goodbye
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")


def resolve_device(device: str) -> str:
    """'auto' becomes the best that there is."""
    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def device_kind(device: str) -> str:
    """Return what equal bits depend on: a GPU's name, or the kind of device."""
    kind = torch.device(device).type
    if kind != "cuda":
        return kind
    import pynvml

    try:  # torch would bring up a context to say it, before a worker may have forked its ranks
        pynvml.nvmlInit()
        name = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(first_gpu()))
    except (pynvml.NVMLError, ValueError):
        return "cuda"
    return name.decode() if isinstance(name, bytes) else str(name)


def first_gpu() -> int:
    """The driver's number of the first GPU that this process sees; ValueError where it has another name."""
    return int(os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0])


def resolve_dtype(dtype: str, device: str) -> str:
    """'auto' becomes what the device computes fast in."""
    if dtype == "auto":
        return "float32" if device == "cpu" else "bfloat16"
    if dtype not in COMPUTE_DTYPES:
        raise BadRequest(f"There is no dtype {dtype!r}.", f"Choose one of {', '.join(COMPUTE_DTYPES)}.")
    return dtype


@dataclass(slots=True)
class Prepared:
    """A worker that knows its model but has not loaded it. With a `group` it is one of several that work together."""

    spec: WorkerSpec
    source: Source
    description: ModelDescription
    device: str
    dtype: str
    group: Group | None = None

    def load(self) -> tuple[StageRunner, tuple[tuple[str, str], ...]]:
        """The stage with its weights in place, and where they are."""
        (load,) = self.loaders()
        return load()

    def loaders(self) -> list[Callable[[], tuple[StageRunner, tuple[tuple[str, str], ...]]]]:
        """Return a loader of the stage for each job at once; the first one that runs loads the weights for all."""
        if not self.spec.cut:
            return [lambda: self._stage(*self.weights())]
        once = Once(self.weights)

        def copy_stream(index: int) -> tuple[StageRunner, tuple[tuple[str, str], ...]]:
            loaded, device = once.get()
            runner, places = self._stage(loaded.another(), device)
            return runner, () if index else places  # they are told once

        return [functools.partial(copy_stream, index) for index in range(self.spec.jobs)]

    def weights(self) -> tuple[Loaded, torch.device]:
        spec, device, memory = self.spec, self.device, self.spec.max_memory
        if self.group:
            device = f"cuda:{self.group.rank}" if device == "cuda" else device
            memory = memory[self.group.rank : self.group.rank + 1] if len(memory) > 1 else memory
            self.group.join(torch.device(device))
        devices = Devices.of(device, memory, bool(spec.leased_gpus), spec.cut, spec.workspace)
        start = time.perf_counter()
        speed = StageSpeedups.of(spec.stage, spec.speedups)
        loaded = load(self.source, spec.stage, devices, DTYPES[self.dtype], speed)
        if loaded.loras and spec.loras:
            loaded.loras.files.folder = Path(spec.loras)
        log.info("loaded in %.2f s", time.perf_counter() - start)
        return loaded, devices.primary

    def gpu_leases(self, runner: StageRunner) -> list[AnyGpuLease]:
        """Make the worker's side of the lease of each of its GPUs; none where it has memory of its own."""
        spec, workspace = self.spec, WORKSPACE[self.spec.stage]
        if not spec.leased_gpus:
            return []
        if spec.workspace is not None:
            workspace = min(workspace, spec.workspace // spec.jobs)  # as planned for larger pictures, maybe
        amounts = [size - (spec.workspace or 0) for size in spec.max_memory]
        if isinstance(runner, DenoiseStage) and runner.split:
            parts = zip(runner.residencies, amounts, strict=True)
            return [GpuLease(residency.device, (residency,), workspace, most) for residency, most in parts]
        rank = self.group.rank if self.group else 0
        own = GpuLease(runner.device, runner.residencies, workspace, amounts[rank] if amounts else None)
        return [own, *(runner.gpu_leases if isinstance(runner, LeadStage) else ())]

    def _stage(self, loaded: Loaded, device: torch.device) -> tuple[StageRunner, tuple[tuple[str, str], ...]]:
        return self._runner(loaded, device), loaded.device_map

    def _runner(self, loaded: Loaded, device: torch.device) -> StageRunner:
        match self.spec.stage:
            case "text":
                return TextStage(loaded, device)
            case "denoise":
                stage = self.denoise_stage(loaded, device)
                return LeadStage(stage, self.group) if self.group else stage
            case "vae":
                return VaeStage(loaded, device)

    def denoise_stage(self, loaded: Loaded, device: torch.device) -> DenoiseStage:
        """Make the stage; of several ranks the first one alone makes checkpoints."""
        follows = self.group is not None and self.group.rank > 0
        seconds = None if follows else self.spec.checkpoint_seconds
        if batch_of(self.spec.speedups) > 1 and not (self.group or loaded.split):
            return BatchedDenoiseStage(loaded, device, seconds, self.spec.cuda_graphs)
        return DenoiseStage(loaded, device, seconds, cuda_graphs=self.spec.cuda_graphs)


Made = TypeVar("Made")


class Once(Generic[Made]):
    """A value that is made by the first of several threads that want it."""

    def __init__(self, make: Callable[[], Made]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._made: Made | None = None

    def get(self) -> Made:
        with self._lock:
            if self._made is None:
                self._made = self._make()
            return self._made


def prepare(spec: WorkerSpec, source: Source | None = None) -> Prepared:
    """Find the model, unless its `source` is given, and describe it unless that was done.

    ModelMissing or BadRequest if that can't be.
    """
    device = resolve_device(spec.device)
    dtype = resolve_dtype(spec.dtype, device)
    source = source or locate(spec.model, spec.stage)
    if (known := spec.description) and (known.model, known.revision) == (source.model, source.revision):
        return Prepared(spec, source, known, device, dtype)
    if known and spec.same_revision:
        raise BadRequest(
            f"{source.model!r} is of revision {source.revision[:40]} on {socket.gethostname()}; the stack's is "
            f"{known.revision[:40]}, and other weights give other pictures.",
            f"Get that one there: triptych pull {source.model} --revision …, or copy the folder.",
        )
    with quiet():
        return Prepared(spec, source, describe(source), device, dtype)


def check_quantized(source: Source, spec: WorkerSpec, ranks: int) -> None:
    """Check, before anything is forked, that weights which a library has quantized can be read.

    Raises:
        BadRequest: they can't.
        NeedsFreshProcess: not by this process.
    """
    methods = {quantization_method(source, name) for name in source.components(spec.stage)}
    for library, is_known in ((TORCHAO, is_torchao_available), (BITSANDBYTES, is_bitsandbytes_available)):
        if library not in methods:
            continue
        if ranks > 1 or spec.cut:
            reason = f"{source.model!r} was quantized by {library}, and can't be shared out among GPUs."
            raise BadRequest(reason, "Choose another --placement.")
        if importlib.util.find_spec(library) is None:
            raise BadRequest(f"{source.model!r} was quantized by {library}.", INSTALL_QUANTIZE)
        if FRESH not in os.environ and not is_known():
            raise NeedsFreshProcess


def serve(spec: WorkerSpec, key: PeerKey | None = None) -> None:
    """Join a stack and work until told to stop; a remote one lets a `key` in."""
    ranks = ranks_of(spec)
    source = locate(spec.model, spec.stage)
    check_quantized(source, spec, ranks)
    if spec.locked_bytes is not None:
        PAGE_LOCKER.restrict(spec.locked_bytes // max(1, ranks))  # each copies a part of its own
    group = form(ranks, spec.name) if ranks > 1 else None
    device = resolve_device(spec.device)
    warm_up = WarmUp(f"{device}:{group.rank}" if group else device, DTYPES[resolve_dtype(spec.dtype, device)])
    prepared = prepare(spec, source)
    prepared.group = group
    if group and group.rank:
        follow(lambda: prepared.denoise_stage(*prepared.weights()), prepared.gpu_leases, group)
    if group:
        group.watch()
    hello = WorkerHello(
        name=spec.name,
        stage=spec.stage,
        pid=os.getpid(),
        host=socket.gethostname(),
        device=prepared.device,
        device_kind=device_kind(prepared.device),
        versions=library_versions(),
        dtype=prepared.dtype,
        model=prepared.description,
        speedups=spec.speedups,
        gpus=spec.leased_gpus,
        parts=spec.jobs,
    )
    cpu_lock = Path(spec.cpu_lock) if spec.cpu_lock and prepared.device == "cpu" else None
    sessions = []
    for index, loader in enumerate(prepared.loaders()):
        executor = Executor(
            loader,
            cpu_lock,
            (lambda _: ()) if index else prepared.gpu_leases,
            warm_up.join,
        )
        told = hello if not index else hello.model_copy(update={"name": f"{spec.name}.{index + 1}", "part": index})
        sessions.append(Session(spec.endpoint, key, told, executor))
    run_together(sessions)
    logging.shutdown()
    os._exit(0)  # taking torch apart in good order takes seconds, and nothing is left to be saved


def ranks_of(spec: WorkerSpec) -> int:
    """Return the number of processes that this worker is."""
    _, _, size = StageSpeedups.of(spec.stage, spec.speedups).parallel.partition("-")
    return int(size or 1)


def run_together(sessions: Sequence[Session]) -> None:
    """Run several workers in one process: the first one hears signals, and they all end with any of them."""
    first, *others = sessions

    def attend(loop: Session) -> None:
        try:
            loop.run()
        except BaseException as error:
            first.fail(error)

    threads = [threading.Thread(target=attend, args=(loop,), daemon=True) for loop in others]
    for thread in threads:
        thread.start()
    first.heed_signals()
    first.run()
    for loop in others:
        loop.stop("the others stop")
    for thread in threads:
        thread.join(STOP_SECONDS)
