"""`triptych worker`: a stage worker in a stack, or alone for debugging. Imports torch only once it has work to do."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import click

from protocol.client.endpoints import CPU_LOCK, LORAS, default_folder, published
from protocol.client.input_pictures import Inputs, picture_of, split_video, video_of
from protocol.client.lora_files import LoraFile, loras_of
from protocol.errors import BadRequest
from protocol.model_spec import DEMO, PARTS, ModelSpec
from protocol.speedups import canonical, parse_speedup
from protocol.stages import FIRST, Stage
from protocol.units import parse_bytes
from protocol.worker_spec import WorkerSpec

LEAST_SECONDS = 0.1  # between two checkpoints, where nothing else is said
RECIPE = ("prompt", "negative_prompt", "width", "height", "steps", "guidance", "cfg_scale", "seed", "num_images",
          "max_sequence_length", "frames", "fps", "strength", "ip_scale")  # fmt: skip


@click.command()
@click.argument("stage", type=click.Choice(get_args(Stage)))
@click.option("--standalone", is_flag=True, help="Run the stage once, from files to files, with no orchestrator.")
@click.option(
    "--connect", metavar="ENDPOINT", help="Join the stack whose workers' endpoint this is ('triptych workers')."
)
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    envvar="TRIPTYCH_STATE",
    help="Join the stack in this folder, or the remote one of this worker's key file.",
)
@click.option("-m", "--model", help="A folder, a hub id, or demo. [default: demo, or what made the input file]")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--base", metavar="MODEL", help="Of a model that is one file: whose configuration it goes by.")
@click.option("--controlnet", metavar="MODEL", help="As the stack's others: a folder or a hub id.")
@click.option("--refiner", metavar="MODEL", help="Likewise.")
@click.option("--ip-adapter", metavar="FILE", help="As the stack's others: an IP-Adapter's weights.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps or auto.")
@click.option("--transformer", metavar="FILE", help="The denoiser's weights in one file.")
@click.option("--dtype", default="auto", show_default=True, help="float32, bfloat16, float16 or auto.")
@click.option("--gpus", metavar="0,1", help="The GPUs that this worker may use, by number. [default: all]")
@click.option(
    "--max-memory",
    metavar="16GB[,12GB]",
    help="The most that this worker may use of each GPU. A CPU imitates a GPU that holds so much of weights.",
)
@click.option(
    "--speedup",
    "speedups",
    multiple=True,
    metavar="STAGE:NAME[=VALUE]",
    help="As the stack's others: denoise:compile, text:quantize=int8 …",
)
@click.option(
    "--checkpoint",
    default=f"{LEAST_SECONDS:g}",
    metavar="SECONDS|off",
    help="Between two checkpoints of a denoising job at least; 0: every step.",
)
@click.option("--cut", metavar="30,27", help="Blocks of a denoiser on each of its GPUs. [default: as memory allows]")
@click.option("--jobs", type=click.IntRange(1, 8), default=1, show_default=True, help="Jobs at once, in a denoiser "
              "whose layers lie on several GPUs.")  # fmt: skip
@click.option("--cuda-graphs/--no-cuda-graphs", default=True, help="Launch a step's kernels at once where a GPU waits.")
@click.option("--workspace", metavar="900MB", help="What to leave beside weights, of --max-memory.")
@click.option("--name", help="How the stack calls it. [default: the stage and its process number]")
@click.option("-i", "--input", "input_path", type=click.Path(path_type=Path), help="What the stage before wrote.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Where to write. [default: STAGE.safetensors or out.png]"
)
@click.option("-p", "--prompt", help="What to picture.")
@click.option("--negative-prompt", help="What to keep out.")
@click.option("--width", type=int)
@click.option("--height", type=int)
@click.option("--steps", "--num-inference-steps", "steps", type=int)
@click.option("--guidance", "--guidance-scale", "guidance", type=float, help="Distilled guidance.")
@click.option("--cfg-scale", type=float, help="True classifier-free guidance.")
@click.option("--seed", type=int)
@click.option("-n", "--num-images", type=int)
@click.option("--max-sequence-length", type=int)
@click.option("--frames", "--num-frames", "frames", type=int, help="Of a video.")
@click.option("--fps", type=float, help="Of a video: frames a second.")
@click.option("--image", "images", type=click.Path(path_type=Path), multiple=True, help="A picture to begin from.")
@click.option("--mask", type=click.Path(path_type=Path), help="White where the picture is to be made anew.")
@click.option("--control-image", type=click.Path(path_type=Path), help="A picture that a ControlNet keeps to.")
@click.option("--ip-image", type=click.Path(path_type=Path), help="A picture for the IP-Adapter.")
@click.option("--ip-scale", type=float, help="How much that picture counts.")
@click.option("--video", "videos", multiple=True, metavar="[NAME=]FILE", help="A video to begin from.")
@click.option("--strength", type=float, help="How much of the picture goes, from 0 to 1.")
@click.option("--lora", "loras", multiple=True, metavar="FILE[@WEIGHT]", help="A LoRA, of a stage alone; to later "
              "stages give the same files.")  # fmt: skip
@click.option("--repeat", type=click.IntRange(1), default=1, show_default=True, help="Run it N times, to time it.")
@click.option("--profile", type=click.Path(path_type=Path), metavar="FILE", help="Write a torch profiler trace (JSON).")
@click.option("--pdb", is_flag=True, help="Stop in the debugger at an error.")
def worker(stage: Stage, standalone: bool, gpus: str | None, **options: Any) -> None:
    """Run one stage: text, denoise or vae.

    \b
    Alone, for debugging:
      triptych worker text --standalone --prompt "a red circle" -o e.safetensors
      triptych worker denoise --standalone -i e.safetensors --steps 8 --seed 1 -o l.safetensors
      triptych worker vae --standalone -i l.safetensors -o out.png
    In a running stack, beside those that its supervisor keeps:
      triptych worker denoise
    """
    from protocol.process import log_to_stderr
    from workers.runtime.launch import hide_other_gpus, keep_compiled_code

    keep_compiled_code()
    hide_other_gpus(tuple(numbers("--gpus", gpus)) if gpus is not None else None)
    name = options["name"] or f"{stage}-{os.getpid()}"
    log_to_stderr(name, level=30 if standalone else 20)
    if standalone:
        alone(stage, name, options)
    else:
        join(stage, name, options)


def alone(stage: Stage, name: str, options: dict[str, Any]) -> None:
    given = {key: options[key] for key in RECIPE if options[key] is not None}
    brings = bool(options["images"] or options["videos"])
    check_input(
        stage, brings or "prompt" in given, options["input_path"]
    )  # before the libraries are loaded, which takes seconds
    numbers("--cut", options["cut"])
    if options["jobs"] > 1 or any(parse_speedup(text)[1] == "parallel" for text in options["speedups"]):
        raise BadRequest("Alone, a stage does one job in one process.", "Leave out --jobs and parallel.")
    from workers.runtime.worker import prepare
    from workers.standalone.standalone import Debugging, run_standalone

    model, dtype, made = options["model"], options["dtype"], "out.png"
    if options["input_path"] is not None:
        from workers.standalone.stage_file import read

        recipe, _ = read(options["input_path"], stage)
        made = "out.png" if recipe.frames is None else "out.mp4"
        model, dtype = model or recipe.model, recipe.dtype if dtype == "auto" else dtype
    spec = worker_spec(stage, name, {**options, "model": model, "dtype": dtype})
    output = options["output"] or Path(made if stage == "vae" else f"{stage}.safetensors")
    debugging = Debugging(options["repeat"], options["profile"], options["pdb"])
    single = {"mask": "mask", "control": "control_image", "ip_image": "ip_image"}
    inputs = Inputs(
        images=tuple(map(picture_of, options["images"])),
        videos=tuple((name, video_of(path)) for name, path in sorted(map(split_video, options["videos"]))),
        **{name: picture_of(path, mask=name == "mask") for name, opt in single.items() if (path := options[opt])},
    )
    given |= inputs.fields
    loras = loras_of(options["loras"])
    if named := [lora.name for lora in loras.requests if lora.digest is None]:
        raise BadRequest(f"Alone, a stage knows no LoRA {named[0]!r}.", "Give its file: --lora FILE.safetensors")
    spec = spec.model_copy(update={"loras": str(folder_of(loras.files))})
    if options["input_path"] is None:
        given |= {"loras": loras.requests} if loras.requests else {}
        given.setdefault("prompt", "")  # of models that take none
    run_standalone(prepare(spec), given, inputs.tensors, options["input_path"], output, debugging)


def folder_of(files: Sequence[LoraFile]) -> Path:
    """Return a folder for this process's life in which LoRAs lie by their digests."""
    from workers.models.lora_fetch import PREFIX

    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for file in files:
        (folder / f"{file.digest}.safetensors").symlink_to(file.path.resolve())
    return folder


def check_input(stage: Stage, begins: bool, path: Path | None) -> None:
    """Check that the stage's input is there; BadRequest."""
    if path is None and stage != FIRST:
        raise BadRequest(f"The {stage} stage needs what an earlier stage wrote.", "Give it with -i FILE.safetensors.")
    if path is None and not begins:
        raise BadRequest(f"The {stage} stage needs a prompt.", 'Give one: --prompt "a red circle".')
    if path is not None and not path.exists():
        raise BadRequest(f"There is no file {str(path)!r}.", f"Begin with: triptych worker {FIRST} --standalone.")


def join(stage: Stage, name: str, options: dict[str, Any]) -> None:
    """Work in a running stack that did not start this worker."""
    from protocol.curve_keys import load
    from protocol.sockets import check_endpoint

    endpoint, key, cpu_lock, loras = options["connect"], None, None, None
    if endpoint is None:
        where = options["state"] or default_folder()
        if where.is_file():
            key = load(where)
            if key.role != "worker":
                raise BadRequest(
                    f"{str(where)!r} is a {key.role}'s key.", "'triptych keys new NAME --role worker' makes one."
                )
            endpoint = key.endpoint
        else:
            endpoint, cpu_lock = published(where).workers, str(where / CPU_LOCK)
            loras = str((where / LORAS).resolve())
    check_endpoint(endpoint, secured=key is not None)
    from workers.runtime.worker import serve

    spec = worker_spec(stage, name, options)
    serve(spec.model_copy(update={"endpoint": endpoint, "cpu_lock": cpu_lock, "loras": loras}), key)


def worker_spec(stage: Stage, name: str, options: dict[str, Any]) -> WorkerSpec:
    """Return the spec that the options come to; BadRequest."""
    limit, workspace = options["max_memory"], options["workspace"]
    return WorkerSpec(
        stage=stage,
        name=name,
        model=ModelSpec(name=options["model"] or DEMO, **{part: options[part] for part in PARTS}),
        device=options["device"],
        dtype=options["dtype"],
        max_memory=tuple(map(parse_bytes, limit.split(","))) if limit else (),
        speedups=canonical(options["speedups"]),
        checkpoint_seconds=checkpoint_seconds(options["checkpoint"]),
        cut=tuple(numbers("--cut", options["cut"])),
        cuda_graphs=options["cuda_graphs"],
        jobs=options["jobs"],
        workspace=parse_bytes(workspace) if workspace else None,
    )


def numbers(option: str, text: str | None) -> list[int]:
    if text is None:
        return []
    if not all(part.isdigit() for part in text.split(",")):
        raise BadRequest(f"{option} is {text!r}.", f"Give whole numbers, as in {option} 30,27.")
    return [int(part) for part in text.split(",")]


def checkpoint_seconds(text: str) -> float | None:
    if text == "off":
        return None
    try:
        return max(0.0, float(text))
    except ValueError as error:
        raise BadRequest(f"--checkpoint is {text!r}.", "Give seconds, or off.") from error
