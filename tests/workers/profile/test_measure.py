"""What is said of a model before it is loaded is what comes out once it is."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from orchestrator.planning.model_profile import find_profile
from orchestrator.planning.pipeline_cut import Stretches
from orchestrator.planning.streaming_cost import load_of, streaming
from orchestrator.settings import StackConfig
from orchestrator.short_process import answer_of
from protocol.errors import ModelMissing
from protocol.job import JobRequest
from protocol.model_profile import ModelProfile
from protocol.model_spec import ModelSpec
from protocol.stages import STAGES
from tests import tiny, tiny_videos
from tests.families import CASES
from workers.models.devices import Devices
from workers.models.loading import load, weight_bytes
from workers.models.source import locate
from workers.profile.measure import cached, profile_of
from workers.profile.meta_run import Conditions, MetaRun
from workers.stages.contract import unheard
from workers.stages.denoise import DenoiseStage
from workers.stages.text import TextStage
from workers.weights.forward_trace import ForwardTrace
from workers.weights.loose_tensors import LooseTensors
from workers.weights.residency import Residency, block_rows
from workers.weights.streaming import room

CPU = torch.device("cpu")
RUN_ON_SHAPES = (  # of what is used today
    "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "FluxFillPipeline",
    "FluxKontextPipeline", "Flux2Pipeline", "Flux2KleinPipeline", "QwenImagePipeline", "ZImagePipeline",
    "ChromaPipeline", "Krea2Pipeline", "SanaPipeline", "WanPipeline", "WanImageToVideoPipeline", "LTXPipeline",
    "CogVideoXPipeline", "WanAnimatePipeline", "AnimateDiffPipeline",
)  # fmt: skip
FAMILIES = ("flux", "sd15", "sdxl", "sd3", "chroma", "pixart")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tiny.save(getattr(tiny, name)(), tmp_path_factory.mktemp(name)) for name in FAMILIES}


def profile(model: Path, **wanted: object) -> ModelProfile:
    request = JobRequest(prompt="a red circle", width=32, height=32, steps=4, seed=1, **wanted)
    return profile_of(locate(ModelSpec(name=str(model)), None), "float32", request)


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_are_those_of_the_files_and_of_the_loaded_model(models: dict[str, Path], family: str) -> None:
    found = profile(models[family])
    source = locate(ModelSpec(name=str(models[family])), None)
    for stage in STAGES:
        mine = found.stage(stage)
        loaded = load(source, stage, Devices(CPU, leased=True), torch.float32)
        assert mine.weights == sum(r.total_bytes for r in loaded.residencies.values())
        assert mine.least == sum(r.least_bytes for r in loaded.residencies.values()) if stage != "vae" else True
        for name, size in mine.components:
            model = getattr(loaded.pipeline, name)
            rooms = sum(room(p.nbytes) - p.nbytes for p in model.parameters()) + LooseTensors(model).nbytes
            buffers = sum(b.nbytes for key, b in model.named_buffers() if key in model.state_dict())
            assert size - rooms + buffers == weight_bytes(source, name, torch.float32)
        assert mine.flop > 0
        assert mine.largest > 0


PICTURED: dict[str, Callable[[], DiffusionPipeline]] = {
    "a picture": tiny_videos.wan_of_image,
    "a picture and a mask": CASES["FluxFillPipeline"].make,
    "a control image": CASES["StableDiffusionControlNetPipeline"].make,
    "videos": tiny_videos.wan_animate,
}


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=[] if what == "a picture" else [pytest.mark.all]) for what in PICTURED]
)
def test_models_that_begin_from_pictures_or_videos_are_planned_for(what: str, tmp_path: Path) -> None:
    source = locate(ModelSpec(name=str(tiny.save(PICTURED[what](), tmp_path))), None)
    found = profile_of(source, "float32", JobRequest(prompt="a red circle", width=32, height=32, steps=4, seed=1))
    assert all(stage.flop > 0 for stage in found.stages)
    assert found.recipe.pictures


def test_a_video_is_planned_for_by_its_number_of_frames(tmp_path: Path) -> None:
    config = StackConfig(model=str(tiny.save(tiny_videos.wan(), tmp_path)), width=32, height=32, steps=4)
    few, many = (find_profile(config.model_copy(update={"frames": frames}), "float32") for frames in (5, 9))
    assert (few.recipe.frames, many.recipe.frames) == (5, 9)
    for stage in ("denoise", "vae"):
        less, more = ({part.stage: part for part in found.stages}[stage] for found in (few, many))
        assert less.flop < more.flop
    pictures = StackConfig(model=str(tiny.save(tiny.flux(), tmp_path / "flux")), width=32, height=32, frames=9)
    assert find_profile(pictures, "float32").recipe.frames is None  # which is said of another model of the stack


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "Flux2KleinPipeline" else [pytest.mark.all]) for name in CASES]
)
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept")  # of torch and NumPy, in the scheduler of Helios
def test_every_class_is_planned_for(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    source = locate(ModelSpec(name=str(tiny.save(case.make(), tmp_path))), None)
    request = JobRequest(prompt=case.prompt, width=case.size, height=case.size, steps=case.steps, seed=1)
    found = profile_of(source, "bfloat16", request)
    assert found.stage("denoise").flop > 0
    assert not found.guessed or name not in RUN_ON_SHAPES


def test_what_cannot_be_run_on_shapes_is_planned_for_by_its_weights(tmp_path: Path) -> None:
    """By the same weights as what can, and by about the arithmetic of it."""
    source = locate(ModelSpec(name=str(tiny.save(tiny.flux(), tmp_path))), None)
    request = JobRequest(prompt="a red circle", width=512, height=512, steps=4, seed=1)
    found = profile_of(source, "bfloat16", request)
    run = MetaRun(source, found.recipe)
    for right, guess in zip(found.stages, run.guessed(), strict=True):
        assert guess.components == right.components
        assert guess.passes == right.passes
        assert [block.bytes for block in guess.blocks] == [block.bytes for block in right.blocks]
        assert guess.flop > 0
        assert guess.largest > 0
    unable = "LTX2TextConnectors"
    lacking = locate(ModelSpec(name=str(tiny.save(CASES["LTX2Pipeline"].make(), tmp_path / "ltx"))), None)
    assert unable in profile_of(lacking, "bfloat16", JobRequest(prompt="a", width=64, height=64, seed=1)).guessed


def test_a_loop_that_waits_for_values_ends_on_shapes() -> None:
    def count_down() -> None:
        left = torch.zeros(3, device="meta")
        while (left >= 0).all():
            left = left - 1

    with pytest.raises(RuntimeError, match="loop"), Conditions():
        count_down()


@pytest.mark.parametrize("family", ["flux", "sd3", "chroma", "pixart"])
def test_what_is_run_once_a_job_is_what_a_job_shows(models: dict[str, Path], family: str) -> None:
    found = profile(models[family])
    source = locate(ModelSpec(name=str(models[family])), None)
    text = TextStage(load(source, "text", Devices(CPU), torch.float32), CPU)
    stage = DenoiseStage(load(source, "denoise", Devices(CPU), torch.float32), CPU)
    (model,) = stage.denoisers()
    assert model is not None
    trace = ForwardTrace(model, block_rows(model))
    with trace:
        stage.run(found.recipe, tuple(text.run(found.recipe, (), unheard).tensors), unheard)
    learned = sum(room(p.nbytes) for name in trace.layers() for p in model.get_submodule(name).parameters())
    assert found.stage("denoise").once == learned
    assert found.stage("denoise").passes == trace.forwards


def test_arithmetic_is_counted_as_in_a_real_job(models: dict[str, Path]) -> None:
    found = profile(models["flux"], max_sequence_length=8)
    source = locate(ModelSpec(name=str(models["flux"])), None)
    text = TextStage(load(source, "text", Devices(CPU), torch.float32), CPU)
    stage = DenoiseStage(load(source, "denoise", Devices(CPU), torch.float32), CPU)
    embeddings = tuple(text.run(found.recipe, (), unheard).tensors)
    stage.run(found.recipe, embeddings, unheard)  # which finds the shape of what is decoded, once
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # a CPU's own isn't counted
        stage.run(found.recipe, embeddings, unheard)
    mine = found.stage("denoise")
    assert mine.flop * mine.passes == pytest.approx(counter.get_total_flops(), rel=0.1)
    longer = profile(models["flux"], max_sequence_length=8, num_images=2)
    assert longer.stage("denoise").flop == 2 * found.stage("denoise").flop
    blocks = sum(block.flop for block in found.stage("denoise").blocks)
    assert 0.9 * found.stage("denoise").flop < blocks <= found.stage("denoise").flop
    guided = profile(models["flux"], max_sequence_length=8, cfg_scale=3.0, negative_prompt="")
    assert guided.stage("denoise").passes == 2 * found.stage("denoise").passes == 8


def test_streaming_is_predicted_as_it_will_be(tmp_path: Path) -> None:
    model = tiny.save(tiny.flux(depth=10), tmp_path / "deep")
    mine = profile(model).stage("denoise")
    source = locate(ModelSpec(name=str(model)), None)
    residency = next(iter(load(source, "denoise", Devices(CPU, leased=True), torch.float32).residencies.values()))
    plain = load_of(mine.model_copy(update={"blocks": tuple(b.model_copy(update={"once": 0}) for b in mine.blocks)}))
    for share in (0.9, 0.8, 0.6, 0.5):
        budget = int(share * residency.total_bytes)
        residency.swap_in(budget)
        assert residency.plan is not None
        predicted = streaming(plain, budget)  # before a job has shown what is run once
        assert predicted is not None
        assert predicted.a_pass == pytest.approx(residency.plan.streamed_bytes, rel=0.25)
    assert streaming(plain, residency.total_bytes) is not None
    assert streaming(plain, residency.least_bytes - 1) is None
    assert isinstance(residency, Residency)


@pytest.mark.parametrize("cut", [(15, 15), (4, 26), (10, 12, 8)])
def test_parts_of_a_cut_are_predicted_as_they_will_be(cut: tuple[int, ...], tmp_path: Path) -> None:
    model = tiny.save(tiny.flux(depth=10), tmp_path / "deep")
    found, source = profile(model), locate(ModelSpec(name=str(model)), None)
    stretches, ends = Stretches(found.stage("denoise")), [0, *itertools.accumulate(cut)]
    loads = [stretches.load(start, end) for start, end in itertools.pairwise(ends)]
    trimmed = [load.weights - load.once + load.loose for load in loads]
    loaded = load(source, "denoise", Devices(CPU, dict(enumerate(trimmed)), cut=cut), torch.float32)
    residencies = list(loaded.residencies.values())
    assert [residency.total_bytes for residency in residencies] == [load.weights for load in loads]
    for one, residency in zip(loads, residencies, strict=True):
        assert one.least == pytest.approx(residency.least_bytes, rel=0.2)  # blocks differ
    text = TextStage(load(source, "text", Devices(CPU), torch.float32), CPU)
    DenoiseStage(loaded.another(), CPU).run(found.recipe, tuple(text.run(found.recipe, (), unheard).tensors), unheard)
    assert [residency.plan and residency.plan.streamed_bytes for residency in residencies] == [0] * len(cut)


def test_no_weights_are_needed_and_what_was_found_is_kept(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    bare = shutil.copytree(models["flux"], tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    whole, without = profile(models["flux"]), profile(bare)
    assert without.stages == whole.stages
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cached(["a"], lambda: whole) == whole
    assert cached(["a"], lambda: pytest.fail("it was not kept")) == whole
    (kept,) = (tmp_path / "cache" / "triptych" / "figures").iterdir()
    kept.write_text("spoilt")
    assert cached(["a"], lambda: without) == without


def test_a_model_that_is_not_there_is_an_error_for_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelMissing, match="not in the Hugging Face cache"):
        answer_of("workers.profile.measure", ["nobody/nothing"])
