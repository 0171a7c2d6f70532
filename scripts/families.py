"""Run every pipeline class of the installed diffusers through the stages, and write the table of families.

    python -m scripts.families [NAME …] [--write docs/families.md] [--dtype bfloat16] [--device cuda]

Each class whose tiny pipeline `tests/families/` builds, with random weights, is run in one process as the plain
pipeline, called with nothing but what a job gave, and through the three stages; the pictures, or frames, are compared
bit for bit.
"""

import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def every_class() -> Iterator[type]:
    """Yield the pipeline classes of diffusers that can be imported, by name."""
    import diffusers
    from diffusers import DiffusionPipeline

    for name in sorted(dir(diffusers)):
        if not name.endswith("Pipeline"):
            continue
        try:
            found = getattr(diffusers, name)
        except (ImportError, RuntimeError):  # of what isn't installed
            continue
        if isinstance(found, type) and issubclass(found, DiffusionPipeline) and found is not DiffusionPipeline:
            yield found


def verdict(cls: type, dtype: str = "float32", device: str = "cpu") -> tuple[str, str]:
    """Return how a class fares, `equal`, `differs`, `refused`, `fails` or `not run`, and with what, or why."""
    from tests.families import CASES
    from workers.models.skeleton import refusal

    if why := refusal(cls):
        return "refused", why
    if cls.__name__ not in CASES:
        return "not run", "no tiny pipeline of it is built here"
    try:
        return run(cls.__name__, dtype, device)
    except Exception as error:
        text = " ".join(str(error).split())
        return "fails", f"{type(error).__name__}: {text[:160]}"


def run(
    name: str, dtype: str = "float32", device: str = "cpu", guided: bool = False, killed_at: int | None = None
) -> tuple[str, str]:
    """Run a class's case plainly and through the stages.

    `guided`: with a negative prompt, and three times what guidance is. `killed_at`: by a denoiser that dies after so
    many steps, and one that follows it.
    """
    import torch
    from diffusers import DiffusionPipeline

    from protocol.job import JobRequest
    from protocol.pictures import as_given, pictures_among
    from protocol.recipe import resolve
    from tests.families import CASES
    from tests.families.case import awake
    from tests.pictures import half, noise
    from tests.stages import all_through
    from tests.tiny_videos import frames_of
    from workers.models.description import describe
    from workers.models.source import read, stages_of
    from workers.stages.pipeline_call import arguments_of
    from workers.tensors import DTYPES

    case = CASES[name]
    side = (case.size, case.size)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        made = case.make()
        torch.manual_seed(1)
        for part, component in made.components.items():
            if stages_of(part) == ("denoise",) and isinstance(component, torch.nn.Module):
                awake(component)
        made.save_pretrained(folder)
        source = read(str(folder), folder, None)
        model = describe(source)
        given = brought(case, noise, half(side))
        images, masks, controls = (tuple(p.name for p in given[kind]) for kind in ("i", "m", "c"))
        videos = {name: picture.name for name, picture in zip(case.videos, given["v"], strict=False)}
        task = (model.inpaint if masks else model.image) if images else model.of_video if videos else None
        size: dict[str, Any] = {"width": case.size, "height": case.size} if task is None or task.sized else {}
        request = JobRequest(
            prompt=case.prompt if model.prompt else "", steps=case.steps, seed=11, frames=case.frames, images=images,
            mask=next(iter(masks), None), videos=tuple(videos.items()), negative_prompt=case.negative,
            control=next(iter(controls), None), settings=tuple((n, str(v).lower()) for n, v in case.settings.items()),
            strength=0.5 if task and task.strength is not None else None, **size,
        )  # fmt: skip
        if guided:
            request = request.model_copy(update=guidance_of(task or model, model))
        recipe = resolve(request, model, dtype, None, picture_size=side, video_frames=case.length)
        named = recipe.named_pictures
        pictures = {picture.name: picture for kind in given.values() for picture in kind}
        tensors = as_given(named, pictures)
        pipeline: Any = DiffusionPipeline.from_pretrained(folder, dtype=DTYPES[dtype]).to(device)
        pipeline.set_progress_bar_config(disable=True)
        if case.tiled:
            pipeline.vae.enable_tiling()
        asked = plainly(pipeline, arguments_of(pipeline, recipe, tensors), {*case.settings, *scales(pipeline, guided)})

        def plain_frames() -> Any:
            return frames_of(pipeline(**asked, generator=torch.Generator("cpu").manual_seed(11)))

        try:
            plain = plain_frames()
        except Exception as error:
            return "not run", f"the plain pipeline fails at this tiny model: {' '.join(str(error).split())[:120]}"
        ours = pictures_among(all_through(source, recipe, tensors, DTYPES[dtype], torch.device(device), killed_at))
        same = bytes(ours.data) == plain.numpy().tobytes()
        if not same and not torch.equal(plain, plain_frames()):
            return (
                "not run",
                "the plain pipeline draws random numbers without the seed: no two of its pictures are equal",
            )
    words = ["prompt"] * model.prompt + [word for letter, word in WORDS.items() if letter in case.brings]
    if case.frames:
        words.append(f"{case.frames} frames")
    return "equal" if same else "differs", ", ".join(words)


WORDS = {"i": "image", "m": "mask", "c": "control image", "v": "video"}


def brought(case: Any, noise: Any, mask: Any) -> dict[str, list[Any]]:
    from protocol.client.input_pictures import picture_of, video_of

    size = (case.size, case.size)
    clips = [[noise(size, 100 * n + i) for i in range(case.length)] for n, _ in enumerate(case.videos)]
    return {
        "i": [picture_of(noise(size))] * ("i" in case.brings),
        "m": [picture_of(mask, mask=True)] * ("m" in case.brings),
        "c": [picture_of(noise(size).rotate(90))] * ("c" in case.brings),
        "v": [video_of(clip) for clip in clips] * ("v" in case.brings),
    }


def guidance_of(task: Any, model: Any) -> dict[str, Any]:
    """Return a request's fields for guidance of three times a task's defaults, and a negative prompt."""
    found = {"cfg_scale": task.cfg_scale and task.cfg_scale * 3, "guidance": task.guidance and task.guidance * 3}
    return found | ({"negative_prompt": "blurry"} if model.negative_prompt else {})


def scales(pipeline: Any, guided: bool) -> list[str]:
    """Return the names of a call's arguments for guidance."""
    from workers.models.description import guidance_arguments

    return [name for name in guidance_arguments(pipeline) if name and guided]


def plainly(pipeline: Any, arguments: dict[str, Any], settings: set[str]) -> dict[str, Any]:
    """Return, of a call's arguments, what the job gave; the pipeline's own defaults hold for the rest."""
    from workers.models.tasks import FRAMES, video_arguments

    given = {
        "prompt", "negative_prompt", "num_inference_steps", "strength", "width", "height", "image", "images",
        "mask_image", "control_image", "control_mask", "output_type", *video_arguments(type(pipeline)), *FRAMES,
        *settings,
    }  # fmt: skip
    return {name: value for name, value in arguments.items() if name in given}


@click.command(help=__doc__.split("\n")[0] if __doc__ else None)
@click.argument("names", nargs=-1)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--write", type=click.Path(path_type=Path), metavar="FILE", help="Write the table to this file.")
def main(names: tuple[str, ...], write: Path | None, dtype: str, device: str) -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import diffusers
    import torch

    from workers.models.skeleton import quiet

    torch.set_num_threads(1)
    rows: list[tuple[str, str, str]] = []
    with quiet():
        for cls in every_class():
            if names and cls.__name__ not in names:
                continue
            how, why = verdict(cls, dtype, device)
            rows.append((cls.__name__, how, why))
            print(f"{how}\t{cls.__name__}\t{why}", flush=True)
    counts = {how: sum(row[1] == how for row in rows) for how in ("equal", "refused", "not run", "fails", "differs")}
    print(", ".join(f"{count} {how}" for how, count in counts.items() if count))
    if write:
        versions = f"diffusers {diffusers.__version__}, torch {torch.__version__}"
        write.write_text(page(rows, counts, versions, f"{device} in {dtype}"))


BESIDES = (
    "On 2026-11-26 the same cases ran in bfloat16 on an H200 (torch 2.11.0+cu130, `--dtype bfloat16 --device cuda`): "
    "191 classes equal, none that differed; of the others the plain pipelines failed there.",
    "",
    "Modular pipelines (FLUX.3 and its distilled form, FLUX.2 klein, Wan-Animate 2, MiniMax-H3, Qwen-Image, Z-Image) "
    "are compared by `tests/workers/models/test_modular.py`, all equal on a CPU.",
)


def page(rows: list[tuple[str, str, str]], counts: dict[str, int], versions: str, where: str) -> str:
    told = ", ".join(f"{count} {how}" for how, count in counts.items() if count)
    lines = [
        "# Families", "",
        f"Every pipeline class of {versions}, on {where}: {told}. Written by `python -m scripts.families "
        "--write docs/families.md`.", "",
        "`equal`: a tiny pipeline of the class, with random weights, gives the same bits through the three stages as "
        "plainly, with what is named. `refused`: in one line, before anything is loaded. `not run`: it is taken, but "
        "nobody has compared it.", "",
        *BESIDES, "", "| class | | with, or why |", "|---|---|---|",
    ]  # fmt: skip
    lines += [f"| {name} | {how} | {why.replace('|', '/')} |" for name, how, why in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
