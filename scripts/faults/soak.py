#!/usr/bin/env python
"""Random load and random faults against a whole stack on the demo model, for minutes; then an account of it.

    python -m scripts.faults.soak --minutes 10 --seed 1

Every job that was accepted must end with the picture that an undisturbed stack gave, to the last bit. Faults: SIGKILL
and SIGSTOP of each process, the supervisor included, one or two at a time, and bytes changed in what lies on disk. The
recovery time of a fault is that until another process stands, ready, in the place of the one that was hit. With --peers
two hostile clients and a hostile worker (hostile.py) do what they should not meanwhile, each with a key of its own.
With --loras half of the jobs name one or two of so many LoRAs of random weights. With --models 2 half of them are of a
second model, which differs in its schedule, by workers of its own. With --http all jobs go and come by HTTP, whose
process is killed, too.
"""

import base64
import hashlib
import io
import json
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import httpx
import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from protocol.client.client import Client
from protocol.client.input_pictures import picture_of
from protocol.errors import TriptychError
from protocol.job import ENDED, Job, JobRequest
from protocol.lora import LoraRequest
from protocol.stages import STAGES, Stage
from protocol.tensors import Tensor
from scripts.faults.hostile_peers import HostilePeers
from scripts.faults.saboteur import Saboteur, Stack, leftovers, patiently

MODEL = Path(__file__).parents[2] / "workers" / "demo_model"
WORKERS: dict[Stage, int] = {"text": 1, "denoise": 2, "vae": 1}
WORDS = ("red", "blue", "green", "yellow"), ("circle", "square", "star", "triangle")
IN_FLIGHT = 12  # jobs at most
FAULTS = {  # and how often each is to come
    "kill text": 3, "kill denoise": 6, "kill vae": 3, "kill orchestrator": 4, "kill forkserver": 1,
    "stop text": 2, "stop denoise": 4, "stop vae": 2, "stop orchestrator": 2,
    "kill two": 3, "kill supervisor": 1, "spoil": 3,
}  # fmt: skip


@dataclass
class Account:
    """The account of a soak."""

    accepted: dict[str, str] = field(default_factory=dict)  # job → what its picture must be
    done: dict[str, str] = field(default_factory=dict)  # job → what it was when it came
    faults: Counter[str] = field(default_factory=Counter)
    recoveries: dict[str, list[float]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    set_aside: int = (
        0  # jobs that were hit three times at the same point, and told to be tried again, as a person would
    )


def recipes(rng: random.Random, count: int, loras: Sequence[str] = (), models: Sequence[str] = ()) -> list[JobRequest]:
    """Make jobs, every third of which begins from a picture, and every sixth with a mask besides.

    Of those with even numbers each names one or two of the `loras`. They are of all `models` in turns.
    """
    image, mask = (picture.name for picture in PICTURES)
    return [
        JobRequest(
            prompt=f"a {rng.choice(WORDS[0])} {rng.choice(WORDS[1])}", seed=rng.randrange(1000), width=64, height=64,
            model=models[number // 2 % len(models)] if models else None,
            steps=rng.choice((6, 10, 20)), num_images=rng.choice((1, 1, 2)), images=() if number % 3 else (image,),
            mask=None if number % 6 else mask,
            loras=() if number % 2 or not loras else tuple(
                LoraRequest(name=name, weight=rng.choice((0.5, 1.0)))
                for name in rng.sample(sorted(loras), rng.choice((1, min(2, len(loras)))))
            ),
        )
        for number in range(count)
    ]  # fmt: skip


def another_model(folder: Path) -> Path:
    """Copy the demo model, with another schedule."""
    shutil.copytree(MODEL, folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"shift": 2.5}))
    return folder


def write_loras(folder: Path, count: int, rng: random.Random) -> list[str]:
    """Write LoRAs of the demo model with random weights, each of some of its layers, and return their names."""
    folder.mkdir()
    generator, names = torch.Generator().manual_seed(rng.randrange(1 << 30)), [f"lora{n}" for n in range(count)]
    with safe_open(MODEL / "transformer" / "diffusion_pytorch_model.safetensors", "pt") as file:
        layers = {key.removesuffix(".weight"): file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    layers = {key: shape for key, shape in layers.items() if "blocks." in key and len(shape) == 2}
    for name in names:
        tensors: dict[str, torch.Tensor] = {}
        for layer in rng.sample(sorted(layers), len(layers) // 3):
            (out, into), rank = layers[layer], rng.choice((2, 4))
            for part, shape in (("lora_A", (rank, into)), ("lora_B", (out, rank))):
                tensors[f"transformer.{layer}.{part}.weight"] = torch.randn(shape, generator=generator) * 0.05
        save_file(tensors, folder / f"{name}.safetensors")
    return names


def half() -> Image.Image:
    """A mask of the right half."""
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (32, 0, 64, 64))
    return mask


WAYS = {False: ["text", "denoise", "vae"], True: ["text", "vae", "denoise", "vae"]}  # by whether there is a picture
PICTURES = (picture_of(Image.radial_gradient("L").convert("RGB")), picture_of(half(), mask=True))


def digest_of(client: Client, job: str) -> str:
    return hashlib.sha256(client.raw_pictures(job)[1].data).hexdigest()


class Load(threading.Thread):
    """A client that submits as fast as the queue empties, and takes every picture that it is owed."""

    def __init__(
        self, stack: Stack, wanted: dict[str, str], pool: list[JobRequest], seed: int, account: Account
    ) -> None:
        super().__init__(daemon=True, name="load")
        self._stack, self._wanted, self._pool, self._account = stack, wanted, pool, account
        self._rng = random.Random(seed)
        self._open: set[str] = set()
        self._client: Client | None = None
        self._count = 0
        self._pending: JobRequest | None = None  # perhaps accepted, perhaps not
        self.stopping = threading.Event()
        self.finished = threading.Event()

    def run(self) -> None:
        while not (self.stopping.is_set() and not self._open):
            try:
                self._client = self._client or Client(self._stack.state, timeout=5)
                self._step(self._client)
            except TriptychError:
                self._reconnect()
            if self._rng.random() < 0.002:
                self._reconnect()  # clients come and go, too
        self.finished.set()

    def _reconnect(self) -> None:
        if self._client:
            self._client.close()
            self._client = None
        time.sleep(0.02)

    def _submit(self, client: Client, request: JobRequest) -> None:
        client.submit_many([request], pictures=PICTURES)

    def _digest(self, client: Client, job: Job) -> str:
        return digest_of(client, job.id)

    def _step(self, client: Client) -> None:
        while len(self._open) < IN_FLIGHT and not self.stopping.is_set():
            if self._pending is None:
                self._count += 1
                self._pending = self._rng.choice(self._pool).model_copy(update={"id": f"soak{self._count}"})
            # Again, if the answer was lost: the id makes that harmless.
            self._submit(client, self._pending)
            job_id = str(self._pending.id)
            self._account.accepted[job_id] = self._wanted[key_of(self._pending)]
            self._open.add(job_id)
            self._pending = None
        for job in [client.job(open_id) for open_id in sorted(self._open)]:
            if job.state in ENDED:
                if job.state == "done":
                    self._account.done[job.id] = self._digest(client, job)
                elif job.state == "failed" and all("died" in reason or "silent" in reason for reason in job.reasons):
                    self._account.set_aside += 1  # three deaths in a row at one point look like the job's own fault
                    client.retry(job.id)
                    continue
                else:
                    self._account.problems.append(f"{job.id} is {job.state}: {job.reasons}")
                self._open.discard(job.id)
        time.sleep(0.02)


class HttpLoad(Load):
    """The same by HTTP: what is submitted, and the files of pictures."""

    def __init__(
        self, stack: Stack, wanted: dict[str, str], pool: list[JobRequest], seed: int, account: Account, address: str
    ) -> None:
        super().__init__(stack, wanted, pool, seed, account)
        self._web = httpx.Client(base_url=address, timeout=10, trust_env=False)

    def _ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Ask; TriptychError where there is no answer now, so that it is asked again."""
        try:
            answer = self._web.request(method, path, **options)
        except httpx.TransportError as error:
            raise TriptychError(str(error)) from error
        if answer.status_code in (429, 503):
            raise TriptychError(answer.text)
        if answer.is_error:
            self._account.problems.append(f"{path}: {answer.status_code} {answer.text[:300]}")
        return answer

    def _submit(self, client: Client, request: JobRequest) -> None:
        fields = request.model_dump(exclude={"images", "mask", "loras", "videos", "settings", "control", "ip_image"})
        files = {picture.name: png_of(picture) for picture in PICTURES}
        self._ask("POST", "/api/jobs", json={
            **{name: value for name, value in fields.items() if value is not None},
            "images": [files[image] for image in request.images], "mask": files.get(request.mask or ""),
            "loras": [f"{lora.name}@{lora.weight}" for lora in request.loras],
        })  # fmt: skip

    def _digest(self, client: Client, job: Job) -> str:
        pixels = hashlib.sha256()
        for index in range(job.recipe.num_images):
            answer = self._ask("GET", f"/api/jobs/{job.id}/results/{index}.png")
            with Image.open(io.BytesIO(answer.content)) as image:
                pixels.update(image.convert("RGB").tobytes())
        return pixels.hexdigest()


def png_of(picture: Tensor) -> str:
    """Return a picture's file as base64."""
    pixels = np.frombuffer(picture.data, "uint8").reshape(picture.shape)
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if picture.shape[-1] == 1 else pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def key_of(request: JobRequest) -> str:
    return json.dumps(request.model_dump(exclude={"id"}), sort_keys=True)


class Trouble:
    def __init__(self, stack: Stack, rng: random.Random, account: Account, http: bool = False) -> None:
        self._faults = {**FAULTS, "kill http": 4} if http else FAULTS
        self._saboteur, self._rng, self._account, self._stack = Saboteur(stack, rng), rng, account, stack
        self._names = sorted(p.name for p in self._saboteur.workers().processes if p.stage is not None)

    def make(self) -> None:
        """Make one fault, from its beginning to its end."""
        kind = self._rng.choices([*self._faults], [*self._faults.values()])[0]
        self._stack.remember()
        seconds: list[float] = []
        match kind.split():
            case ["kill", "two"]:
                names = self._rng.sample([*self._names, "orchestrator"], 2)
                results: list[float] = []
                threads = [threading.Thread(target=self._hit, args=(n, signal.SIGKILL, results)) for n in names]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                seconds = [max(results)]
            case ["kill", "supervisor"]:
                seconds = [self._saboteur.end_supervisor()]
            case ["spoil"]:
                if not self._saboteur.spoil_artifact(("text", "checkpoint", "latents")):
                    return
            case [how, what]:
                number = signal.SIGKILL if how == "kill" else signal.SIGSTOP
                name = what if what in ("orchestrator", "forkserver", "http") else self._one_of(what)
                self._hit(name, number, seconds)
        self._account.faults[kind] += 1
        took = ", ".join(f"{value:.2f} s" for value in seconds)
        print(f"{time.strftime('%H:%M:%S')} {kind} {took}", file=sys.stderr, flush=True)
        self._account.recoveries.setdefault(kind, []).extend(seconds)

    def _one_of(self, stage: str) -> str:
        return self._rng.choice([name for name in self._names if stage in name.split("-")])

    def _hit(self, name: str, number: signal.Signals, results: list[float]) -> None:
        saboteur = Saboteur(self._stack, self._rng)
        try:
            results.append(saboteur.signal(name, number))
        finally:
            saboteur.close()

    def settle(self) -> None:
        self._saboteur.patiently(lambda: self._saboteur.whole(self._saboteur.workers()))
        self._saboteur.close()


def percentile(values: list[float], share: float) -> float:
    return float(np.quantile(values, share)) if values else 0.0


COUNTS = [word for stage, count in WORKERS.items() for word in ("--workers", f"{stage}={count}")]
TWO_GPUS = ["--device", "cpu:0,1", "--budget", "0=40MB", "--budget", "1=40MB", "--keep-alive", "0", "--placement"]
PLACES = {  # options of `triptych up`
    "cpu": ["--device", "cpu", *COUNTS],
    "leases": ["--device", "cpu:0", "--budget", "0=30MB", "--keep-alive", "0", *COUNTS],
    **{placement: [*TWO_GPUS, placement] for placement in ("replicas", "split", "tensor", "context")},
}


@click.command()
@click.option("--minutes", type=float, default=10.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--pause", type=float, default=1.5, show_default=True, help="Seconds between two faults, on average.")
@click.option(
    "--place",
    type=click.Choice([*PLACES]),
    default="cpu",
    show_default=True,
    help="leases: of a GPU that can't hold all three stages, which a CPU plays; others: a placement on two",
)
@click.option("--peers", is_flag=True, help="Hostile clients and workers beside it.")
@click.option(
    "--loras", type=click.IntRange(0, 100), default=0, show_default=True, help="So many, in half of the jobs."
)
@click.option("--http", is_flag=True, help="Jobs go and come by HTTP.")
@click.option("--models", type=click.IntRange(1, 2), default=1, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
def main(
    minutes: float, seed: int, pause: float, place: str, peers: bool, loras: int, models: int, http: bool, as_json: bool
) -> None:
    """Random load, random faults, and an account of what came of them."""
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        report = soak(Path(folder), minutes * 60, seed, pause, place, peers, loras, models, http)
    print(json.dumps(report) if as_json else "\n".join(f"{name}: {value}" for name, value in report.items()))
    if report["problems"] or report["lost"] or report["duplicated"] or report["differing"]:
        sys.exit(1)


def soak(
    folder: Path,
    seconds: float,
    seed: int,
    pause: float,
    place: str,
    peers: bool,
    loras: int = 0,
    models: int = 1,
    http: bool = False,
) -> dict[str, Any]:
    rng, account = random.Random(seed), Account()
    named = write_loras(folder / "files", loras, rng) if loras else []
    options = ["--loras", str(folder / "files")] if named else []
    if models > 1:
        options += ["--model", "demo", "--model", f"other={another_model(folder / 'other')}"]
    port = free_port() if http else 0
    options += ["--http", f"127.0.0.1:{port}", "--http-rate", "100000"] if http else []
    hostile = HostilePeers(folder) if peers else None
    stack = Stack(folder, [*PLACES[place], *options, *(hostile.let_in() if hostile else [])])
    stack.wait_ready()
    pool = recipes(rng, 24, named, ("demo", "other") if models > 1 else ())
    with Client(stack.state, timeout=60) as client:
        wanted = {}
        for request in pool:
            (job,) = client.submit_many([request], pictures=PICTURES)
            wanted[key_of(request)] = digest_of(client, client.wait(job.id, 120).id)
        model = client.stack().model
    print(f"{len(pool)} undisturbed pictures; now {seconds / 60:g} minutes of trouble, seed {seed}", file=sys.stderr)
    load = Load(stack, wanted, pool, seed + 1, account)
    if http:
        load = HttpLoad(stack, wanted, pool, seed + 1, account, f"http://127.0.0.1:{port}")
    trouble = Trouble(stack, rng, account, http)
    start = time.monotonic()
    if hostile and model:
        hostile.start(model)
    load.start()
    while time.monotonic() - start < seconds:
        time.sleep(rng.expovariate(1 / pause))
        trouble.make()
    load.stopping.set()
    if not load.finished.wait(300):
        account.problems.append("not all accepted jobs ended within five minutes")
    if hostile:
        hostile.stop()
        with Client(stack.state, timeout=60) as client:
            client.cancel(*(job.id for job in client.jobs(("queued", *STAGES), limit=10_000) if job.id[:1] == "k"))
    trouble.settle()
    return reckon(stack, account, time.monotonic() - start) | (hostile.report() if hostile else {})


def reckon(stack: Stack, account: Account, seconds: float) -> dict[str, Any]:
    """Check the books at the end, the stack being stopped."""
    duplicated = 0
    with Client(stack.state, timeout=60) as client:
        for job_id, digest in account.done.items():
            job = client.job(job_id)
            visits = [record.stage for record in job.records]
            if visits != WAYS[bool(job.recipe.images)] or digest_of(client, job_id) != digest:
                duplicated += 1
        listed = client.stack().counts
        patiently(
            lambda: not any(any(worker.lease_bytes) for worker in client.workers().workers)
        )  # the ledger is empty
    if code := stack.stop():
        account.problems.append(f"the stack ended with exit code {code}")
    if orphans := stack.orphans():
        account.problems.append(f"processes are left: {orphans}")
    if files := leftovers(stack.state):
        account.problems.append(f"files are left: {files}")
    if unfinished := [entry for entry in listed if entry[0] not in ENDED]:
        account.problems.append(f"jobs are left: {unfinished}")
    times = [value for kind, values in account.recoveries.items() if kind != "kill supervisor" for value in values]
    every = [value for values in account.recoveries.values() for value in values]
    return {
        "minutes": round(seconds / 60, 1),
        "jobs": len(account.accepted),
        "faults": sum(account.faults.values()),
        "by kind": dict(account.faults),
        "recovery p50/p95/max, s": [round(percentile(every, share), 2) for share in (0.5, 0.95, 1.0)],
        "the same without the supervisor's, s": [round(percentile(times, share), 2) for share in (0.5, 0.95, 1.0)],
        "p95 by kind, s": {kind: round(percentile(v, 0.95), 2) for kind, v in account.recoveries.items() if v},
        "set aside and retried": account.set_aside,
        "lost": len(account.accepted.keys() - account.done.keys()),
        "duplicated": duplicated,
        "differing": sum(account.accepted[job] != digest for job, digest in account.done.items()),
        "problems": account.problems,
    }


if __name__ == "__main__":
    main()
