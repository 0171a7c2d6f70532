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

from protocol.errors import TriptychError
from protocol.jobs import ComponentView, Recipe
from protocol.messages import Heartbeat, Message, Progress, Ready, Result, Task, TaskFailed
from protocol.tensors import Tensor
from workers.denoise import DenoiseStage
from workers.outcome import Cancelled, Outcome, StageError, release_memory
from workers.text import TextStage
from workers.turns import turn
from workers.vae import VaeStage

log = logging.getLogger(__name__)

StageRunner = TextStage | DenoiseStage | VaeStage
Load = Callable[[], tuple[StageRunner, tuple[tuple[str, str], ...]]]
Event = tuple[Message, list[Tensor]]
PROGRESS_SECONDS = 0.1  # faster steps share a message: nobody reads more, and each costs a computation on the CPU 2 ms
PERMANENT = (StageError, TriptychError, TypeError, ValueError, NotImplementedError)


@dataclass(frozen=True, slots=True)
class Measured:
    outcome: Outcome
    seconds: float
    peak_bytes: int  # of GPU memory, all GPUs together; 0 on a CPU


def run_measured(
    runner: StageRunner, recipe: Recipe, tensors: tuple[Tensor, ...], report: Callable[[int, int], None]
) -> Measured:
    """Run a stage once, with its time and its peak of GPU memory."""
    cuda = runner.device.type == "cuda"
    if cuda:
        for gpu in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(gpu)
    start = time.perf_counter()
    outcome = runner.run(recipe, tensors, report)
    seconds = time.perf_counter() - start
    gpus = range(torch.cuda.device_count()) if cuda else range(0)
    return Measured(outcome, seconds, sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus))


class Hands:
    """One task at a time. What happens comes out of `events`, and a byte on `wake` says that something did."""

    def __init__(self, load: Load, turns: Path | None, keep_alive: float | None) -> None:
        """Weights leave their device after `keep_alive` seconds without a task; None: never."""
        self.events: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()
        self.wake, self.bell = socket.socketpair()
        self.wake.setblocking(False)
        self.bell.setblocking(False)
        self._load, self._turns, self._keep_alive = load, turns, keep_alive
        self._tasks: queue.SimpleQueue[tuple[Task, tuple[Tensor, ...]]] = queue.SimpleQueue()
        self._cancelled: set[tuple[str, int]] = set()
        self._thread = threading.Thread(target=self._work, daemon=True, name="hands")

    def start(self) -> None:
        self._thread.start()

    def give(self, task: Task, tensors: tuple[Tensor, ...]) -> None:
        self._tasks.put((task, tensors))

    def cancel(self, job: str, attempt: int) -> None:
        self._cancelled.add((job, attempt))

    def _emit(self, event: Event | BaseException) -> None:
        self.events.put(event)
        with contextlib.suppress(BlockingIOError):  # a full bell has rung already
            self.bell.send(b"!")

    def _work(self) -> None:
        try:
            runner, device_map = self._load()
        except BaseException as error:
            self._emit(error)
            return
        residency = views(runner)
        self._emit((Ready(device_map=device_map, residency=residency), []))
        while True:
            try:
                task, tensors = self._tasks.get(timeout=self._keep_alive if present(runner) else None)
            except queue.Empty:
                for component in runner.residencies:
                    component.swap_out()
                log.info("let go of the weights after %g s without work", self._keep_alive)
                self._emit((Heartbeat(rss_bytes=resident_bytes(), gpu_bytes=0, residency=views(runner)), []))
                continue
            self._do(runner, task, tensors)
            del tensors
            before, residency = residency, views(runner)
            self._emit((Ready(residency=residency if residency != before else ()), []))

    def _do(self, runner: StageRunner, task: Task, tensors: tuple[Tensor, ...]) -> None:
        key: dict[str, Any] = {"job": task.job, "stage": task.stage, "attempt": task.attempt}
        extra = {"job": task.job}

        told = time.monotonic()

        def report(step: int, steps: int) -> None:
            nonlocal told
            if (task.job, task.attempt) in self._cancelled:
                raise Cancelled
            if 0 < step < steps and time.monotonic() - told >= PROGRESS_SECONDS:
                told = time.monotonic()
                self._emit((Progress(**key, step=step, steps=steps), []))

        try:
            with turn(self._turns):
                for component in runner.residencies:
                    component.resume()
                done = run_measured(runner, task.recipe, tensors, report)
        except Cancelled:
            log.info("cancelled", extra=extra)
            self._emit((TaskFailed(**key, reason="cancelled", retry=False, cancelled=True), []))
        except Exception as error:
            log.exception("%s failed", task.stage, extra=extra)
            if isinstance(error, torch.OutOfMemoryError):
                release_memory()
            self._emit((TaskFailed(**key, reason=cause_of(error), retry=not isinstance(error, PERMANENT)), []))
        else:
            log.info("%s took %.3f s", task.stage, done.seconds, extra=extra)
            result = Result(**key, seconds=done.seconds, peak_bytes=done.peak_bytes, warnings=done.outcome.warnings)
            self._emit((result, done.outcome.tensors))
        self._cancelled.discard((task.job, task.attempt))


def present(runner: StageRunner) -> bool:
    """Whether there are weights on a device to let go of."""
    return any(component.state != "out" for component in runner.residencies)


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
        parts.append("a smaller picture, fewer of them a job, or more --max-memory for this stage would help")
    return "; ".join(parts)[:2000]


def resident_bytes() -> int:
    """This process's memory, from the kernel; 0 where it can't be read."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
