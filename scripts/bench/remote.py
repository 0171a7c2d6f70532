"""Measure what another host's workers add to a job: two stacks in turns, one with workers of its own.

    python -m scripts.bench.remote --jobs 100

The other host's agent runs on this machine, so that TCP with CURVE is measured and no network. Prints one JSON line.
"""

import contextlib
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click

from orchestrator.access import KeyFolder
from protocol.client.client import Client
from protocol.client.endpoints import PUBLISHED
from protocol.curve_keys import save
from scripts.bench.stack import TRIPTYCH, prompts, row

NONE = [part for stage in ("text", "denoise", "vae") for part in ("--workers", f"{stage}=0")]
ANYWHERE = "tcp://127.0.0.1:0"


@contextlib.contextmanager
def running(command: list[str]) -> "Iterator[subprocess.Popen[str]]":
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def stack(folder: Path, *options: str) -> Iterator[Client]:
    command = [*TRIPTYCH, "up", "--state", str(folder), "--json", "--device", "cpu", *options]
    with running(command) as process:
        assert process.stdout is not None
        assert process.stdout.readline(), "the stack did not start"
        with Client(folder, timeout=60) as client:
            yield client


def seconds_of(client: Client, prompt: str, steps: int) -> float:
    time.sleep(0.1)  # until threads that the last one used have stopped spinning
    start = time.perf_counter()
    job = client.submit(prompt, seed=1, steps=steps)
    client.wait(job.id)
    client.raw_pictures(job.id)
    return time.perf_counter() - start


@click.command(help=__doc__.split("\n")[0])
@click.option("--jobs", default=100, show_default=True, help="of each stack")
@click.option("--steps", default=2, show_default=True)
def main(jobs: int, steps: int) -> None:
    with tempfile.TemporaryDirectory(prefix="tb-") as name, contextlib.ExitStack() as opened:
        folder = Path(name)
        keys = KeyFolder(folder / "remote" / "keys")
        (folder / "remote").mkdir()
        keys.server()
        local = opened.enter_context(stack(folder / "local"))
        remote = opened.enter_context(stack(folder / "remote", *NONE, "--listen-workers", ANYWHERE))
        while "worker" not in (doors := json.loads((folder / "remote" / PUBLISHED).read_text()).get("remote") or {}):
            time.sleep(0.05)
        endpoint = doors["worker"]
        save(folder / "box.key", keys.issue("box", "host", endpoint))
        join = [*TRIPTYCH, "join", str(folder / "box.key"), "--folder", str(folder / "box")]
        opened.enter_context(running(join))
        while sum(worker.state == "idle" for worker in remote.workers().workers) < 3:
            time.sleep(0.1)
        times: dict[Client, list[float]] = {local: [], remote: []}
        for turn, prompt in enumerate(prompts(jobs + 3, "r")):
            for client in (local, remote) if turn % 2 else (remote, local):
                times[client].append(seconds_of(client, prompt, steps))
        here, there = ([1000 * s for s in times[client][3:]] for client in (local, remote))
        added = [b - a for a, b in zip(here, there, strict=True)]
        row(what="another host's workers", jobs=jobs, local_ms=statistics.median(here), goal_added_ms=3,
            remote_ms=statistics.median(there), added_ms=statistics.median(added))  # fmt: skip


if __name__ == "__main__":
    main()
