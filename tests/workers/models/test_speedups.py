"""Speedups: close to the plain pipeline, the same again each time, named in the recipe, refused where they can't be."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from protocol.errors import BadRequest
from protocol.job import JobRequest
from protocol.recipe import resolve
from protocol.route import whole_key
from protocol.speedups import canonical, parse_speedup, tier_of
from tests import tiny
from tests.records import embeddings_of
from tests.stacks import running_stack, triptych
from tests.workers.weights.test_residency import jobs
from workers.models.description import describe
from workers.models.devices import Devices
from workers.models.loading import load
from workers.models.source import Source, read
from workers.models.speedups import RECOMPILE_LIMIT, StageSpeedups
from workers.stages.contract import unheard
from workers.stages.denoise import DenoiseStage
from workers.stages.text import TextStage
from workers.weights.residency import compile_blocks

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def usual_attention() -> Iterator[None]:
    """Setting one model's attention backend sets that of all later ones in this process."""
    before, _ = _AttentionBackendRegistry.get_active_backend()
    yield
    _AttentionBackendRegistry.set_active_backend(before)


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.flux(depth=4), tmp_path_factory.mktemp("flux"))


def latents(folder: Path, speed: StageSpeedups, room: int | None = None) -> list[torch.Tensor]:
    source = read("x", folder, None)
    loaded = load(source, "denoise", Devices(CPU, {0: room} if room else {}), torch.float32, speed)
    stage = DenoiseStage(loaded, CPU)
    first, again = jobs(stage, folder, False), jobs(stage, folder, False)
    assert all(map(torch.equal, first, again)), "a job's bits depend on the jobs before it"
    return first


@pytest.mark.parametrize(
    ("speed", "tolerance"),
    [
        (StageSpeedups(fuse_qkv=True), 1e-4),
        (StageSpeedups(attention="_native_math"), 1e-4),
        (StageSpeedups(cache="first-block:0.000001"), 1e-4),
        (StageSpeedups(quantize="int8"), 0.2),
    ],
    ids=str,
)
def test_a_speedup_changes_little_and_its_bits_are_equal_in_every_residency(
    speed: StageSpeedups, tolerance: float, flux: Path
) -> None:
    plain, fast = latents(flux, StageSpeedups()), latents(flux, speed)
    for one, other in zip(plain, fast, strict=True):
        assert (one - other).norm() <= tolerance * one.norm()
    size = sum(r.total_bytes for r in loaded(flux, speed).residencies.values())
    share = 1.0 if speed.quantize else 0.8  # what is quantized is never streamed
    assert all(map(torch.equal, latents(flux, speed, int(size * share)), fast))


def test_nothing_that_changes_bits_is_chosen_by_timing_in_any_compiled_block() -> None:
    """Whatever torch compiles turns its own setting for that off, so each code has the option."""
    blocks = torch.nn.ModuleList([torch.nn.LayerNorm(8), torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())])
    model = torch.nn.Module()
    model.blocks = blocks
    compile_blocks(model)
    found: list[bool] = []

    def note(_: object) -> None:
        found.append(torch._inductor.config.deterministic)

    with torch._inductor.config.patch(fx_graph_cache=False, post_grad_custom_post_pass=note), torch.no_grad():
        for block in blocks:
            block(torch.randn(2, 8))
    assert found == [True, True]


def test_each_thread_compiles_with_the_settings_of_the_one_that_has_loaded(
    flux: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs in flight in a cut denoiser are threads; torch's settings hold in the thread that makes them."""
    stage = DenoiseStage(loaded(flux, StageSpeedups()), CPU)
    (residency,) = stage.residencies
    residency.compiled = True
    source = read("x", flux, None)
    request = JobRequest(prompt="a", width=32, height=32, steps=2, seed=1)
    recipe = resolve(request, describe(source), "float32", None)
    tensors = tuple(TextStage(load(source, "text", Devices(CPU), torch.float32), CPU).run(recipe, (), unheard).tensors)
    found: list[int] = []

    def look(*_: object, **__: object) -> contextlib.AbstractContextManager[None]:
        found.append(torch._dynamo.config.recompile_limit)
        return contextlib.nullcontext()

    def work() -> None:
        with stage.weights(recipe, tensors):
            pass

    monkeypatch.setattr(residency, "job", look)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [RECOMPILE_LIMIT]


def loaded(folder: Path, speed: StageSpeedups):  # type: ignore[no-untyped-def]
    return load(read("x", folder, None), "denoise", Devices(CPU, {0: 1 << 40}), torch.float32, speed)


def test_quantized_weights_are_not_run_ahead_where_blocks_are_compiled(flux: Path) -> None:
    """They never stream. A rehearsal found no weights of theirs on the host, and failed the first job."""
    found = loaded(flux, StageSpeedups(quantize="int8"))
    (residency,) = found.residencies.values()
    residency.compiled = True
    wanted = latents(flux, StageSpeedups(quantize="int8"))
    assert all(map(torch.equal, jobs(DenoiseStage(found, CPU), flux, False), wanted))
    assert residency.modulation is None


def test_a_step_cache_saves_steps(flux: Path) -> None:
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    found = loaded(flux, StageSpeedups(cache="first-block:100"))
    found.pipeline.transformer.single_transformer_blocks[-1].norm.register_forward_hook(count)
    jobs(DenoiseStage(found, CPU), flux, False)
    assert runs == 3  # the first step of each of three jobs, which have 2, 3 and 4


def test_separate_projections_are_gone_once_they_are_fused(flux: Path) -> None:
    plain, fused = loaded(flux, StageSpeedups()), loaded(flux, StageSpeedups(fuse_qkv=True))
    sizes = [sum(p.numel() for p in found.pipeline.transformer.parameters()) for found in (plain, fused)]
    assert sizes[0] == sizes[1]


def test_quantized_weights_are_smaller_and_text_encoders_are_close(flux: Path) -> None:
    source = read("x", flux, None)
    recipe = resolve(JobRequest(prompt="a red circle", seed=1), describe(source), "float32", None)
    found = []
    for speed in (StageSpeedups(), StageSpeedups(quantize="int8")):
        parts = load(source, "text", Devices(CPU, {0: 1 << 40}), torch.float32, speed)
        outcome = TextStage(parts, CPU).run(recipe, (), lambda *_: None)
        found.append((sum(r.total_bytes for r in parts.residencies.values()), embeddings_of(outcome.tensors)))
    (size, plain), (smaller, close) = found
    assert smaller < size
    assert (plain - close).norm() < 0.2 * plain.norm()


@pytest.mark.parametrize(
    ("speed", "words"),
    [
        (StageSpeedups(attention="nonsense"), "nonsense"),
        (StageSpeedups(attention="sage"), "can't be used"),
        (StageSpeedups(cache="taylorseer"), None),
    ],
    ids=str,
)
def test_what_a_model_or_machine_cannot_do_is_refused_with_the_reason(
    speed: StageSpeedups, words: str | None, flux: Path
) -> None:
    if words is None:
        latents(flux, speed)
        return
    with pytest.raises(BadRequest, match=words):
        loaded(flux, speed)


def test_a_model_without_step_caches_says_so(tmp_path: Path) -> None:
    source: Source = read("x", tiny.save(tiny.sd15(), tmp_path), None)
    with pytest.raises(BadRequest, match="can't use the step cache"):
        load(source, "denoise", Devices(CPU), torch.float32, StageSpeedups(cache="first-block"))


def test_speedups_are_read_strictly_and_name_their_tier() -> None:
    assert parse_speedup("denoise:cache=first-block:0.1") == ("denoise", "cache", "first-block:0.1")
    assert canonical(["text:quantize=int8", "denoise:compile"]) == ("denoise:compile", "text:quantize=int8")
    assert [tier_of(s) for s in ((), ("denoise:compile",), ("denoise:compile", "text:quantize=fp8"))] == [
        "exact", "numeric", "approximate",
    ]  # fmt: skip
    assert tier_of(("denoise:attention=sage",)) == "approximate"
    for wrong in ("compile", "vae:quantize=int8", "text:compile", "denoise:quantize=int3", "denoise:cache=x",
                  "denoise:cache=taylorseer:1", "denoise:cache=first-block:nan", "denoise:compile=1",
                  "denoise:attention", "denoise:warp"):  # fmt: skip
        with pytest.raises(BadRequest):
            parse_speedup(wrong)
    with pytest.raises(BadRequest, match="twice"):
        canonical(["text:quantize=int8", "text:quantize=fp8"])


def test_embeddings_of_quantized_encoders_are_kept_apart(flux: Path) -> None:
    model = describe(read("x", flux, None))
    request = JobRequest(prompt="a", seed=1)
    keys = [
        whole_key(resolve(request, model, "float32", None, speedups))
        for speedups in ((), ("denoise:compile",), ("text:quantize=int8",))
    ]
    assert keys[0] == keys[1] != keys[2]


def test_a_stack_names_its_speedups_in_every_job_and_refuses_wrong_ones(
    flux: Path, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    arguments = ("--model", str(flux), "--device", "cpu", "--compile", "--cache", "first-block:0.001")
    planned = ("--plan-width", "32", "--plan-height", "32", "--plan-steps", "2")
    with running_stack(state, *arguments, *planned) as stack:
        (first,) = stack.client.jobs()
        assert (first.state, first.recipe.width, first.recipe.steps) == ("done", 32, 2)  # for nobody, to compile
        found = [stack.picture("a star", seed=1, width=32, height=32, steps=2) for _ in range(2)]
        assert found[0][1].equal(found[1][1])
        recipe = found[0][0].recipe
        assert recipe.tier == "approximate"
        assert recipe.speedups == ("denoise:cache=first-block:0.001", "denoise:compile")
        assert "approximate" in triptych("show", found[0][0].id, folder=state).stdout
    assert any((tmp_path / "triptych" / "compiled").rglob("*.py"))  # what was compiled is there for the next start
    wrong = triptych("up", "--cache", "warp", folder=state)
    assert wrong.returncode == 2
    assert "first-block" in wrong.stderr


@pytest.mark.all
def test_a_stack_quantizes_what_it_is_told_to(flux: Path, state: Path) -> None:
    arguments = ("--model", str(flux), "--device", "cpu", "--quantize", "denoise=int8", "--quantize", "text=int8")
    with running_stack(state, *arguments) as stack:
        found = [stack.picture("a star", seed=1, width=32, height=32, steps=2) for _ in range(2)]
        assert found[0][1].equal(found[1][1])
        assert found[0][0].recipe.speedups == ("denoise:quantize=int8", "text:quantize=int8")
