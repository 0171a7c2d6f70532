"""The generic split: text, denoise and vae apart give the plain pipeline's pictures, in any family."""

import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from protocol.errors import BadRequest
from protocol.job import JobRequest
from protocol.pictures import pictures_among
from protocol.recipe import resolve
from protocol.stages import STAGES, Stage
from protocol.tensors import Tensor
from tests import tiny, tiny_families, tiny_videos
from tests.families import pictures
from tests.pictures import as_task, half, noise, plain_of_picture
from tests.records import latents_of
from tests.stages import all_through, stages, through
from tests.tiny import needs_gpus
from workers.errors import Cancelled, StageError
from workers.models.description import describe
from workers.models.devices import Devices
from workers.models.loading import load
from workers.models.source import read
from workers.replay.call_record import CallRecord
from workers.replay.placeholder import is_placeholder
from workers.stages.contract import Saved, unheard
from workers.stages.vae import BLACKENED

CPU = torch.device("cpu")
FAMILIES: dict[str, Callable[[], DiffusionPipeline]] = {
    "flux": tiny.flux,
    "sd15": tiny.sd15,
    "sdxl": tiny.sdxl,
    "sd3": tiny.sd3,
    "chroma": tiny.chroma,
    "pixart": tiny.pixart,
    "qwen_image": tiny_families.qwen_image,
    "z_image": tiny_families.z_image,
    "flux2_klein": tiny_families.flux2_klein,
}
TRUE_CFG = ("flux", "qwen_image")  # pipelines whose scale is `true_cfg_scale`


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = request.param
    return tiny.save(FAMILIES[name](), tmp_path_factory.mktemp("families") / name)


SMALL = {"width": tiny.SIZE, "height": tiny.SIZE, "seed": 11}


def test_a_prompt_alone_gives_the_picture_of_the_plain_pipeline(family: Path) -> None:
    source = read(str(family), family, None)
    recipe = resolve(JobRequest(prompt="a red circle", steps=2, **SMALL), describe(source), "float32", None)
    plain = tiny.plain(family, prompt="a red circle", num_inference_steps=2, **SMALL)
    assert torch.equal(through(source, recipe), plain)


@pytest.mark.parametrize(
    ("scale", "negative"),
    [
        (3.0, "blurry"),
        (0.5, ""),
        *(pytest.param(s, n, marks=pytest.mark.all) for s in (0.0, 1.0, 3.0) for n in (None, "", "blurry")),
    ],
)
def test_guidance_and_negative_prompts_are_the_pipelines_own(family: Path, scale: float, negative: str | None) -> None:
    source = read(str(family), family, None)
    request = JobRequest(
        prompt="a red circle", negative_prompt=negative, cfg_scale=scale, steps=2, num_images=2, **SMALL
    )  # fmt: skip
    if family.name == "flux2_klein":  # distilled: it has neither, and says so before anything is queued
        with pytest.raises(BadRequest):
            resolve(request, describe(source), "float32", None)
        return
    theirs: dict[str, Any] = {"num_inference_steps": 2, "num_images_per_prompt": 2, **SMALL}
    theirs["true_cfg_scale" if family.name in TRUE_CFG else "guidance_scale"] = scale
    if negative is not None:
        theirs["negative_prompt"] = negative
    recipe = resolve(request, describe(source), "float32", None)
    assert torch.equal(through(source, recipe), tiny.plain(family, prompt="a red circle", **theirs))


VIDEOS: dict[str, tuple[Callable[[], Any], int, bool]] = {  # frames, and whether it begins from a picture
    "wan with two experts": (lambda: tiny_videos.wan(experts=2), 9, False),
    "wan of a picture": (tiny_videos.wan_of_image, 9, True),
    "decodes in chunks": (tiny_videos.animatediff, 20, False),
    "decodes inside of a loop": (tiny_videos.framepack, 57, True),
    "sound": (tiny_videos.ltx2, 9, False),
    "ltx": (tiny_videos.ltx, 9, False),
    "cogvideox": (tiny_videos.cogvideox, 9, False),
}
SLOW_VIDEOS = ("ltx", "cogvideox")


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[pytest.mark.all] if name in SLOW_VIDEOS else []) for name in VIDEOS]
)
def test_a_video_has_the_frames_and_the_sound_of_the_plain_pipeline(case: str, tmp_path: Path) -> None:
    check_video(case, tmp_path)


@needs_gpus(1)
@pytest.mark.parametrize("case", VIDEOS)
def test_a_video_has_the_frames_and_the_sound_of_the_plain_pipeline_on_cuda(case: str, tmp_path: Path) -> None:
    check_video(case, tmp_path, torch.bfloat16, torch.device("cuda:0"))


def check_video(case: str, folder: Path, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> None:
    make, frames, of_picture = VIDEOS[case]
    tiny.save(make(), folder)
    source = read("x", folder, None)
    given = as_task(noise()) if of_picture else []
    request = JobRequest(
        prompt="a red circle", images=("0" * 64,) * of_picture, width=32, height=32, steps=2, seed=11, frames=frames
    )  # fmt: skip
    recipe = resolve(request, describe(source), str(dtype).removeprefix("torch."), None, picture_size=(32, 32))
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    plain = pipeline(
        prompt="a red circle", width=32, height=32, num_inference_steps=2, num_frames=frames,
        generator=torch.Generator().manual_seed(11), **({"image": noise()} if of_picture else {}),
    )  # fmt: skip
    made = all_through(source, recipe, given, dtype, device)
    assert bytes(pictures_among(made).data) == tiny_videos.frames_of(plain).numpy().tobytes()
    if case == "sound":
        (sound,) = (tensor for tensor in made if tensor.name == "sound")
        assert bytes(sound.data) == plain.audio.cpu().float().numpy().tobytes()


@pytest.mark.parametrize("masked", [False, True], ids=["image", "mask"])
@pytest.mark.parametrize(
    "name",
    ["flux", "sdxl", *(pytest.param(n, marks=pytest.mark.all) for n in ("sd15", "sd3", "qwen_image", "z_image"))],
)
def test_a_picture_and_a_mask_give_what_the_plain_pipelines_make(name: str, masked: bool, tmp_path: Path) -> None:
    folder = tiny.save(FAMILIES[name](), tmp_path / name)
    source = read(str(folder), folder, None)
    model, image, mask = describe(source), noise(), half() if masked else None
    task = model.inpaint if masked else model.image
    assert task is not None
    size = {"width": tiny.SIZE, "height": tiny.SIZE} if task.sized else {}
    given = as_task(image, mask)
    request = JobRequest(
        prompt="a red circle", images=("0" * 64,), mask="0" * 64 if masked else None, steps=4, strength=0.5, seed=11,
        **size,
    )  # fmt: skip
    recipe = resolve(request, model, "float32", None, picture_size=image.size)
    if (name, masked) == ("sd3", True):
        with pytest.raises(ValueError, match="should have 16 input channels"):  # as of the plain pipeline
            through(source, recipe, given)
        return
    plain = plain_of_picture(
        folder, image, mask, prompt="a red circle", num_inference_steps=4, strength=0.5, seed=11, **size
    )  # fmt: skip
    assert torch.equal(through(source, recipe, given), plain)
    other = as_task(noise(seed=1), mask)
    assert not torch.equal(through(source, recipe, other), plain)


@needs_gpus(1)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["flux", "sdxl", "z_image"])
def test_a_picture_and_a_mask_on_cuda(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = tiny.save(FAMILIES[name](), tmp_path / name)
    source, image = read(str(folder), folder, None), noise()
    model = describe(source)
    for mask, task in ((None, model.image), (half(), model.inpaint)):
        assert task is not None
        size = {"width": tiny.SIZE, "height": tiny.SIZE} if task.sized else {}
        request = JobRequest(
            prompt="a red circle", images=("0" * 64,), mask="0" * 64 if mask else None, steps=4, strength=0.5, seed=11,
            **size,
        )  # fmt: skip
        recipe = resolve(request, model, "bfloat16", None, picture_size=image.size)
        asked = {"prompt": "a red circle", "num_inference_steps": 4, "strength": 0.5, "seed": 11, **size}
        plain = plain_of_picture(folder, image, mask, dtype, "cuda", **asked)
        assert torch.equal(through(source, recipe, as_task(image, mask), dtype, torch.device("cuda:0")), plain)


@pytest.mark.parametrize("flagged", [False, True])
def test_a_safety_checker_sees_the_picture_and_what_it_takes_away_is_told(flagged: bool, tmp_path: Path) -> None:
    folder = tiny.save(tiny_families.sd15_with_safety_checker(flagged), tmp_path)
    source = read(str(folder), folder, None)
    recipe = resolve(JobRequest(prompt="a star", steps=2, **SMALL), describe(source), "float32", None)
    by_name: dict[Stage, Any] = dict(zip(STAGES, stages(source), strict=True))
    outcome = by_name["text"].run(recipe, (), unheard)
    while outcome.next:
        outcome = by_name[outcome.next].run(recipe, tuple(outcome.tensors), unheard)
    plain = tiny.plain(folder, prompt="a star", num_inference_steps=2, **SMALL)
    assert bool(plain.any()) == (not flagged)
    assert bytes(outcome.tensors[0].data) == plain.numpy().tobytes()
    assert outcome.warnings == ((BLACKENED,) if flagged else ())


def test_each_stage_loads_only_its_own_weights(flux_dev: Path) -> None:
    source = read(str(flux_dev), flux_dev, None)
    text, denoise, vae = (
        load(source, stage, Devices(CPU), torch.float32).pipeline for stage in ("text", "denoise", "vae")
    )
    for pipeline, own in ((text, {"text_encoder", "text_encoder_2"}), (denoise, {"transformer"}), (vae, {"vae"})):
        models = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
        assert {name for name, model in models.items() if not is_placeholder(model)} == own
        assert all(p.is_meta == (name not in own) for name, model in models.items() for p in model.parameters())


def test_description_is_read_from_configuration_and_code(flux_dev: Path, flux_schnell: Path, tmp_path: Path) -> None:
    dev, schnell = (describe(read(str(folder), folder, None)) for folder in (flux_dev, flux_schnell))
    assert (dev.size_multiple, dev.width, dev.steps, dev.guidance, dev.cfg_scale) == (4, 256, 28, 3.5, 1.0)
    assert schnell.guidance is None
    assert (dev.max_sequence_length, dev.max_sequence_limit) == (512, 512)
    folder = tiny.save(tiny.sd15(), tmp_path / "sd15")
    sd15 = describe(read(str(folder), folder, None))
    assert (sd15.guidance, sd15.cfg_scale, sd15.max_sequence_length, sd15.max_sequence_limit) == (None, 7.5, None, 77)


def test_a_folder_and_its_copy_have_one_fingerprint_and_a_changed_weight_another(
    flux_dev: Path, tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(flux_dev, copy)
    assert read("x", copy, None).revision == read("y", flux_dev, None).revision
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert read("x", copy, None).revision != read("y", flux_dev, None).revision


def test_cancel_stops_at_a_step_boundary_and_the_stage_goes_on(flux_dev: Path) -> None:
    source = read(str(flux_dev), flux_dev, None)
    text, denoise, _ = stages(source)
    recipe = resolve(JobRequest(prompt="a", steps=4, seed=1, width=32, height=32), describe(source), "float32", None)
    embeddings = tuple(text.run(recipe, (), unheard).tensors)
    seen: list[int] = []

    def report(step: int, steps: int, saved: Saved | None = None) -> None:
        seen.append(step)
        if step == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        denoise.run(recipe, embeddings, report)
    assert seen == [0, 1, 2]
    undisturbed = denoise.run(recipe, embeddings, unheard)
    fresh = stages(source)[1].run(recipe, embeddings, unheard)
    assert torch.equal(latents_of(undisturbed.tensors), latents_of(fresh.tensors))


@pytest.mark.parametrize("make", [tiny.flux, pictures.krea2, tiny_families.qwen_image, tiny.sdxl])
def test_nothing_of_a_task_is_held_once_it_is_done(make: Callable[[], DiffusionPipeline], tmp_path: Path) -> None:
    """On a GPU it would be missing to other stages until a collection of garbage."""
    source = read(str(tmp_path), tiny.save(make(), tmp_path), None)
    request = JobRequest(prompt="a red circle", width=32, height=32, steps=2, seed=1)
    recipe = resolve(request, describe(source), "float32", None)
    left: Any = ()
    for stage in stages(source):
        stage.run(recipe, tuple(left), unheard)  # what it learns from its first job stays
        before = sizes_alive()
        gc.disable()
        try:
            left = [bytes_of(tensor) for tensor in stage.run(recipe, tuple(left), unheard).tensors]
            held = sizes_alive() - before
        finally:
            gc.enable()
        assert not held, type(stage).__name__


def sizes_alive() -> Counter[torch.Size]:
    every = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
    return Counter(tensor.shape for tensor in every if tensor.device.type != "meta")


def bytes_of(tensor: Tensor) -> Tensor:
    return replace(tensor, data=bytes(tensor.data))


def test_nan_is_a_failure_and_never_a_black_picture(flux_dev: Path) -> None:
    source = read(str(flux_dev), flux_dev, None)
    _, denoise, vae = stages(source)
    recipe = resolve(JobRequest(prompt="a", steps=1, seed=1, width=32, height=32), describe(source), "float32", None)
    broken = CallRecord()
    broken.add("encode_prompt", (torch.full((1, 512, 32), torch.inf), torch.zeros(1, 32), torch.zeros(512, 3)), CPU)
    with pytest.raises(StageError, match="NaN"):
        denoise.run(recipe, tuple(broken.pack()), unheard)
    latents = torch.full((1, 4, 16, 16), torch.nan)
    broken.add_decode("vae.decode", ((latents,), {"return_dict": False}, None), CPU)
    with pytest.raises(StageError, match="NaN"):
        vae.run(recipe, tuple(broken.pack()), unheard)
