"""Measure HTTP on the demo model: what it adds to a job, and many clients at once.

    python -m scripts.bench.http latency
    python -m scripts.bench.http load --clients 200 --seconds 60

Prints one JSON line a row.
"""

import asyncio
import contextlib
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click
import httpx
import psutil

from protocol.client.client import Client
from protocol.client.picture_files import metadata_of, picture_bytes

UP = [sys.executable, "-m", "orchestrator.cli", "up", "--http", "127.0.0.1:0", "--http-rate", "100000", "--json"]
JOB = {"prompt": "a large red circle", "steps": 2}


@contextlib.contextmanager
def stack() -> Iterator[tuple[Client, str]]:
    """A stack on the demo model: its client, and the address of its HTTP."""
    with tempfile.TemporaryDirectory(prefix="th-") as folder:
        process = subprocess.Popen([*UP, "--state", folder], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            told = json.loads(process.stdout.readline())
            with Client(Path(folder), timeout=60) as client:
                yield client, told["http"]
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)


def row(**values: object) -> None:
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}), flush=True)


@click.group()
def main() -> None:
    pass


@main.command()
@click.option("--jobs", default=60, show_default=True)
def latency(jobs: int) -> None:
    """Time the same pictures by the client and by HTTP, in turns, until there is a PNG file."""
    with stack() as (client, address), httpx.Client(base_url=address, timeout=60, trust_env=False) as web:
        direct, by_http = [], []
        for number in range(jobs + 5):
            start = time.perf_counter()
            job = client.wait(client.submit(str(JOB["prompt"]), steps=2, seed=number).id)
            picture_bytes(client.pictures(job.id)[0], "PNG", metadata_of(job.recipe, job.id, 0, job.records))
            middle = time.perf_counter()
            web.post("/v1/images/generations", json={**JOB, "seed": number + 1_000_000}).raise_for_status()
            end = time.perf_counter()
            if number >= 5:
                direct.append(middle - start)
                by_http.append(end - middle)
        found = [statistics.median(times) * 1000 for times in (direct, by_http)]
        row(what="a picture, median", client_ms=found[0], http_ms=found[1], added_ms=found[1] - found[0], goal_ms=5.0)


@main.command()
@click.option("--clients", default=200, show_default=True)
@click.option("--seconds", default=60.0, show_default=True)
def load(clients: int, seconds: float) -> None:
    """Let clients submit jobs and wait for them by their events, all at once."""
    with stack() as (client, address):
        pid = next(process.pid for process in client.workers().processes if process.name == "http")
        server = psutil.Process(pid)
        begun = asyncio.run(crowd(address, 10, 3.0))
        before = server.memory_info().rss
        submits, accepted = asyncio.run(crowd(address, clients, seconds))
        after, lost = server.memory_info().rss, 0
        for job in [*begun[1], *accepted]:
            lost += client.wait(job, 600).state != "done"
        times = sorted(submits)
        row(what=f"{clients} clients for {seconds:g} s", jobs=len(accepted), lost=lost,
            submit_p50_ms=times[len(times) // 2] * 1000, submit_p99_ms=times[int(len(times) * 0.99)] * 1000,
            rss_before_MB=before / 1e6, rss_after_MB=after / 1e6)  # fmt: skip


async def crowd(address: str, clients: int, seconds: float) -> tuple[list[float], list[str]]:
    """Return the seconds that each submission took, and the jobs that were accepted."""
    submits: list[float] = []
    accepted: list[str] = []
    end = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)

    async def one(number: int, web: httpx.AsyncClient) -> None:
        while time.monotonic() < end:
            start = time.perf_counter()
            answer = await web.post("/api/jobs", json={**JOB, "seed": number})
            submits.append(time.perf_counter() - start)
            answer.raise_for_status()
            job = answer.json()["id"]
            accepted.append(job)
            async with web.stream("GET", f"/api/jobs/{job}/events") as events:
                async for _ in events.aiter_lines():
                    if time.monotonic() > end:
                        return

    async with httpx.AsyncClient(base_url=address, timeout=300, trust_env=False, limits=limits) as web:
        await asyncio.gather(*(one(number, web) for number in range(clients)))
    return submits, accepted


if __name__ == "__main__":
    main()
