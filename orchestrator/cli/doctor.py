"""`doctor`: a check that everything is here that a stack needs, and the command to run next."""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from orchestrator.cli.options import json_option, state_folder, state_option
from orchestrator.cli.plan_words import summary
from orchestrator.gpu_driver import list_gpus
from orchestrator.planning.calibration import Measurements
from orchestrator.planning.hardware import all_memory
from orchestrator.planning.host_memory import RESERVE
from orchestrator.planning.model_profile import find_profile
from orchestrator.planning.stack_plan import plan_stack, stack_dtype
from orchestrator.settings import StackConfig
from orchestrator.short_process import EndedWithoutAnswer, answer_of
from protocol.client.client import Client
from protocol.errors import TriptychError
from protocol.model import ModelDescription
from protocol.units import format_bytes

PACKAGES = ("triptych", "torch", "diffusers", "transformers", "accelerate", "pyzmq", "safetensors")
VARIANT = re.compile(r"\.(fp16|bf16|non_ema)\b")  # in names of files that are there beside those that are loaded
LOW_DISK = 5_000_000_000
ASK_SECONDS = 10.0
DEMO_CARD = Path(__file__).parents[2] / "workers" / "demo_model"
LEAST_FILES = 1024  # open at once, with some clients


@dataclass(frozen=True, slots=True)
class Finding:
    what: str
    text: str
    good: bool = True
    warns: bool = False  # it works, but not as well as it might

    @property
    def mark(self) -> str:
        return "!!" if not self.good else "--" if self.warns else "ok"


@click.command()
@click.option("-m", "--model", default="demo", show_default=True, help="The model to look for.")
@json_option
@state_option
def doctor(model: str, as_json: bool, state: Path | None) -> None:
    """Check versions, GPUs, memory, disk and model, and say the exact next command."""
    folder = state_folder(state)
    findings = [*versions(), *hardware(), limits(), disk(folder), *model_findings(model), running(folder)]
    command = next_command(findings, model)
    if as_json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings], "next": command}))
    else:
        for finding in findings:
            print(f"{finding.mark}  {finding.what}: {finding.text}")
        print(f"\nNext: {command}")
    if not all(finding.good for finding in findings if finding.what != "stack"):
        sys.exit(1)


def versions() -> list[Finding]:
    found = [Finding("python", platform.python_version(), sys.version_info >= (3, 11))]
    for package in PACKAGES:
        try:
            found.append(Finding(package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding(package, "not installed", False))
    return found


def hardware() -> list[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    gpus = list_gpus()
    found = [
        Finding("cpu", f"{os.cpu_count()} cores"),
        Finding("memory", f"{format_bytes(memory.available)} of {format_bytes(memory.total)} available"),
    ]
    if not gpus:
        return [*found, Finding("gpu", "none by NVIDIA's driver; stages run on the CPU")]
    for gpu in gpus:
        text = (
            f"{gpu.name}, {format_bytes(gpu.free_bytes)} of {format_bytes(gpu.total_bytes)} free, driver {gpu.driver}"
        )
        found.append(Finding(f"gpu {gpu.index}", text))
    return found


def limits() -> Finding:
    """Find how many files and sockets a process of a stack may have open."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{hard} for each process of a stack" if hard != resource.RLIM_INFINITY else "any number"
    return Finding("open files", f"{text} (this shell's limit is {soft}, which stacks raise)", hard >= LEAST_FILES)


def disk(folder: Path) -> Finding:
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(there).free
    return Finding("disk", f"{format_bytes(free)} free for {folder}", free > LOW_DISK)


def model_findings(model: str) -> list[Finding]:
    """Check that the model's files are here and whole, or could be had, and tell what it is."""
    found = files_of(model)
    return [*found, *about(model)] if all(finding.good for finding in found) else found


def files_of(model: str) -> list[Finding]:
    """Find a model's files, and what is wrong with them; ask the hub only for what isn't here."""
    if model == "demo":
        return [Finding("model", "demo ships with Triptych")]
    if Path(model).expanduser().exists():
        kind = "a file" if Path(model).expanduser().is_file() else "a folder in the diffusers layout"
        return examined(model, f"{model} is {kind}")
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if isinstance(index := try_to_load_from_cache(model, "model_index.json"), str):
            return examined(str(Path(index).parent), f"{model} is in the Hugging Face cache")
        HfApi().auth_check(model)
    except HFValidationError:
        return [Finding("model", f"{model!r} is neither a folder nor a hub id", False)]
    except Exception as error:
        return [Finding("model", f"{model} can't be reached: {str(error).strip().splitlines()[0]}", False)]
    return [Finding("model", f"{model} can be downloaded")]


def examined(folder: str, text: str) -> list[Finding]:
    """Ask a process without weights about a model: all that is wrong with it, each with its remedy."""
    try:
        problems = [
            str(problem) for problem in json.loads(answer_of("workers.runtime.describer", [folder]))["problems"]
        ]
    except EndedWithoutAnswer as error:
        problems = [f"looking at it ended in: {error}"]
    found = [Finding("model", problem, False) for problem in problems] or [Finding("model", f"{text}, and whole")]
    return [*found, *beside_memory(Path(folder).expanduser(), all_memory())]


def beside_memory(folder: Path, memory: int) -> list[Finding]:
    """Warn where a model's weights don't stay in the host's memory."""
    files = [path for path in folder.glob("*/*.safetensors") if not VARIANT.search(path.name)]
    weights = sum(path.stat().st_size for path in files)
    if weights <= memory - RESERVE:
        return []
    text = (
        f"{format_bytes(weights)} of weights don't all stay in {format_bytes(memory)}: a part is read from the disk "
        f"again and again. How much, and what it costs: triptych plan --model {folder}"
    )
    return [Finding("weights", text, warns=True)]


def about(model: str) -> list[Finding]:
    """Tell what a model is and makes, how large it is, its licence, and what it would do here; nothing is loaded."""
    gpus, config = list_gpus(), StackConfig(model=model)
    try:
        profile = find_profile(config, stack_dtype(config, bool(gpus)))
    except TriptychError as error:
        return [Finding("family", f"can't be told: {error.message}", warns=True)]
    named = licence(model)
    sizes = ", ".join(f"{stage.stage} {format_bytes(stage.weights)}" for stage in profile.stages)
    found = [
        Finding("family", f"{profile.model.pipeline}: {tasks(profile.model)}"),
        Finding("weights", f"{sizes}, in {profile.recipe.dtype}"),
        Finding("licence", named or "not said; look at its page", warns=not named),
    ]
    if gpus:
        try:
            plan = plan_stack(config, gpus, Measurements()).plan
            found.append(Finding("here", summary(plan) if plan else "on the CPU"))
        except TriptychError as error:
            found.append(Finding("here", error.message, False))
    return found


def tasks(model: ModelDescription) -> str:
    """'makes pictures of a prompt, pictures (--image), a picture and a mask (--mask)'."""
    of = {
        "a prompt": model.prompt, "pictures (--image)": model.image, "a picture and a mask (--mask)": model.inpaint,
        "a control image (--control-image)": model.control or model.controlled,
        "a picture for its IP-Adapter (--ip-image)": model.ip_adapter, "a video (--video)": model.of_video,
    }  # fmt: skip
    made = "videos" if model.video else "pictures"
    return f"makes {made} of {', '.join(name for name, can in of.items() if can)}"


def licence(model: str) -> str:
    """Return the licence that a model's card names, in its folder or on the hub; empty where it names none."""
    from huggingface_hub import ModelCard, ModelInfo, model_info

    folder = DEMO_CARD if model == "demo" else Path(model).expanduser()
    try:
        if folder.exists():
            data = ModelCard.load(folder / "README.md").data.to_dict()
        else:
            found: ModelInfo = model_info(model, timeout=ASK_SECONDS)
            data = found.card_data.to_dict() if found.card_data else {}
    except Exception:  # no card, no network, or a card that nobody can read
        return ""
    return str(data.get("license_name") or data.get("license") or "")


def running(folder: Path) -> Finding:
    try:
        with Client(folder, timeout=2) as client:
            models = ", ".join(model.model for model in client.models())
        return Finding("stack", f"running {models or '(loading)'} in {folder}")
    except TriptychError:
        return Finding("stack", f"none is running in {folder}")


def next_command(findings: list[Finding], model: str) -> str:
    what = {finding.what: finding for finding in findings}
    prompt = '"a large red circle at the top left and a small blue star on a yellow background"'
    if not what["model"].good:
        on_hub = "/" in model and not Path(model).exists()
        return f"triptych pull {model}" if on_hub else "triptych doctor --model black-forest-labs/FLUX.1-schnell"
    if what["stack"].text.startswith("running"):
        return f"triptych submit {prompt} -o picture.png"
    return f"triptych run {prompt} -o picture.png" + (f" --model {model}" if model != "demo" else "")
