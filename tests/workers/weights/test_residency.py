"""Bits are the same wherever the weights are; planned from sizes, run on the CPU with the same code as on a GPU."""

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTextModel, Qwen2Config, Qwen2Model, T5EncoderModel

from protocol.errors import DoesNotFit
from protocol.job import JobRequest
from protocol.recipe import resolve
from tests import tiny
from tests.chance import examples
from tests.pictures import as_task, noise
from tests.records import before_denoising, latents_of
from tests.tiny import needs_gpus
from tests.workers.worst_stream import OneForgotten, worst_copy_stream
from workers.models import devices
from workers.models.description import describe
from workers.models.devices import Devices
from workers.models.loading import load
from workers.models.source import Source, read
from workers.stages.denoise import DenoiseStage
from workers.stages.text import TextStage
from workers.weights.copy_stream import Copies, HostCopyStream, Mark, ThreadedCopyStream, copy_stream_for
from workers.weights.host_weights import HostWeights, host_weights
from workers.weights.page_locks import PageLocker, PageLocks
from workers.weights.residency import Residency, block_rows, compile_blocks, usually_laid_out
from workers.weights.streaming import Block, plan_stream, room

DEVICES = ["cpu", pytest.param("cuda:0", marks=needs_gpus(1))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Components with several blocks each, as checkpoints leave them."""
    folder = tmp_path_factory.mktemp("components")
    torch.manual_seed(0)
    FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=3, num_single_layers=6, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    ).save_pretrained(folder / "flux")  # fmt: skip
    tiny.t5(layers=6).save_pretrained(folder / "t5")
    tiny.clip(layers=6).save_pretrained(folder / "clip")
    tiny.sd15().unet.save_pretrained(folder / "unet")
    Qwen2Model(
        Qwen2Config(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).save_pretrained(folder / "qwen")  # fmt: skip
    return folder


def text(module: torch.nn.Module, device: str) -> torch.Tensor:
    return module(torch.arange(1, 13, device=device)[None]).last_hidden_state


def unet(module: torch.nn.Module, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(1, module.config.in_channels, 16, 16, generator=generator).to(device)
    states = torch.randn(1, 8, module.config.cross_attention_dim, generator=generator).to(device)
    return module(sample, torch.tensor(5, device=device), states).sample


CASES: dict[str, tuple[Any, Callable[[torch.nn.Module, str], torch.Tensor]]] = {
    "flux": (FluxTransformer2DModel, tiny.flux_forward),
    "t5": (T5EncoderModel, text),
    "clip": (CLIPTextModel, text),
    "unet": (UNet2DConditionModel, unet),
    "qwen": (Qwen2Model, text),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_bits_are_equal_in_every_residency(case: str, device: str, folder: Path) -> None:
    cls, run = CASES[case]
    wanted = run(cls.from_pretrained(folder / case).eval().to(device), device)
    residency = Residency(case, cls.from_pretrained(folder / case).eval(), torch.device(device))
    states = []
    for share in (1.0, 0.95, 0.8, 1.0, 0.6):
        try:
            residency.swap_in(int(residency.total_bytes * share))
        except DoesNotFit:
            continue
        states.append(residency.state)
        assert residency.device_bytes <= residency.total_bytes * share
        for _ in range(3):  # the ring goes round
            residency.start()
            assert torch.equal(run(residency.module, device), wanted)
        residency.swap_out()
        assert residency.device_bytes == 0
    assert states.count("in") == 2
    assert "streamed" in states


@pytest.mark.parametrize("device", ["cpu", "worst", pytest.param("cuda:0", marks=needs_gpus(1))])
@pytest.mark.parametrize("share", [1.0, 0.75])
@torch.no_grad()
def test_what_is_lent_between_forwards_is_back_before_it_is_read(share: float, device: str, folder: Path) -> None:
    copy_stream = worst_copy_stream if device == "worst" else copy_stream_for
    where = "cpu" if device == "worst" else device
    wanted = tiny.flux_forward(FluxTransformer2DModel.from_pretrained(folder / "flux").eval().to(where), where)
    module = FluxTransformer2DModel.from_pretrained(folder / "flux").eval()
    residency = Residency("flux", module, torch.device(where), copy_stream=copy_stream, piece_bytes=4096)
    residency.swap_in(int(residency.total_bytes * share))
    residency.start()
    held = residency.device_bytes
    for size in (1, 5000, held // 3, held):
        assert torch.equal(tiny.flux_forward(module, where), wanted)
        residency.lend(size)
        loose = [name for name in module.state_dict() if "blocks." not in name]
        assert held - residency.device_bytes >= min(size, held // 3)  # the ring and what is of no block stay
        assert all(module.get_parameter(name).device.type == torch.device(where).type for name in loose)
        residency.take_again()
        assert residency.device_bytes == held
    assert torch.equal(tiny.flux_forward(module, where), wanted)
    residency.lend(held)
    residency.take_again()
    residency.swap_out()  # before a forward: nothing of what was on its way holds on to memory
    assert not any(block._forward_pre_hooks for block in module.single_transformer_blocks)
    assert residency.device_bytes == 0


def test_a_change_of_what_is_streamed_that_finds_no_memory_fails_one_job_alone(tmp_path: Path) -> None:
    class Full(HostCopyStream):
        full = False

        def copy(self, copies: Copies, after: Mark) -> Mark:
            if self.full:
                self.full = False
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().copy(copies, after)

    source = read("x", tiny.save(tiny.flux(depth=4), tmp_path), None)
    cpu = torch.device("cpu")
    wanted = jobs(DenoiseStage(load(source, "denoise", Devices(cpu), torch.float32), cpu), tmp_path, False)
    copy_stream = Full(cpu)
    devices = Devices(cpu, {0: wanted_bytes(source, 0.75)}, copy_stream=lambda *_: copy_stream)
    stage = DenoiseStage(load(source, "denoise", devices, torch.float32), cpu)
    each = each_job(stage, tmp_path, cfg=False, picture=False)
    assert torch.equal(next(each), wanted[0])
    copy_stream.full = True
    with pytest.raises(torch.OutOfMemoryError):
        next(each)
    (residency,) = stage.residencies
    assert (residency.state, residency.device_bytes) == ("out", 0)
    assert all(map(torch.equal, jobs(stage, tmp_path, False), wanted))


@torch.no_grad()
def test_blocks_in_another_order_than_planned_fetch_their_weights_themselves(folder: Path) -> None:
    module = FluxTransformer2DModel.from_pretrained(folder / "flux").eval()
    other = FluxTransformer2DModel.from_pretrained(folder / "flux").eval()
    order = [4, 0, 3, 3, 1, 5, 2]
    residency = Residency("flux", module, torch.device("cpu"))
    residency.swap_in(int(residency.total_bytes * 0.7))
    for model in (module, other):
        model.single_transformer_blocks = torch.nn.ModuleList(model.single_transformer_blocks[i] for i in order)
    assert residency.state == "streamed"
    for _ in range(2):
        assert torch.equal(tiny.flux_forward(module, "cpu"), tiny.flux_forward(other, "cpu"))


@pytest.mark.parametrize("cfg", [False, True])
def test_nothing_is_read_before_it_arrives_or_after_its_place_is_reused(cfg: bool, tmp_path: Path) -> None:
    source = read("x", tiny.save(tiny.flux(depth=4), tmp_path), None)
    cpu = torch.device("cpu")
    wanted = jobs(DenoiseStage(load(source, "denoise", Devices(cpu), torch.float32), cpu), tmp_path, cfg)
    total = load(source, "denoise", Devices(cpu, {0: 1 << 40}), torch.float32).residencies["transformer"]
    for share, copy_stream in ((0.9, worst_copy_stream), (0.75, by_a_thread), (0.6, worst_copy_stream)):
        devices = Devices(cpu, {0: int(total.total_bytes * share)}, copy_stream=copy_stream)
        loaded = load(source, "denoise", devices, torch.float32)
        assert all(map(torch.equal, jobs(DenoiseStage(loaded, cpu), tmp_path, cfg), wanted))
        assert loaded.residencies["transformer"].modulation is not None


def by_a_thread(device: torch.device, locks: PageLocks | None) -> ThreadedCopyStream:
    return ThreadedCopyStream(worst_copy_stream(device, locks))


def test_forwards_that_were_not_foreseen_are_right_too(tmp_path: Path) -> None:
    source = read("x", tiny.save(tiny.flux(depth=4), tmp_path), None)
    cpu = torch.device("cpu")
    wanted = jobs(DenoiseStage(load(source, "denoise", Devices(cpu), torch.float32), cpu), tmp_path, False)
    loaded = load(source, "denoise", Devices(cpu, {0: wanted_bytes(source, 0.75)}), torch.float32)
    assert all(map(torch.equal, jobs(DenoiseStage(loaded, cpu, forwards=OneForgotten), tmp_path, False), wanted))
    assert loaded.residencies["transformer"].modulation is not None


@pytest.mark.parametrize("cfg", [False, True])
def test_weights_from_a_disk_are_learned_of_before_the_first_job(cfg: bool, tmp_path: Path) -> None:
    """A whole job with all weights passing through would take as many reads of the disk as it has forwards."""
    source = read("x", tiny.save(tiny.flux(depth=4), tmp_path), None)
    cpu = torch.device("cpu")
    wanted = jobs(DenoiseStage(load(source, "denoise", Devices(cpu), torch.float32), cpu), tmp_path, cfg)
    loaded = load(source, "denoise", Devices(cpu, {0: wanted_bytes(source, 0.75)}), torch.float32)
    residency = loaded.residencies["transformer"]
    residency.from_disk = True
    found = each_job(DenoiseStage(loaded, cpu), tmp_path, cfg, False)
    assert torch.equal(next(found), wanted[0])
    assert residency.modulation is not None
    assert all(map(torch.equal, found, wanted[1:]))


def wanted_bytes(source: Source, share: float) -> int:
    """A share of the transformer's weights."""
    whole = load(source, "denoise", Devices(torch.device("cpu"), {0: 1 << 40}), torch.float32)
    return int(whole.residencies["transformer"].total_bytes * share)


@torch.no_grad()
def test_a_swap_in_that_fails_leaves_nothing_on_the_device(folder: Path) -> None:
    class Full(HostCopyStream):
        full = True

        def synchronize(self) -> None:
            if self.full:
                self.full = False
                raise torch.OutOfMemoryError("CUDA out of memory.")

    module = T5EncoderModel.from_pretrained(folder / "t5").eval()
    copy_stream = Full(torch.device("cpu"))
    residency = Residency("t5", module, copy_stream.device, copy_stream=lambda *_: copy_stream)
    wanted = text(T5EncoderModel.from_pretrained(folder / "t5").eval(), "cpu")

    with pytest.raises(torch.OutOfMemoryError):
        residency.swap_in(int(residency.total_bytes * 0.7))
    assert (residency.state, residency.device_bytes, residency._resident) == ("out", 0, None)
    assert len({p.untyped_storage().data_ptr() for p in residency.module.parameters()}) == 1  # the file's
    assert torch.equal(text(residency.module, "cpu"), wanted)
    residency.swap_in(int(residency.total_bytes * 0.7))
    residency.start()
    assert torch.equal(text(residency.module, "cpu"), wanted)


@torch.no_grad()
def test_a_run_that_breaks_off_leaves_the_next_one_right(folder: Path) -> None:
    module = FluxTransformer2DModel.from_pretrained(folder / "flux").eval()
    wanted = tiny.flux_forward(module, "cpu")
    residency = Residency("flux", module, torch.device("cpu"))
    residency.swap_in(int(residency.total_bytes * 0.6))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    hook = module.single_transformer_blocks[2].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        tiny.flux_forward(module, "cpu")
    hook.remove()
    residency.start()
    assert torch.equal(tiny.flux_forward(module, "cpu"), wanted)


@pytest.mark.parametrize("case", CASES)
def test_loading_leaves_weights_in_the_mapped_file_and_a_cast_makes_a_private_copy(case: str, folder: Path) -> None:
    cls, _ = CASES[case]
    mapped = host_weights(cls.from_pretrained(folder / case), case)
    assert mapped.private_bytes == 0
    cast = host_weights(cls.from_pretrained(folder / case, dtype=torch.bfloat16), case)
    assert cast.private == set(cast.tensors)
    assert cast.private_bytes == sum(tensor.nbytes for tensor in mapped.tensors.values()) // 2


def test_pieces_of_files_are_page_locked_in_order_and_only_what_is_refused_takes_the_buffer(folder: Path) -> None:
    weights = [host_weights(cls.from_pretrained(folder / case), case) for case, (cls, _) in CASES.items()]
    both = HostWeights(weights[0].tensors | weights[1].tensors, weights[0].files | weights[1].files, frozenset())
    refused, go, order = next(iter(weights[1].files.values())), threading.Event(), []

    def register(address: int, size: int, device: torch.device) -> int:
        go.wait(30)
        order.append((address, size))
        return 1 if refused.data_ptr() <= address < refused.data_ptr() + refused.nbytes else 0

    locker = PageLocker(register, piece_bytes=50_000)
    locker.lock_ahead([Path(path) for path in both.files], torch.device("cpu"))
    locks = PageLocks(both, torch.device("cpu"), locker)
    assert order == []  # nobody waited
    go.set()
    several = 0
    for tensor in both.tensors.values():
        parts = list(locks.parts(tensor))
        several += len(parts) > 1
        assert (parts[0].start, parts[-1].end) == (0, tensor.nbytes)
        assert all(one.end == next.start for one, next in itertools.pairwise(parts))
        inside = refused.data_ptr() <= tensor.data_ptr() < refused.data_ptr() + refused.nbytes
        assert {part.locked for part in parts} == {not inside}
    assert several > 0
    assert order == sorted(order)
    assert sum(refused.data_ptr() <= address < refused.data_ptr() + refused.nbytes for address, _ in order) == 1
    assert sum(size for _, size in order if size != 50_000) < 50_000 * len(both.files)
    assert [(part.end, part.locked) for part in locks.parts(torch.zeros(3))] == [(12, True)]  # none of a file


def test_blocks_are_the_items_of_the_outermost_lists(folder: Path) -> None:
    rows = block_rows(T5EncoderModel.from_pretrained(folder / "t5"))
    assert rows == [f"encoder.block.{i}" for i in range(6)]
    assert len(block_rows(FluxTransformer2DModel.from_pretrained(folder / "flux"))) == 9


@given(
    sizes=st.lists(st.lists(st.integers(1, 50_000), min_size=1, max_size=8), min_size=1, max_size=12),
    besides=st.integers(0, 100_000),
    share=st.floats(0.05, 1.0),
)
@examples(200)
def test_a_plan_keeps_to_its_budget_and_streams_evenly(sizes: list[list[int]], besides: int, share: float) -> None:
    blocks = [Block(f"b{i}", {f"b{i}.{j}": size for j, size in enumerate(row)}) for i, row in enumerate(sizes)]
    total = besides + sum(room(size) for row in sizes for size in row)
    budget = int(total * share)
    plan = plan_stream(blocks, total, budget)
    if plan is None:
        return
    assert plan.resident_bytes(total) <= budget
    for block, piece, offset in zip(blocks, plan.pieces, plan.offsets, strict=True):
        assert set(piece) <= set(block.weights)
        assert offset + sum(room(block.weights[name]) for name in piece) <= plan.ring_bytes


def test_of_equal_blocks_each_gives_the_same() -> None:
    blocks = [Block(f"b{i}", {f"b{i}.{n}": 19 << 20 for n in "qkvo"} | {f"b{i}.ff": 75 << 20}) for i in range(40)]
    total = sum(room(size) for block in blocks for size in block.weights.values())
    plan = plan_stream(blocks, total, int(total * 0.8))
    assert plan is not None
    streamed = [sum(blocks[i].weights[name] for name in piece) for i, piece in enumerate(plan.pieces)]
    assert max(streamed) - min(streamed) <= 19 << 20
    assert plan.resident_bytes(total) > total * 0.78


def jobs(stage: DenoiseStage, folder: Path, cfg: bool, picture: bool = False) -> list[torch.Tensor]:
    """Latents of three jobs after each other, of different sizes, steps and prompts; with a picture, of one more."""
    return list(each_job(stage, folder, cfg, picture))


def each_job(stage: DenoiseStage, folder: Path, cfg: bool, picture: bool) -> Iterator[torch.Tensor]:
    source = read("x", folder, None)
    text = TextStage(load(source, "text", Devices(torch.device("cpu")), torch.float32), torch.device("cpu"))
    for seed, (size, steps) in enumerate(((32, 2), (48, 3), (32, 4))):
        request = JobRequest(
            prompt=f"a red circle {seed}", width=size, height=size, steps=steps, seed=seed,
            **({"cfg_scale": 2.0, "negative_prompt": "blurry"} if cfg else {}),
        )  # fmt: skip
        recipe = resolve(request, describe(source), "float32", None)
        embeddings = tuple(text.run(recipe, (), lambda *_: None).tensors)
        yield latents_of(stage.run(recipe, embeddings, lambda *_: None).tensors)
    if picture:
        request = JobRequest(prompt="a star", images=("0" * 64,), strength=0.5, steps=4, seed=3, width=32, height=32)
        recipe = resolve(request, describe(source), "float32", None)
        given = before_denoising(source, recipe, as_task(noise()))
        yield latents_of(stage.run(recipe, given, lambda *_: None).tensors)


@pytest.mark.parametrize("cfg", [False, True])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("model", "ahead"),
    [("flux", True), ("sd3", True), ("chroma", False), pytest.param("pixart", False, marks=pytest.mark.all)],
)
def test_streamed_jobs_have_equal_bits_and_modulation_runs_ahead_where_there_is_some(
    model: str, ahead: bool, device: str, cfg: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(devices.WORKSPACE, "denoise", 0)
    source = read("x", tiny.save(getattr(tiny, model)(depth=4), tmp_path), None)
    where = torch.device(device)
    wanted = jobs(DenoiseStage(load(source, "denoise", Devices(where), torch.float32), where), tmp_path, cfg)
    whole = load(source, "denoise", Devices(where, {0: 1 << 40}), torch.float32).residencies["transformer"]
    assert whole.state == "in"
    for share in (0.9, 0.75):
        budget = int(whole.total_bytes * share)
        loaded = load(source, "denoise", Devices(where, {0: budget}), torch.float32)
        residency = loaded.residencies["transformer"]
        assert residency.state == "streamed"
        assert all(map(torch.equal, jobs(DenoiseStage(loaded, where), tmp_path, cfg), wanted))
        assert residency.device_bytes <= budget
        assert (residency.modulation is not None) == ahead


@pytest.mark.parametrize("model", ["flux", pytest.param("sd3", marks=pytest.mark.all)])
@pytest.mark.all
def test_compiled_bits_are_equal_in_every_residency_and_close_to_uncompiled_ones(model: str, tmp_path: Path) -> None:
    source = read("x", tiny.save(getattr(tiny, model)(depth=4), tmp_path), None)
    cpu = torch.device("cpu")
    plain = jobs(DenoiseStage(load(source, "denoise", Devices(cpu), torch.float32), cpu), tmp_path, False, True)
    whole = load(source, "denoise", Devices(cpu, {0: 1 << 40}), torch.float32)
    found = []
    for share in (1.0, 0.9, 0.75):
        budget = int(whole.residencies["transformer"].total_bytes * share)
        loaded = load(source, "denoise", Devices(cpu, {0: budget}), torch.float32)
        residency = loaded.residencies["transformer"]
        residency.compile(backend="aot_eager")
        found.append(jobs(DenoiseStage(loaded, cpu), tmp_path, False, True))
        assert residency.state == ("in" if share == 1.0 else "streamed")
        assert residency.modulation is not None
        torch._dynamo.reset()
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))
    for compiled, eager in zip(found[0], plain, strict=True):
        assert torch.allclose(compiled.view(torch.float32), eager.view(torch.float32), rtol=1e-3, atol=1e-4)


class Squaring(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(3)])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def test_what_is_a_part_of_a_larger_tensor_has_no_code_of_its_own() -> None:
    """Its batch of one has another stride. The first block was computed by other code in a process's first job."""
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    module, plain = Squaring(), Squaring()
    plain.load_state_dict(module.state_dict())
    compile_blocks(module, backend=backend)
    whole = torch.randn(1, 6, 4)
    assert whole[:, 2:].stride() != torch.randn(1, 4, 4).stride()
    with torch.no_grad():
        assert torch.equal(module(whole[:, 2:]), plain(whole[:, 2:]))
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_only_strides_that_say_nothing_are_changed() -> None:
    sliced, turned, part = torch.ones(2, 6)[:, :3], torch.ones(1, 2, 3).transpose(1, 2), torch.ones(1, 6, 4)[:, 2:]
    assert [usually_laid_out(one).stride() for one in (sliced, turned)] == [sliced.stride(), turned.stride()]
    assert usually_laid_out(part).stride() == (16, 4, 1)
    assert usually_laid_out(part).data_ptr() == part.data_ptr()
    parameter = torch.nn.Parameter(torch.ones(1, 3))
    assert usually_laid_out(parameter) is parameter
