"""The thread that loads and computes, so that the worker's own loop can go on talking."""

import contextlib
import errno
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.conv import _ConvNd

from protocol.errors import TriptychError
from protocol.job import Recipe
from protocol.messages.common import Message
from protocol.messages.worker import (
    AHEAD,
    PREVIEW_LATENTS,
    Borrow,
    FetchLora,
    Leased,
    Lent,
    LoraPart,
    PreviewFit,
    Progress,
    Ready,
    Result,
    SetLease,
    Task,
    TaskFailed,
)
from protocol.pictures import PICTURES
from protocol.tensors import Tensor
from protocol.units import format_bytes
from protocol.views import ComponentView
from protocol.wire import MAX_FRAME_BYTES
from workers.errors import (
    FORGIVEN,
    Cancelled,
    StageError,
    WeightsLost,
    cause_of,
    found_no_host_memory,
    refusals,
    release_memory,
)
from workers.runtime.cpu_lock import CpuTurn
from workers.runtime.ranks import LeadStage, RankLost
from workers.stages.batch import BatchedDenoiseStage
from workers.stages.contract import Outcome, Report, Saved
from workers.stages.denoise import DenoiseStage
from workers.stages.preview import ColorFit, Previews
from workers.stages.text import TextStage
from workers.stages.vae import VaeStage
from workers.weights.gpu_lease import AnyGpuLease, GpuLease, apply_leases

log = logging.getLogger(__name__)

StageRunner = TextStage | DenoiseStage | LeadStage | VaeStage
Load = Callable[[], tuple[StageRunner, tuple[tuple[str, str], ...]]]
Shares = Callable[[StageRunner], Sequence[AnyGpuLease]]  # of each of its GPUs
Event = tuple[Message, list[Tensor]]
Order = Task | SetLease | Borrow
PROGRESS_SECONDS = 0.1  # faster steps share a message: nobody reads more, and each costs a computation on the CPU 2 ms
KEPT_PLANS = "a library was short of GPU memory, and goes on with what it chose then"  # cuDNN, whose plans torch keeps
IN_SHORT = "a library had less GPU memory than it asked for; its last bits may differ"
PERMANENT = (StageError, TriptychError, TypeError, ValueError, NotImplementedError)
FETCH_SECONDS, FETCH_TRIES = 10.0, 6  # for a part of a LoRA's file: links may be cut, and orchestrators start anew
OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)


class StartAnew(Exception):
    """The process is to be replaced before it works on, for no fault of its task's."""


class LoanLost(Exception):
    """Weights that were lent are not where they belong; it ends the worker."""


@dataclass(frozen=True, slots=True)
class Measured:
    outcome: Outcome
    seconds: float
    peak_bytes: int  # of GPU memory, all GPUs together; 0 on a CPU
    workspace_bytes: int  # a job's on one GPU, of what was not weights
    short: bool  # a library got less memory than it asked for, and may have computed in another way


def run_measured(runner: StageRunner, recipe: Recipe, tensors: tuple[Tensor, ...], report: Report) -> Measured:
    """Run a stage once, and measure its time and its peak of GPU memory, which jobs that run at once share."""
    cuda = runner.device.type == "cuda"
    if cuda:
        for gpu in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(gpu)
    refused = refusals() if cuda else 0
    FORGIVEN.pop()
    start = time.perf_counter()
    outcome = runner.run(recipe, tensors, report)
    seconds = time.perf_counter() - start
    gpus = range(torch.cuda.device_count()) if cuda else range(0)
    peaks = {gpu: torch.cuda.max_memory_allocated(gpu) for gpu in gpus}
    parts = runner.split if isinstance(runner, DenoiseStage) else None
    short = cuda and parts is None and refusals() > refused + FORGIVEN.pop()
    workspace = workspace_of(runner, peaks) // (parts.company if parts else 1)
    return Measured(outcome, seconds, sum(peaks.values()), workspace, short)


def workspace_of(runner: StageRunner, peaks: Mapping[int, int]) -> int:
    """Return the most bytes that a GPU had in use beside weights, from the peak of all its use."""
    weights = dict.fromkeys(peaks, 0)
    for residency in runner.residencies:
        if residency.device.index in weights:
            weights[residency.device.index] += residency.device_bytes
    return max((peak - weights[gpu] for gpu, peak in peaks.items()), default=0)


Run = Callable[[StageRunner, Recipe, tuple[Tensor, ...], Report], Measured]


class Executor:
    """A thread that does one task at a time. Messages and errors go to `events`; a byte on `wake` announces them."""

    def __init__(
        self,
        load: Load,
        turns: Path | None,
        gpu_leases: Shares = lambda _: (),
        warm: Callable[[], None] = lambda: None,
        run: Run = run_measured,
    ) -> None:
        """`gpu_leases` are given where it works in leases; `warm` waits until the device is ready to compute."""
        self.events: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()
        self.wake, self.bell = socket.socketpair()
        self.wake.setblocking(False)
        self.bell.setblocking(False)
        self._load, self._turn, self._gpu_leases, self._warm, self._run = load, CpuTurn(turns), gpu_leases, warm, run
        self._orders: queue.SimpleQueue[tuple[Order, tuple[Tensor, ...]]] = queue.SimpleQueue()
        self._borrow: Borrow | None = None  # that was not served yet
        self._was_short = False  # of memory, for a library: what it computes from then on may differ in its last bits
        self._returned: queue.SimpleQueue[int] = queue.SimpleQueue()  # bytes of a lease that was lent of
        self._cancelled: set[tuple[str, int]] = set()
        self._previews: tuple[tuple[str, int], Previews] | None = None  # of the current task
        self._colors = ColorFit()
        self._lora_parts: queue.SimpleQueue[tuple[LoraPart, bytes]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True, name="executor")

    def start(self) -> None:
        self._thread.start()

    def give(self, order: Order, tensors: tuple[Tensor, ...]) -> None:
        if isinstance(order, Task):
            self._cancelled.discard((order.job, order.attempt))  # what was cancelled under this number is over
        if isinstance(order, Borrow):
            self._borrow = order  # for the end of a step, before its turn among the orders
        self._orders.put((order, tensors))

    def cancel(self, job: str, attempt: int) -> None:
        self._cancelled.add((job, attempt))

    def want_preview(self, job: str, attempt: int, fit: Tensor | None = None) -> None:
        """Make a preview at the task's next step, by a map to colors if there is one; from any thread."""
        if (current := self._previews) and current[0] == (job, attempt):
            current[1].want(fit)

    def returned(self, size: int) -> None:
        """Go on, from any thread: what was lent is back, and the lease has `size` bytes."""
        self._returned.put(size)

    def fetch_lora(self, digest: str, offset: int) -> tuple[int, bytes]:
        """Return a LoRA's bytes in all, 0 where the stack hasn't its file, and those from an offset on; OSError."""
        for _ in range(FETCH_TRIES):
            self._emit((FetchLora(digest=digest, offset=offset), []))
            until = time.monotonic() + FETCH_SECONDS
            while (left := until - time.monotonic()) > 0:
                with contextlib.suppress(queue.Empty):
                    part, data = self._lora_parts.get(timeout=left)
                    if (part.digest, part.offset) == (digest, offset):
                        return part.bytes, data
        raise OSError(errno.ETIMEDOUT, "the stack does not send a LoRA's file")

    def lora_part(self, part: LoraPart, data: bytes) -> None:
        """Take in, from any thread, a part of a LoRA's file that was asked for."""
        self._lora_parts.put((part, data))

    def fail(self, error: BaseException) -> None:
        """End the worker, from any thread."""
        self._emit(error)

    def ring(self) -> None:
        """Wake the listener on `wake`."""
        with contextlib.suppress(BlockingIOError):  # a full bell has rung already
            self.bell.send(b"!")

    def _emit(self, event: Event | BaseException) -> None:
        self.events.put(event)
        self.ring()

    def _work(self) -> None:
        """Load and serve; whatever ends this thread ends the worker."""
        try:
            self._serve()
        except BaseException as error:
            self._emit(error)

    def _serve(self) -> None:
        runner, device_map = self._load()
        if not isinstance(runner, LeadStage) and runner.loaded.loras:
            runner.loaded.loras.files.fetch = self.fetch_lora
        gpu_leases = self._gpu_leases(runner)
        needs, contexts = tuple(held.needs() for held in gpu_leases), tuple(held.context_bytes() for held in gpu_leases)
        kept = tuple(gpu_lease.kept_bytes() for gpu_lease in gpu_leases)
        ready = Ready(
            device_map=device_map, residency=views(runner), needs=needs, context_bytes=contexts, kept_bytes=kept
        )  # fmt: skip
        self._emit((ready, []))
        while True:
            order, tensors = self._orders.get()
            if isinstance(order, SetLease):
                self._emit((changed(runner, gpu_leases, order), []))
                continue
            if isinstance(order, Borrow):
                self._lend(gpu_leases)
                continue
            self._do(runner, gpu_leases, order, tensors)
            del order, tensors
            contexts = tuple(gpu_lease.context_bytes() for gpu_lease in gpu_leases)
            ready, before = Ready(residency=views(runner), context_bytes=contexts), needs
            needs = tuple(held.needs() for held in gpu_leases)  # which adapters may have changed
            self._emit((ready if needs == before else ready.model_copy(update={"needs": needs}), []))

    def _lend(self, gpu_leases: Sequence[AnyGpuLease]) -> None:
        """Lend what is to be borrowed, unless that was done at the end of a step, and wait until it is back."""
        borrow, self._borrow = self._borrow, None
        if borrow is None:
            return
        own = gpu_leases[0] if len(gpu_leases) == 1 else None
        while not self._returned.empty():
            self._returned.get()
        try:
            if not isinstance(own, GpuLease) or not own.lend(borrow.bytes):
                self._emit((Lent(bytes=0), []))
                return
            self._emit((Lent(bytes=borrow.bytes), []))
            start = time.perf_counter()
            with self._turn.left():
                size = self._returned.get()
            back = time.perf_counter()
            own.take_again(size)
            log.info("%s were lent for %.3f s, and are taken again in %.3f s", format_bytes(borrow.bytes), back - start,
                     time.perf_counter() - back)  # fmt: skip
        except Exception as error:
            raise LoanLost("what was lent could not be taken again") from error

    def _do(
        self, runner: StageRunner, gpu_leases: Sequence[AnyGpuLease], task: Task, tensors: tuple[Tensor, ...]
    ) -> None:
        key: dict[str, Any] = {"job": task.job, "stage": task.stage, "attempt": task.attempt}
        extra = {"job": task.job}
        told = time.monotonic()

        def report(step: int, steps: int, saved: Saved | None = None) -> None:
            nonlocal told
            self._lend(gpu_leases)
            if (task.job, task.attempt) in self._cancelled:
                raise Cancelled
            if saved or (0 < step < steps and time.monotonic() - told >= PROGRESS_SECONDS):
                told = time.monotonic()
                progress = Progress(**key, step=step, steps=steps, saved=saved.step if saved else 0)
                self._emit((progress, saved.tensors if saved else []))

        def show(step: int, file: bytes) -> None:
            self._emit((Progress(**key, step=step, steps=task.recipe.steps, preview=file), []))

        if task.stage == "denoise":
            previews = Previews(task.recipe, show, task.learn_previews)
            self._previews = (task.job, task.attempt), previews
            report.watcher = previews  # type: ignore[attr-defined]
        learned = [tensor for tensor in tensors if tensor.name == PREVIEW_LATENTS]
        tensors = tuple(tensor for tensor in tensors if tensor.name != PREVIEW_LATENTS)
        tensors, theirs = shared_out(task, tensors)
        if isinstance(runner, TextStage):
            runner.ahead = task.ahead
        if isinstance(runner, BatchedDenoiseStage):
            runner.ahead = list(zip(task.ahead, theirs, strict=True))
        if isinstance(runner, VaeStage):
            runner.may_tile = task.allow_tiling
            if gpu_leases:
                release_memory()  # which a decode before has left in pieces: the next one may find none that fits
        if self._was_short and not task.allow_tiling:
            raise StartAnew(KEPT_PLANS)
        try:
            self._warm()
            with self._turn:
                done = self._run(runner, task.recipe, tensors, report)
            check_can_travel(done.outcome)
            self._was_short |= done.short
            if done.short and not task.allow_tiling:
                raise torch.OutOfMemoryError("a library had to do with less workspace, which may change bits")
        except (RankLost, LoanLost, WeightsLost):
            raise
        except Cancelled:
            log.info("cancelled", extra=extra)
            self._emit((TaskFailed(**key, reason="cancelled", retry=False, cancelled=True), []))
        except Exception as error:
            log.exception("%s failed", task.stage, extra=extra)
            short, retry = isinstance(error, torch.OutOfMemoryError), not isinstance(error, PERMANENT)
            if short:
                self._was_short |= convolves(runner)
                release_memory()
            elif retry and runner.device.type == "cuda":
                torch.cuda.synchronize(runner.device)  # where a context is broken for good, this ends the worker
            self._emit((TaskFailed(**key, reason=cause_of(error), retry=retry, out_of_memory=short), []))
            if isinstance(error, OSError) and error.errno in OUT_OF_FILES:
                raise StartAnew(f"this process can open nothing more: {error.strerror}") from error
            if found_no_host_memory(error):
                raise StartAnew("a library found no more memory on its host, and may go on without it") from error
        else:
            log.info("%s took %.3f s", task.stage, done.seconds, extra=extra)
            if learned and done.outcome.next is None:
                self._learn_colors(key, learned[0], done.outcome, task.recipe.frames is not None)
            result = Result(
                **key, seconds=done.seconds, next=done.outcome.next, parts=done.outcome.parts,
                wants=done.outcome.wants,
                calls=done.outcome.calls, alone=done.outcome.alone,
                peak_bytes=done.peak_bytes,
                workspace_bytes=done.workspace_bytes,
                warnings=(*done.outcome.warnings, *((IN_SHORT,) if self._was_short else ())),
            )  # fmt: skip
            self._emit((result, done.outcome.tensors))
        self._cancelled.discard((task.job, task.attempt))

    def _learn_colors(self, key: dict[str, Any], latents: Tensor, outcome: Outcome, video: bool) -> None:
        """Fit the map of previews to a job that is done; whatever goes wrong there, the job is."""
        try:
            pictures = next(tensor for tensor in outcome.tensors if tensor.name == PICTURES)
            if fit := self._colors.see(latents, pictures, video):
                self._emit((PreviewFit(**key, jobs=self._colors.jobs), [fit]))
        except Exception:
            log.exception("no map for previews could be fitted")


def shared_out(task: Task, tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], list[tuple[Tensor, ...]]]:
    """Return a task's own tensors, and those of each that may be done along with it."""
    theirs: list[list[Tensor]] = [[] for _ in task.ahead]
    for tensor in tensors:
        number, _, name = tensor.name.removeprefix(AHEAD).partition(":")
        if tensor.name.startswith(AHEAD) and number.isdecimal() and int(number) < len(theirs):
            theirs[int(number)].append(replace(tensor, name=name))
    return tuple(tensor for tensor in tensors if not tensor.name.startswith(AHEAD)), [tuple(one) for one in theirs]


def convolves(runner: StageRunner) -> bool:
    """Return whether a stage has convolutions: cuDNN chooses their algorithms by the memory that is free."""
    modules = (module for residency in runner.residencies for module in residency.module.modules())
    return any(isinstance(module, _ConvNd) for module in modules)


def check_can_travel(outcome: Outcome) -> None:
    """Raise StageError for what no message can hold: its reader would drop it, and wait for ever."""
    largest = max((tensor.nbytes for tensor in outcome.tensors), default=0)
    if largest > MAX_FRAME_BYTES:
        raise StageError(f"it leaves a tensor of {format_bytes(largest)}; {format_bytes(MAX_FRAME_BYTES)} can travel")


def changed(runner: StageRunner, gpu_leases: Sequence[AnyGpuLease], lease: SetLease) -> Leased:
    """Apply a lease while no other job is on its way, and return the outcome."""
    parts = runner.split if isinstance(runner, DenoiseStage) else None
    with parts.to_oneself() if parts else contextlib.nullcontext():
        leased = apply_leases(gpu_leases, lease.leases)
    lendable = sum(residency.lendable_bytes for residency in runner.residencies)
    return leased.model_copy(update={"residency": views(runner), "lendable_bytes": lendable})


def views(runner: StageRunner) -> tuple[ComponentView, ...]:
    """Return the residency of a stage's components."""
    return tuple(
        ComponentView(
            component=r.name, state=r.state, device_bytes=r.device_bytes, total_bytes=r.total_bytes,
            swap_seconds=r.seconds,
        )
        for r in runner.residencies
    )  # fmt: skip


def resident_bytes() -> int:
    """This process's memory, from the kernel; 0 where it can't be read."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
