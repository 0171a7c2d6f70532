"""The thread that loads and computes, so that the worker's own loop can go on talking."""

import contextlib
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from protocol.errors import DoesNotFit, TriptychError
from protocol.jobs import ComponentView, Recipe
from protocol.messages import Lease, Leased, Message, Progress, Ready, Result, Task, TaskFailed
from protocol.tensors import Tensor
from protocol.units import format_bytes
from workers.denoise import DenoiseStage
from workers.outcome import Cancelled, Outcome, Report, Saved, StageError, release_memory
from workers.ranks import LeadStage, RankLost
from workers.share import Share
from workers.text import TextStage
from workers.turns import turn
from workers.vae import VaeStage

log = logging.getLogger(__name__)

StageRunner = TextStage | DenoiseStage | LeadStage | VaeStage
Load = Callable[[], tuple[StageRunner, tuple[tuple[str, str], ...]]]
Event = tuple[Message, list[Tensor]]
PROGRESS_SECONDS = 0.1  # faster steps share a message: nobody reads more, and each costs a computation on the CPU 2 ms
IN_SHORT = "a library had less GPU memory than it asked for; its last bits may differ"
PERMANENT = (StageError, TriptychError, TypeError, ValueError, NotImplementedError)


@dataclass(frozen=True, slots=True)
class Measured:
    outcome: Outcome
    seconds: float
    peak_bytes: int  # of GPU memory, all GPUs together; 0 on a CPU
    workspace_bytes: int  # of that, what was not the weights of one device
    short: bool  # a library got less memory than it asked for, and may have computed in another way


def run_measured(runner: StageRunner, recipe: Recipe, tensors: tuple[Tensor, ...], report: Report) -> Measured:
    """Run a stage once, with its time and its peak of GPU memory, which it shares where several jobs are at once."""
    cuda = runner.device.type == "cuda"
    if cuda:
        for gpu in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(gpu)
    refused = refusals() if cuda else 0
    start = time.perf_counter()
    outcome = runner.run(recipe, tensors, report)
    seconds = time.perf_counter() - start
    gpus = range(torch.cuda.device_count()) if cuda else range(0)
    peak = sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus)
    weights = sum(residency.device_bytes for residency in runner.residencies)
    alone = not (isinstance(runner, DenoiseStage) and runner.parts)
    return Measured(outcome, seconds, peak, max(0, peak - weights), cuda and alone and refusals() > refused)


def refusals() -> int:
    """How often GPU memory was asked for and not there; cuDNN asks, and takes another algorithm instead."""
    return sum(torch.cuda.memory_stats(gpu).get("num_ooms", 0) for gpu in range(torch.cuda.device_count()))


class Hands:
    """One task at a time. What happens comes out of `events`, and a byte on `wake` says that something did."""

    def __init__(
        self, load: Load, turns: Path | None, workspace: int | None, warm: Callable[[], None] = lambda: None
    ) -> None:
        """`workspace` is given where it works in leases: bytes that the stage takes beside its weights, erring high.

        `warm` waits until the device is ready to compute.
        """
        self.events: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()
        self.wake, self.bell = socket.socketpair()
        self.wake.setblocking(False)
        self.bell.setblocking(False)
        self._load, self._turns, self._workspace, self._warm = load, turns, workspace, warm
        self._orders: queue.SimpleQueue[tuple[Task | Lease, tuple[Tensor, ...]]] = queue.SimpleQueue()
        self._cancelled: set[tuple[str, int]] = set()
        self._thread = threading.Thread(target=self._work, daemon=True, name="hands")

    def start(self) -> None:
        self._thread.start()

    def give(self, order: Task | Lease, tensors: tuple[Tensor, ...]) -> None:
        if isinstance(order, Task):
            self._cancelled.discard((order.job, order.attempt))  # what was cancelled under this number is over
        self._orders.put((order, tensors))

    def cancel(self, job: str, attempt: int) -> None:
        self._cancelled.add((job, attempt))

    def fail(self, error: BaseException) -> None:
        """End the worker, from any thread."""
        self._emit(error)

    def ring(self) -> None:
        """Wake whoever listens."""
        with contextlib.suppress(BlockingIOError):  # a full bell has rung already
            self.bell.send(b"!")

    def _emit(self, event: Event | BaseException) -> None:
        self.events.put(event)
        self.ring()

    def _work(self) -> None:
        """What ends this thread ends the worker."""
        try:
            self._serve()
        except BaseException as error:
            self._emit(error)

    def _serve(self) -> None:
        runner, device_map = self._load()
        share = None if self._workspace is None else Share(runner.device, runner.residencies, self._workspace)
        ready = Ready(device_map=device_map, residency=views(runner))
        if share:
            ready = ready.model_copy(update={"needs": share.needs(), "context_bytes": share.context_bytes()})
        self._emit((ready, []))
        while True:
            order, tensors = self._orders.get()
            if isinstance(order, Lease):
                assert share is not None
                self._emit((settle(share, order, runner), []))
                continue
            self._do(runner, order, tensors)
            del order, tensors
            self._emit((Ready(residency=views(runner), context_bytes=share.context_bytes() if share else 0), []))

    def _do(self, runner: StageRunner, task: Task, tensors: tuple[Tensor, ...]) -> None:
        key: dict[str, Any] = {"job": task.job, "stage": task.stage, "attempt": task.attempt}
        extra = {"job": task.job}
        told = time.monotonic()

        def report(step: int, steps: int, saved: Saved | None = None) -> None:
            nonlocal told
            if (task.job, task.attempt) in self._cancelled:
                raise Cancelled
            if saved or (0 < step < steps and time.monotonic() - told >= PROGRESS_SECONDS):
                told = time.monotonic()
                progress = Progress(**key, step=step, steps=steps, saved=saved.step if saved else 0)
                self._emit((progress, saved.tensors if saved else []))

        if isinstance(runner, VaeStage):
            runner.may_tile = task.make_do
        try:
            self._warm()
            with turn(self._turns):
                done = run_measured(runner, task.recipe, tensors, report)
            if done.short and not task.make_do:
                raise torch.OutOfMemoryError("a library had to do with less workspace, which may change bits")
        except RankLost:
            raise
        except Cancelled:
            log.info("cancelled", extra=extra)
            self._emit((TaskFailed(**key, reason="cancelled", retry=False, cancelled=True), []))
        except Exception as error:
            log.exception("%s failed", task.stage, extra=extra)
            short, retry = isinstance(error, torch.OutOfMemoryError), not isinstance(error, PERMANENT)
            if short:
                release_memory()
            elif retry and runner.device.type == "cuda":
                torch.cuda.synchronize(runner.device)  # where a context is broken for good, this ends the worker
            self._emit((TaskFailed(**key, reason=cause_of(error), retry=retry, out_of_memory=short), []))
        else:
            log.info("%s took %.3f s", task.stage, done.seconds, extra=extra)
            result = Result(
                **key, seconds=done.seconds, peak_bytes=done.peak_bytes, workspace_bytes=done.workspace_bytes,
                warnings=(*done.outcome.warnings, *((IN_SHORT,) if done.short else ())),
            )  # fmt: skip
            self._emit((result, done.outcome.tensors))
        self._cancelled.discard((task.job, task.attempt))


def settle(share: Share, lease: Lease, runner: StageRunner) -> Leased:
    """Do what a lease says, and tell how it is now."""
    kept, size, weights, reason = 0, lease.bytes, lease.weights, ""
    start = time.perf_counter()
    try:
        if size:
            share.take(size, weights)
        else:
            kept = share.give_back()
        log.info("lease of %s taken in %.2f s", format_bytes(size), time.perf_counter() - start)
    except (torch.OutOfMemoryError, DoesNotFit) as error:
        log.warning("a lease of %d bytes was too small: %s", size, error)
        reason, size, weights, kept = cause_of(error), 0, 0, share.give_back()
    return Leased(
        bytes=size, weights=weights, kept_bytes=kept, context_bytes=share.context_bytes(), residency=views(runner),
        reason=reason,
    )  # fmt: skip


def views(runner: StageRunner) -> tuple[ComponentView, ...]:
    """Where a stage's weights are."""
    return tuple(
        ComponentView(
            component=r.name, state=r.state, device_bytes=r.device_bytes, total_bytes=r.total_bytes,
            swap_seconds=r.seconds,
        )
        for r in runner.residencies
    )  # fmt: skip


def cause_of(error: BaseException) -> str:
    """One line that names what went wrong, down to the first cause."""
    parts = [f"{type(error).__name__}: {error}".splitlines()[0].strip().rstrip(":")]
    while error.__cause__ is not None:
        error = error.__cause__
        parts.append(f"because of {type(error).__name__}: {error}".splitlines()[0])
    if isinstance(error, torch.OutOfMemoryError):
        parts.append(
            "a smaller picture, fewer a job, or more memory for this stage (--budget, --max-memory) would help"
        )
    return "; ".join(parts)[:2000]


def resident_bytes() -> int:
    """This process's memory, from the kernel; 0 where it can't be read."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
