"""Rows of bench_gpu.py that need whole stacks: real workers on one GPU, or on several (see bench_gpus.py)."""

import contextlib
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from orchestrator.gpu_driver import used_bytes
from protocol.client.client import Client
from protocol.job import JobRequest

TRIPTYCH = [sys.executable, "-m", "orchestrator.cli"]
GIB = 1 << 30
PROMPT = "a large red circle at the top left"  # of the picture that is compared
EDGE = 2  # jobs for each GPU at the beginning and the end of a queue, when not all are busy


def rounded(value: Any) -> Any:
    if isinstance(value, tuple):
        return [rounded(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value


def row(**values: Any) -> None:
    print(json.dumps({name: rounded(value) for name, value in values.items()}), flush=True)


@contextlib.contextmanager
def watched(used: Callable[[], int]) -> Iterator[list[int]]:
    """The most that `used` gives meanwhile."""
    peak, stop = [used()], threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            peak[0] = max(peak[0], used())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def tell_end(process: psutil.Process, killed: float, gone: list[float]) -> None:
    """Note how long it takes until a killed process has let go of all that it held."""
    process.wait()
    gone.append(time.perf_counter() - killed)


def steady_seconds(ends: Sequence[float], gpus: int) -> float:
    """Return the seconds a job, by when jobs ended, without EDGE a GPU at either side; 0 where too few are left.

    They are counted from an end outside on: jobs of as many GPUs may end at once, and then do so again.
    """
    edge = EDGE * gpus
    rounds = (len(ends) - 2 * edge) // gpus
    if rounds < 1:
        return 0.0
    in_order = sorted(ends)
    return (in_order[edge - 1 + rounds * gpus] - in_order[edge - 1]) / (rounds * gpus)


class StackBench:
    """Rows of whole stacks. `plain` is the seconds of the same picture in one process, and `picture` its pixels.

    Without CUDA a CPU plays all of `gpus`.
    """

    def __init__(
        self,
        model: Path,
        gpus: tuple[int, ...],
        cuda: bool,
        size: int,
        steps: int,
        plain: float,
        picture: np.ndarray,
        logs: Path | None,
    ) -> None:
        self.model, self.gpus, self.cuda, self.plain, self.picture, self.logs = model, gpus, cuda, plain, picture, logs
        self.recipe: dict[str, Any] = {"width": size, "height": size, "steps": steps}
        self.prompts = 0

    @contextlib.contextmanager
    def stack(self, budget: int, *arguments: str) -> Iterator[Client]:
        with tempfile.TemporaryDirectory(prefix="tg-") as folder:
            command = [*TRIPTYCH, "up", "--state", folder, "--json", *self.where(budget), *arguments]
            start = time.perf_counter()
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            try:
                assert process.stdout is not None
                assert process.stdout.readline(), "the stack did not come up"
                row(what="stack ready", s=time.perf_counter() - start)
                with Client(folder, timeout=60) as client:
                    yield client
                    self.show(client)
            finally:
                process.send_signal(signal.SIGINT)
                process.wait(30)
                for log in sorted(Path(folder, "logs").glob("*.log")):
                    bad = [line for line in log.read_text().splitlines() if " WARNING " in line or " ERROR " in line]
                    for line in bad[-5:]:
                        print(f"{log.stem}: {line}", flush=True)
                    if self.logs:
                        self.logs.mkdir(parents=True, exist_ok=True)
                        shutil.copy(log, self.logs / f"{budget}-{log.name}")

    def where(self, budget: int) -> list[str]:
        """Options for a stack on these GPUs, each of which gives so many bytes."""
        numbers = ",".join(map(str, self.gpus))
        there = ["--gpus", numbers] if self.cuda else ["--device", f"cpu:{numbers}", "--dtype", "bfloat16"]
        budgets = [part for gpu in self.gpus for part in ("--budget", f"{gpu}={budget}B")]
        return ["--model", str(self.model), *there, *budgets]

    def show(self, client: Client) -> None:
        for worker in client.workers().workers:
            weights = {c.component: (c.state, round(c.device_bytes / 1e9, 2), round(c.swap_seconds, 3))
                       for c in worker.residency}  # fmt: skip
            held, contexts = ([size / 1e9 for size in sizes] for sizes in (worker.lease_bytes, worker.context_bytes))
            row(what=worker.name, lease_GB=tuple(held), context_GB=tuple(contexts), **weights)

    def new_request(self, seed: int = 1) -> JobRequest:
        """Make a request with a prompt that was never seen."""
        self.prompts += 1
        return JobRequest(prompt=f"{PROMPT}, number {self.prompts}", seed=seed, **self.recipe)

    def one(self, client: Client) -> tuple[float, dict[str, float]]:
        """Seconds of a picture with a new prompt, and of them those that each stage computed."""
        start = time.perf_counter()
        job = client.wait(client.submit_many([self.new_request()])[0].id)
        return time.perf_counter() - start, {record.stage: round(record.seconds, 3) for record in job.records}

    def plan(self, budget: int, *arguments: str) -> dict[str, Any]:
        """Predict a stack that has run before: workspaces as known, by the table; of several models the first."""
        command = [*TRIPTYCH, "plan", "--json", *self.where(budget), *arguments]
        command += ["--size", f"{self.recipe['width']}x{self.recipe['height']}", "--steps", str(self.recipe["steps"])]
        command += ["--frames", str(self.recipe["frames"])] if "frames" in self.recipe else []
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        return dict(found[0] if isinstance(found, list) else found)

    def queue(self, client: Client, count: int, same: bool = False) -> tuple[float, float]:
        """Seconds a picture with so many jobs in the queue, all of them and those in the middle: the steady state.

        With too few jobs for a middle they are all. With the `same` prompt nothing is encoded.
        """
        requests = [self.new_request(seed) for seed in range(count)]
        if same:
            requests = [request.model_copy(update={"prompt": requests[0].prompt}) for request in requests]
            client.wait(client.submit(requests[0]).id, 300)
        start = time.perf_counter()
        jobs = [client.wait(job.id, 300) for job in client.submit_many(requests)]
        whole = (time.perf_counter() - start) / count
        return whole, steady_seconds([job.finished or 0.0 for job in jobs], len(self.gpus)) or whole

    def differing(self, client: Client, prompt: str) -> int:
        """Values of the stack's picture that are not those of the plain pipeline's."""
        job = client.submit(JobRequest(prompt=prompt, seed=1, **self.recipe))
        client.wait(job.id)
        _, tensor = client.raw_pictures(job.id)
        return int(np.sum(np.frombuffer(tensor.data, "uint8") != (self.picture * 255).round().astype("uint8").ravel()))

    def used(self) -> int:
        """Bytes in use on the fullest GPU by its driver's count; 0 without one."""
        return max(used_bytes(gpu) or 0 for gpu in self.gpus) if self.cuda else 0

    def resident(self, budget: int, prompt: str) -> None:
        with self.stack(budget) as client:
            differing = self.differing(client, prompt)
            times, stages = zip(*[self.one(client) for _ in range(5)], strict=True)
            seconds = statistics.median(times)
            row(what="whole picture through the stack, everything resident", s=seconds, times=times, stages=stages,
                of_one_process=seconds / self.plain, goal=1.01, differing=differing)  # fmt: skip
            self.kill(client)

    def kill(self, client: Client) -> None:
        """kill -9 of the denoise worker in mid-run, until a step after those that were reported."""
        job = client.submit_many([self.new_request()])[0]
        killed, lost, reached = 0.0, False, max(2, self.recipe["steps"] // 4)
        gone: list[float] = []
        for event in client.events([job.id], timeout=120):
            if event.state != "denoise":
                continue
            if not killed and event.running and event.step >= reached:
                worker = psutil.Process(next(w.pid for w in client.workers().workers if w.stage == "denoise"))
                worker.kill()
                killed, reached = time.perf_counter(), event.step
                threading.Thread(target=tell_end, args=(worker, killed, gone)).start()
            elif killed and not event.running:
                lost = True
            elif killed and not lost:
                reached = max(reached, event.step)
            elif killed and event.step > reached:
                row(what="kill -9 of the denoise worker until its next step", s=time.perf_counter() - killed, goal=2.0,
                    process_gone_s=(*gone,), reached=reached, step=event.step)  # fmt: skip
                break
        client.wait(job.id)

    def turns(self, budget: int, prompt: str) -> None:
        """Measure one GPU that can't hold text encoders and denoiser; new prompts, one after the other."""
        with self.stack(budget) as client:
            differing = self.differing(client, prompt)
            times, stages = zip(*[self.one(client) for _ in range(3)], strict=True)
            row(what="whole picture, one GPU that can't hold both", s=statistics.median(times), times=times,
                stages=stages, budget_GB=budget / 1e9, goal=5.8, differing=differing)  # fmt: skip

    def card(self, budget: int, prompt: str, count: int = 8) -> None:
        """A small card doing everything, with jobs in the queue."""
        foreign = self.used()
        with watched(self.used) as peak, self.stack(budget) as client:
            differing = self.differing(client, prompt)
            start = time.perf_counter()
            for job in client.submit_many([self.new_request() for _ in range(count)]):
                client.wait(job.id)
            seconds = (time.perf_counter() - start) / count
            row(
                what=f"{budget / GIB:g} GiB card doing everything, {count} jobs in the queue", s_a_picture=seconds,
                goal=5.4, differing=differing, driver_bytes=peak[0] - foreign, card_bytes=budget, others_bytes=foreign,
            )  # fmt: skip
