"""Measure what the stack costs, side by side in one run.

    python -m scripts.bench.stack pictures       the demo model: through a stack, and the same pipeline in one process
    python -m scripts.bench.stack orchestrator   the orchestrator alone, with workers that do nothing
    python -m scripts.bench.stack restart        the orchestrator killed with 10,000 jobs queued
    python -m scripts.bench.stack keeping        artifacts and checkpoints kept, and not

Prints one JSON line a row.

Longer than other files: four measurements of one stack, with the same workers that do nothing.
"""

import contextlib
import itertools
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgpack
import psutil
import zmq

from orchestrator.settings import OrchestratorSettings, OrchestratorSpec
from protocol import wire
from protocol.client.client import Client
from protocol.job import JobRequest
from protocol.messages.common import Heartbeat
from protocol.messages.worker import Ready, WorkerHello
from protocol.model import ModelDescription
from protocol.sockets import dealer, new_identity
from protocol.stages import USUAL_NEXT, Stage
from protocol.tensors import Tensor

TRIPTYCH = [sys.executable, "-m", "orchestrator.cli"]
PROMPT = "a large red circle at the top left and a small blue star at the bottom right on a {} background"
QUEUED = 20
COLORS = ("yellow", "white", "green", "purple", "orange", "black")


def row(**values: Any) -> None:
    print(json.dumps(values), flush=True)


@click.group(help=__doc__.split("\n")[0])
def main() -> None:
    pass


# -- pictures ---------------------------------------------------------------------------------------


@main.command()
@click.option("--jobs", default=100, show_default=True)
@click.option("--denoisers", default=1, show_default=True, help="denoise workers of the stack")
def pictures(jobs: int, denoisers: int) -> None:
    """Latency and throughput through the stack against FluxPipeline in one process, in turns, all prompts new."""
    one_process = plain_pipeline()
    with tempfile.TemporaryDirectory() as folder:
        command = [*TRIPTYCH, "up", "--state", folder, "--json", "--device", "cpu", "--workers", f"denoise={denoisers}"]
        stack = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert stack.stdout is not None
            assert stack.stdout.readline(), "the stack did not start"
            with Client(folder, timeout=60) as client:
                compare(client, one_process, jobs)
        finally:
            stack.terminate()
            stack.wait()


def plain_pipeline() -> Callable[[str, int], Any]:
    import torch
    from diffusers import FluxPipeline

    from workers.models.source import DEMO_FOLDER

    settings = json.loads((DEMO_FOLDER / "triptych.json").read_text())["defaults"]
    pipeline = FluxPipeline.from_pretrained(DEMO_FOLDER, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return lambda prompt, seed: pipeline(prompt, generator=torch.Generator("cpu").manual_seed(seed), **settings).images


def prompts(count: int, turn: str) -> list[str]:
    """Return prompts, different for every turn, so that no embedding is cached."""
    return [f"{PROMPT.format(COLORS[i % len(COLORS)])} {turn} {i}" for i in range(count)]


def compare(client: Client, one_process: Callable[[str, int], Any], jobs: int) -> None:
    def through_stack(prompt: str, seed: int) -> None:
        job = client.submit(prompt, seed=seed)
        client.wait(job.id)
        client.raw_pictures(job.id)

    for name, make in (("warm", one_process), ("up", through_stack)):
        for prompt in prompts(3, name):
            make(prompt, 0)
    alone, staged = [], []
    for i in range(jobs):  # in turns, so that both see the same machine
        alone.append(timed(one_process, prompts(jobs, "a")[i], i))
        staged.append(timed(through_stack, prompts(jobs, "b")[i], i))
    added = [1000 * (s - a) for s, a in zip(staged, alone, strict=True)]
    row(what="latency", one_process_ms=1000 * statistics.median(alone), stack_ms=1000 * statistics.median(staged),
        added_ms=statistics.median(added), goal_added_ms=10)  # fmt: skip
    alone_seconds = stack_seconds = 0.0
    for turn in range(0, jobs, QUEUED):  # in turns again: a queue of pictures each
        start = time.perf_counter()
        for i, prompt in enumerate(prompts(QUEUED, f"c {turn}")):
            one_process(prompt, i)
        alone_seconds += time.perf_counter() - start
        start = time.perf_counter()
        requests = [JobRequest(prompt=prompt, seed=i) for i, prompt in enumerate(prompts(QUEUED, f"d {turn}"))]
        for job in client.submit_many(requests):
            client.wait(job.id)
            client.raw_pictures(job.id)
        stack_seconds += time.perf_counter() - start
    made = QUEUED * len(range(0, jobs, QUEUED))
    row(what="throughput", queued=QUEUED, one_process_per_s=made / alone_seconds, stack_per_s=made / stack_seconds,
        ratio=alone_seconds / stack_seconds, goal_ratio=1.0)  # fmt: skip


def timed(make: Callable[[str, int], Any], prompt: str, seed: int) -> float:
    """Seconds of one picture, once the threads that the last one used have stopped spinning."""
    time.sleep(0.1)
    start = time.perf_counter()
    make(prompt, seed)
    return time.perf_counter() - start


# -- the orchestrator alone -------------------------------------------------------------------------

MODEL = ModelDescription(
    model="null", revision="null", pipeline="Null", size_multiple=16, width=64, height=64, max_pixels=1 << 20, steps=4,
    guidance=None, cfg_scale=None, negative_prompt=False, max_sequence_length=None, max_sequence_limit=512,
)  # fmt: skip
OUTPUTS: dict[Stage, Tensor] = {
    "text": Tensor("prompt_embeds", "float32", (64,), bytes(256)),
    "denoise": Tensor("decode:0", "float32", (64,), bytes(256)),
    "vae": Tensor("pictures", "uint8", (1, 8, 8, 3), bytes(192)),
}


PIDS = itertools.count(10_000_000)  # of no process


class NullWorker:
    """Answers a task at once, with as little work of its own as can be."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, stage: Stage, number: int) -> None:
        self.socket = dealer(context, endpoint, new_identity())
        self.socket.poll(10_000, zmq.POLLOUT)
        hello = WorkerHello(name=f"{stage}-{number}", stage=stage, pid=next(PIDS), host=socket.gethostname(),
                            device="none", dtype="float32", model=MODEL)  # fmt: skip
        output = OUTPUTS[stage]
        self._specs, self._data = [output.spec], output.data
        self._ready = [bytes(part) for part in wire.encode(Ready())]
        for message in (hello, Ready()):
            self.socket.send_multipart(wire.encode(message))

    def answer(self) -> None:
        frames = self.socket.recv_multipart()
        if frames[0] != b"\x01task":
            return
        task = msgpack.unpackb(frames[1])["fields"]
        fields = {name: task[name] for name in ("job", "stage", "attempt")} | {
            "seconds": 0.0,
            "next": USUAL_NEXT[task["stage"]],
        }
        header = msgpack.packb({"fields": fields, "tensors": self._specs})
        self.socket.send_multipart([b"\x01result", header, self._data])
        self.socket.send_multipart(self._ready)


def work(endpoint: str, each: int) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    stages: tuple[Stage, ...] = ("text", "denoise", "vae")
    workers = {w.socket: w for w in (NullWorker(context, endpoint, stage, i) for stage in stages for i in range(each))}
    poller = zmq.Poller()
    for link in workers:
        poller.register(link, zmq.POLLIN)
    beat, beaten = wire.encode(Heartbeat(rss_bytes=0, gpu_bytes=0)), time.monotonic()
    while True:
        for link, _ in poller.poll(1000):
            workers[link].answer()
        if time.monotonic() - beaten > 1:
            beaten = time.monotonic()
            for link in workers:
                link.send_multipart(beat)


def start_orchestrator(folder: str) -> subprocess.Popen[bytes]:
    (Path(folder) / "stack.json").unlink(missing_ok=True)
    settings = OrchestratorSettings(queue_limit=1_000_000)
    spec = OrchestratorSpec(
        state=Path(folder), clients=f"ipc://{folder}/c", workers=f"ipc://{folder}/w", settings=settings
    )
    command = [sys.executable, "-m", "orchestrator.server", spec.model_dump_json()]
    with Path(f"{folder}.log").open("ab") as log:
        process = subprocess.Popen(command, stderr=log)
    while not (Path(folder) / "stack.json").exists():
        time.sleep(0.005)
    return process


@main.command()
@click.option("--jobs", default=10_000, show_default=True)
@click.option("--times", default=5, show_default=True)
def restart(jobs: int, times: int) -> None:
    """Seconds from starting a killed orchestrator to its knowing all queued jobs, and to its first task handed out."""
    with tempfile.TemporaryDirectory(prefix="tb-") as folder:
        process = start_orchestrator(folder)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        NullWorker(context, f"ipc://{folder}/w", "vae", 0)
        with Client(folder, timeout=60) as client:
            sent = client.submit_many([JobRequest(prompt=f"prompt {i}") for i in range(jobs)])
        known, handed = [], []
        for _ in range(times):
            process.kill()
            process.wait()
            start = time.perf_counter()
            process = start_orchestrator(folder)
            with Client(folder, timeout=60) as client:
                assert dict(client.stack().counts) == {"queued": jobs}
                known.append(time.perf_counter() - start)
                assert client.job(sent[-1].id).id == sent[-1].id
            worker = NullWorker(context, f"ipc://{folder}/w", "text", 0)
            while worker.socket.recv_multipart()[0] != b"\x01task":
                pass
            handed.append(time.perf_counter() - start)
            worker.socket.close(linger=0)
        process.terminate()
        process.wait()
        row(what="restart", jobs=jobs, known_s=round(statistics.median(known), 3), worst_known_s=round(max(known), 3),
            first_task_s=round(statistics.median(handed), 3), goal_s=2.0)  # fmt: skip


@main.command()
@click.option("--jobs", default=200, show_default=True, help="of each kind")
def keeping(jobs: int) -> None:
    """Pictures a second on the demo model, with all kept that a crash would cost and with nothing kept, in turns."""
    with tempfile.TemporaryDirectory(prefix="tb-") as folder, contextlib.ExitStack() as stack:
        (Path(folder) / "nothing.toml").write_text("keep = false\ncheckpoint = 'off'\n")
        clients = []
        for name, options in (("kept", []), ("nothing", ["--config", f"{folder}/nothing.toml"])):
            command = [*TRIPTYCH, "up", "--state", f"{folder}/{name}", "--json", "--device", "cpu", *options]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            assert process.stdout is not None
            assert process.stdout.readline(), "the stack did not start"
            clients.append(stack.enter_context(Client(f"{folder}/{name}", timeout=60)))
        seconds: list[list[float]] = [[], []]
        for turn in range(-1, jobs // QUEUED):
            for which in (0, 1) if turn % 2 else (1, 0):
                took = batch(clients[which], f"{turn}")
                if turn >= 0:
                    seconds[which].append(took)
        ratios = [kept / nothing for kept, nothing in zip(*seconds, strict=True)]
        row(what="keeping", jobs=jobs, kept_per_s=round(QUEUED / statistics.median(seconds[0]), 3),
            nothing_kept_per_s=round(QUEUED / statistics.median(seconds[1]), 3),
            cost_percent=round(100 * (statistics.median(ratios) - 1), 2), goal_percent=2.0)  # fmt: skip


def batch(client: Client, turn: str) -> float:
    """Seconds of a queue of pictures, all prompts new."""
    start = time.perf_counter()
    requests = [JobRequest(prompt=prompt, seed=i) for i, prompt in enumerate(prompts(QUEUED, turn))]
    for job in client.submit_many(requests):
        client.wait(job.id)
        client.raw_pictures(job.id)
    return time.perf_counter() - start


@main.command()
@click.option("--jobs", default=100_000, show_default=True)
@click.option("--workers", "each", default=4, show_default=True, help="of each stage")
def orchestrator(jobs: int, each: int) -> None:
    """Jobs a second through three stages of workers that do nothing, and the orchestrator's memory on the way."""
    with tempfile.TemporaryDirectory(prefix="tb-") as folder:
        process = start_orchestrator(folder)
        doing_nothing = subprocess.Popen(
            [sys.executable, "-m", "scripts.bench.stack", "_work", f"ipc://{folder}/w", str(each)]
        )
        try:
            push(Client(folder, timeout=60), psutil.Process(process.pid), jobs)
        finally:
            doing_nothing.kill()
            process.terminate()
            process.wait()


def push(client: Client, process: psutil.Process, jobs: int) -> None:
    """Keep between 2,000 and 4,000 jobs queued until all are done."""
    client.submit("warm up")
    start, cpu, sent = time.perf_counter(), sum(process.cpu_times()[:2]), 0
    marks: list[float] = []
    while (done := dict(client.stack().counts).get("done", 0)) < jobs:
        if sent < jobs and sent - done < 2000:
            count = min(1000, jobs - sent)
            client.submit_many([JobRequest(prompt=f"prompt {sent + i}") for i in range(count)])
            sent += count
        if done >= (len(marks) + 1) * jobs // 10:
            marks.append(round(process.memory_info().rss / 1e6, 1))
        threading.Event().wait(0.02)
    seconds = time.perf_counter() - start
    row(what="orchestrator", jobs=jobs, jobs_per_s=round(jobs / seconds), goal_jobs_per_s=1000, rss_mb=marks,
        cpu_ms_per_job=round(1000 * (sum(process.cpu_times()[:2]) - cpu) / jobs, 3))  # fmt: skip
    client.close()


@main.command("_work", hidden=True)
@click.argument("endpoint")
@click.argument("each", type=int)
def _work(endpoint: str, each: int) -> None:
    work(endpoint, each)


if __name__ == "__main__":
    main()
