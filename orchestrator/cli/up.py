"""`up`: a stack in the foreground; and the orchestrator's own process."""

import contextlib
import functools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from orchestrator.cli.options import state_folder, state_option
from orchestrator.cli.plan_words import in_words
from orchestrator.cli.strays import strays
from orchestrator.config import (
    Optimize,
    OrchestratorSettings,
    Placement,
    StackConfig,
    load_config,
    parse_stage_values,
)
from orchestrator.gpu_driver import list_gpus
from orchestrator.state_folder import StackFolder
from orchestrator.supervisor.supervisor import Supervisor
from protocol.client.client import Client
from protocol.client.endpoints import published
from protocol.errors import BadRequest, NoStack, TriptychError
from protocol.stages import STAGES, Stage
from protocol.visible import visible

Command = TypeVar("Command", bound=Callable[..., Any])
POLL_SECONDS = 0.05
FIRST_WORD_SECONDS, NEXT_WORD_SECONDS = 8.0, 60.0  # of a wait for the hub
FLAGS = (
    "model", "revision", "dtype", "queue_limit", "queue_bytes", "disk_floor", "keep_jobs", "checkpoint",
    "step_timeout", "listen", "listen_workers", "compile", "attention", "cache", "fuse_qkv", "placement", "optimize",
)  # fmt: skip


def stack_options(command: Command) -> Command:
    """What a stack is made of."""
    for option in reversed((
        click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="Settings as TOML."),
        click.option("-m", "--model", help="A folder, a hub id, or demo (draws shapes). [default: demo]"),
        click.option("--revision", help="Branch, tag or commit of a hub model."),
        click.option("--dtype", help="float32, bfloat16, float16. [default: bfloat16 on GPUs, float32 on the CPU]"),
        click.option("--placement", type=click.Choice(get_args(Placement)),
                     help="Of the denoiser: replicas (one a GPU), split (its layers over all GPUs), tensor or context "
                     "(all GPUs at one job; tier: numeric). [default: auto, by the plan]"),
        click.option("--optimize", type=click.Choice(get_args(Optimize)),
                     help="What auto is to choose for. [default: throughput]"),
        click.option("--workers", multiple=True, metavar="STAGE=N", help="Workers of a stage: denoise=2. "
                     "[default: as the placement says]"),
        click.option("--device", multiple=True, metavar="[STAGE=]DEVICE", help="cpu, cuda, mps or auto."),
        click.option("--gpus", multiple=True, metavar="[STAGE=]0,1",
                     help="The GPUs that all or one may use. [default: those that the plan chooses]"),
        click.option("--max-memory", multiple=True, metavar="[STAGE=]16GB[,…]", help="The most to use of each GPU."),
        click.option("--budget", multiple=True, metavar="[GPU=]16GB",
                     help="The most that the stack may use of a GPU, contexts included. [default: all that is free]"),
        click.option("--keep-alive", multiple=True, metavar="[STAGE=]SECONDS",
                     help="Let go of its GPU's memory after so long without work. [default: forever]"),
        click.option("--compile", is_flag=True, default=None, help="Compile the denoiser's blocks. Tier: numeric."),
        click.option("--attention", metavar="BACKEND",
                     help="diffusers' attention backend: _native_cudnn, flash … Tier: numeric, of sage approximate."),
        click.option("--fuse-qkv", is_flag=True, default=None, help="Query, key, value in one product. Tier: numeric."),
        click.option("--cache", metavar="KIND",
                     help="diffusers' step cache: first-block[:0.05], taylorseer … Tier: approximate."),
        click.option("--quantize", multiple=True, metavar="STAGE=KIND",
                     help="torchao's int8, int8-dynamic, fp8, fp8-dynamic of text or denoise. Tier: approximate."),
        click.option("--queue-limit", type=int, help="Unfinished jobs that are taken. [default: 10000]"),
        click.option("--queue-bytes", metavar="20GB", help="What they may hold on disk. [default: 20GB]"),
        click.option("--disk-floor", metavar="1GB",
                     help="Take no jobs where the disk has less left than this. [default: 1GB]"),
        click.option("--keep-jobs", metavar="30d|forever", help="How long to remember ended jobs. [default: 30d]"),
        click.option("--checkpoint", metavar="SECONDS|off",
                     help="Between two checkpoints of a denoising job at least; 0: every step. [default: 0.1]"),
        click.option("--step-timeout", metavar="SECONDS",
                     help="After so long at one step a worker counts as hung. [default: 600, or less once known]"),
        click.option("--listen", metavar="tcp://HOST:PORT",
                     help="For clients elsewhere; needs keys unless HOST is 127.0.0.1. [default: private]"),
        click.option("--listen-workers", metavar="tcp://HOST:PORT", help="The same for workers on other hosts."),
    )):  # fmt: skip
        command = option(command)
    return command


def stack_config(options: dict[str, Any]) -> StackConfig:
    """The configuration of flags and file."""
    flags = {name: options[name] for name in FLAGS if options.get(name) is not None}
    stages: dict[Stage, dict[str, Any]] = {stage: {} for stage in STAGES}
    for stage, count in parse_stage_values("--workers", options["workers"], every_stage=False).items():
        stages[stage]["workers"] = count
    for stage, device in parse_stage_values("--device", options["device"], every_stage=True).items():
        stages[stage]["device"] = device
    for stage, gpus in parse_stage_values("--gpus", options["gpus"], every_stage=True).items():
        stages[stage]["gpus"] = tuple(gpus.split(","))
    for stage, memory in parse_stage_values("--max-memory", options["max_memory"], every_stage=True).items():
        stages[stage]["max_memory"] = memory
    for stage, seconds in parse_stage_values("--keep-alive", options["keep_alive"], every_stage=True).items():
        stages[stage]["keep_alive"] = seconds
    for stage, kind in parse_stage_values("--quantize", options["quantize"], every_stage=False).items():
        stages[stage]["quantize"] = kind
    if options["budget"]:
        flags["gpus"] = parse_budgets(options["budget"])
    config = load_config(options["config"], flags, {stage: values for stage, values in stages.items() if values})
    config.speedups()  # raises where they can't be
    return config


def parse_budgets(values: tuple[str, ...]) -> dict[int, str]:
    """'0=16GB' is one GPU's; a bare '16GB' is that of all that there are."""
    found: dict[int, str] = {}
    gpus = list_gpus()
    for value in values:
        index, equals, amount = value.rpartition("=")
        if equals and not index.isdigit():
            raise BadRequest(f"--budget {value!r} is not right.", "Write --budget GPU=AMOUNT, as in --budget 0=16GB.")
        if not equals and not gpus:
            raise BadRequest("There is no GPU here to have a budget.", "With --device cpu:0, write --budget 0=14MB.")
        indices = [int(index)] if equals else [gpu.index for gpu in gpus if gpu.index not in found]
        found |= dict.fromkeys(indices, amount)
    return found


@click.command()
@stack_options
@click.option("--restore", is_flag=True, help="Begin with the last backup of the job database, in its place.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line once the stack is ready.")
@state_option
def up(state: Path | None, as_json: bool, restore: bool, **options: Any) -> None:
    """Start the orchestrator and the three stages' workers, and keep them running until Ctrl-C.

    With no options it runs the small demo model, which draws colored shapes and knows nothing else.

    \b
    triptych up
    triptych up --model black-forest-labs/FLUX.1-dev --optimize latency
    triptych up --config stack.toml --state ~/stacks/flux
    """
    folder = StackFolder(state_folder(state))
    config = stack_config(options)
    folder.create()
    if restore:
        go_back_to_backup(folder)
    os.umask(0o077)
    with waiting_is_told(config.model) as arrived:
        run_stack(Supervisor(folder, config, say), as_json, arrived)


def run_stack(supervisor: Supervisor, as_json: bool, arrived: Callable[[], None]) -> None:
    """Say what a stack does and run it; `arrived` is called once its workers have loaded their model."""
    folder, config, arrangement = supervisor.folder, supervisor.config, supervisor.arrangement
    wanted = sum(post.jobs for post in arrangement.posts)
    threading.Thread(target=announce_ready, args=(folder.path, wanted, as_json, arrived), daemon=True).start()
    say(f"Triptych on {config.model}, state in {folder.path}. Stop with Ctrl-C.")
    if arrangement.plan:
        for line in in_words(arrangement.plan):
            say(line)
    elif arrangement.unplanned:
        say(arrangement.unplanned)
    supervisor.run()


def go_back_to_backup(folder: StackFolder) -> None:
    """Put the last backup in the place of the job database, which is kept beside it."""
    from orchestrator.storage.database import restore

    with folder.lock("supervisor"), folder.lock("orchestrator"):
        made = time.time() - folder.backup.stat().st_mtime if folder.backup.exists() else 0
        aside = restore(folder.database, folder.backup)
    say(f"went back to a backup of {made / 60:.0f} minutes ago" + (f"; what was there is {aside}" if aside else ""))


def say(line: str) -> None:
    print(f"triptych: {visible(line)}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def waiting_is_told(model: str | None, quiet: bool = False) -> Iterator[Callable[[], None]]:
    """Say now and then that a model from the hub is waited for, until the block ends or what it gets is called."""
    over = threading.Event()

    def tell() -> None:
        pause = FIRST_WORD_SECONDS
        while not over.wait(pause):
            pause = NEXT_WORD_SECONDS
            say(f"still waiting for {model}: its files are looked up at the hub, or downloaded (HF_HUB_OFFLINE=1 uses "
                "only those that are here; --debug and 'triptych logs' say more)")  # fmt: skip

    if model and not quiet and "/" in model and not os.path.exists(os.path.expanduser(model)):
        threading.Thread(target=tell, daemon=True, name="waiting").start()
    try:
        yield over.set
    finally:
        over.set()


def wait_for_stack(folder: Path) -> None:
    """Until the orchestrator has said where it listens."""
    while True:
        with contextlib.suppress(NoStack):
            published(folder)
            return
        time.sleep(POLL_SECONDS)


def announce_ready(folder: Path, wanted: int, as_json: bool, arrived: Callable[[], None]) -> None:
    """Say once when so many workers have loaded their model."""
    start = time.monotonic()
    wait_for_stack(folder)
    with contextlib.suppress(TriptychError), Client(folder) as client:
        while sum(worker.state != "loading" for worker in client.workers().workers) < wanted:
            time.sleep(POLL_SECONDS)
        arrived()
        seconds = time.monotonic() - start
        say(f'ready after {seconds:.1f} s. In another terminal: triptych submit "a large red circle" -o circle.png')
        if told := strays(client):
            say(told)
        if as_json:
            print(
                json.dumps({"state": str(folder), "clients": published(folder).clients, "seconds": seconds}), flush=True
            )


@click.command(hidden=True)
@click.option("--state", type=click.Path(path_type=Path), required=True)
@click.option("--clients", required=True)
@click.option("--workers", required=True)
@click.option("--settings", required=True, help="OrchestratorSettings as JSON.")
def orchestrate(state: Path, clients: str, workers: str, settings: str) -> None:
    """The orchestrator's process; the supervisor starts it."""
    from orchestrator.gpu_driver import used_bytes
    from orchestrator.memory.ledger import Account, no_driver
    from orchestrator.server.loop import Server
    from protocol.client.endpoints import Endpoints
    from protocol.process import end_with_parent, log_to_stderr

    end_with_parent()
    log_to_stderr("orchestrator", limited=True)
    os.umask(0o077)
    folder = StackFolder(state)
    folder.create()
    if clients.startswith(f"ipc://{folder.path.resolve() / 'sockets'}"):
        folder.socket_folder()  # somebody may have removed it
    with folder.lock("orchestrator"):
        given = OrchestratorSettings.model_validate_json(settings)
        accounts = {
            index: Account(
                gpu.budget, gpu.foreign, functools.partial(used_bytes, index) if gpu.driver else no_driver,
                gpu.kept, gpu.name,
            )
            for index, gpu in given.gpus.items()
        }  # fmt: skip
        server = Server(folder, Endpoints(clients, workers), given, accounts)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, server.stop)
        server.run()
