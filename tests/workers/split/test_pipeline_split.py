"""A denoiser cut over several GPUs, whose parts a CPU plays: bits as in one process, whatever is streamed."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from protocol.errors import BadRequest, DoesNotFit
from protocol.gpu_memory import Lease
from protocol.job import JobRequest, Recipe
from protocol.recipe import resolve
from protocol.stages import Stage
from protocol.tensors import Tensor
from tests import tiny
from tests.pictures import as_task, noise
from tests.records import before_denoising, bits, latents_of
from tests.tiny import needs_gpus
from tests.workers.worst_stream import OneForgotten, worst_copy_stream
from workers.errors import Cancelled
from workers.models.description import describe
from workers.models.devices import Devices
from workers.models.loading import load
from workers.models.source import Source, read
from workers.split.pipeline_split import JobGate
from workers.stages.contract import Outcome, Saved
from workers.stages.denoise import DenoiseStage, PipelineForwards
from workers.stages.text import TextStage
from workers.weights.copy_stream import copy_stream_for
from workers.weights.gpu_lease import GpuLease, apply_leases
from workers.weights.residency import block_rows

CPU = torch.device("cpu")
Job = tuple[Recipe, tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@dataclass(frozen=True)
class GivenParts(Devices):
    """Devices of a cut denoiser that are given, each with its blocks and bytes, on machines with fewer GPUs, too."""

    given: tuple[tuple[torch.device, int, int], ...] = ()

    def parts(self, stage: Stage) -> list[tuple[torch.device, int, int]]:
        return list(self.given)


def made(model: str, folder: Path) -> Source:
    return read("x", tiny.save(getattr(tiny, model)(depth=4), folder), None)


def jobs(source: Source, cfg: bool) -> list[Job]:
    """Of different sizes, numbers of pictures and steps."""
    text = TextStage(load(source, "text", Devices(CPU), torch.float32), CPU)
    guided = {"cfg_scale": 2.0, "negative_prompt": "blurry"} if cfg else {}
    found = []
    for seed, (size, steps, count) in enumerate(((32, 2, 1), (48, 3, 1), (32, 4, 2), (32, 3, 1))):
        request = JobRequest(
            prompt=f"a red circle {seed}", width=size, height=size, steps=steps, seed=seed, num_images=count, **guided
        )
        recipe = resolve(request, describe(source), "float32", None)
        found.append((recipe, tuple(text.run(recipe, (), lambda *_: None).tensors)))
    return found


def picture_jobs(source: Source) -> list[Job]:
    """Jobs that begin from pictures, and one that doesn't."""
    description, found = describe(source), jobs(source, False)[:1]
    for seed, (strength, steps) in enumerate(((0.5, 4), (0.9, 3), (0.5, 4))):
        request = JobRequest(
            prompt="a star", width=32, height=32, steps=steps, seed=seed, images=("0" * 64,), strength=strength
        )  # fmt: skip
        recipe = resolve(request, description, "float32", None, picture_size=(32, 32))
        found.append((recipe, before_denoising(source, recipe, as_task(noise(seed=seed)))))
    return found


def latents(outcome: Outcome) -> bytes:
    return bits(latents_of(outcome.tensors))


def alone(source: Source, work: Sequence[Job], device: torch.device = CPU) -> list[bytes]:
    stage = DenoiseStage(load(source, "denoise", Devices(device), torch.float32), device)
    return [latents(stage.run(*job, lambda *_: None)) for job in work]


def part_bytes(source: Source, cut: tuple[int, ...]) -> list[int]:
    loaded = load(source, "denoise", Devices(CPU, cut=cut), torch.float32)
    return [residency.total_bytes for residency in loaded.residencies.values()]


def stages(
    source: Source,
    cut: tuple[int, ...],
    shares: Sequence[float],
    count: int = 2,
    forwards: type[PipelineForwards] = PipelineForwards,
) -> list[DenoiseStage]:
    """For so many jobs at once, in a share of each part's weights."""
    room = {i: int(size * share) for i, (size, share) in enumerate(zip(part_bytes(source, cut), shares, strict=True))}
    loaded = load(source, "denoise", Devices(CPU, room, cut=cut, copy_stream=worst_copy_stream), torch.float32)
    return [DenoiseStage(loaded.another(), CPU, forwards=forwards) for _ in range(count)]


def together(stages: Sequence[DenoiseStage], work: Sequence[Job]) -> list[bytes]:
    """Every stage takes a job when it is free."""
    found: dict[int, bytes] = {}
    left = list(enumerate(work))

    def run(stage: DenoiseStage) -> None:
        while left:
            index, job = left.pop(0)
            found[index] = latents(stage.run(*job, lambda *_: None))

    threads = [threading.Thread(target=run, args=(stage,)) for stage in stages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[index] for index in range(len(work))]


@pytest.mark.parametrize("cfg", [False, True])
@pytest.mark.parametrize("shares", [(1.0, 1.0), (0.9, 1.0), (0.8, 0.75)])
@pytest.mark.parametrize(
    ("model", "ahead"), [("flux", True), ("sd3", True), pytest.param("pixart", False, marks=pytest.mark.all)]
)
def test_jobs_at_once_have_the_bits_of_one_alone(
    model: str, ahead: bool, shares: tuple[float, float], cfg: bool, tmp_path: Path
) -> None:
    source = made(model, tmp_path)
    work = jobs(source, cfg)
    blocks = len(load(source, "denoise", Devices(CPU, {0: 1 << 40}), torch.float32).residencies["transformer"].blocks)
    several = stages(source, (blocks // 2, blocks - blocks // 2), shares, count=3)
    assert together(several, work) == alone(source, work)
    parts = several[0].split
    assert parts is not None
    assert [residency.state for residency in parts.residencies] == ["in" if s == 1.0 else "streamed" for s in shares]
    learned = ahead and min(shares) < 1.0
    assert [residency.modulation is not None for residency in parts.residencies] == [learned, learned]


@pytest.mark.parametrize("shares", [pytest.param((1.0, 1.0), marks=pytest.mark.all), (0.8, 0.75)])
def test_jobs_at_once_that_begin_from_pictures_have_the_bits_of_one_alone(
    shares: tuple[float, float], tmp_path: Path
) -> None:
    source = made("flux", tmp_path)
    work = picture_jobs(source)
    several = stages(source, (6, 6), shares)
    assert together(several, work) == alone(source, work)
    assert together(several, work[::-1]) == alone(source, work)[::-1]
    assert several[0].split is not None
    assert (several[0].split.residencies[0].modulation is not None) == (min(shares) < 1.0)


@pytest.mark.parametrize("shares", [(1.0, 1.0), (0.8, 0.75)])
@pytest.mark.parametrize("model", ["flux", "sd3"])
@pytest.mark.parametrize(
    "where",
    [
        pytest.param(("cuda:0", "cuda:0"), marks=needs_gpus(1), id="cuda-one"),
        pytest.param(("cuda:0", "cuda:1"), marks=needs_gpus(2), id="cuda-two"),
    ],
)
def test_jobs_at_once_on_gpus_have_the_bits_of_one_alone(
    where: tuple[str, str], model: str, shares: tuple[float, float], tmp_path: Path
) -> None:
    source = made(model, tmp_path)
    work = [job for _ in range(4) for job in jobs(source, False)]
    first, second = map(torch.device, where)
    wanted = alone(source, work, first)
    blocks = len(load(source, "denoise", Devices(CPU, {0: 1 << 40}), torch.float32).residencies["transformer"].blocks)
    cut = (blocks // 2, blocks - blocks // 2)
    rooms = [int(size * share) for size, share in zip(part_bytes(source, cut), shares, strict=True)]
    devices = GivenParts(first, cut=cut, given=tuple(zip((first, second), cut, rooms, strict=True)))
    loaded = load(source, "denoise", devices, torch.float32)
    several = [DenoiseStage(loaded.another(), first) for _ in range(3)]
    assert together(several, work) == wanted
    assert together(several, work[::-1]) == wanted[::-1]
    assert loaded.split is not None
    assert {residency.device for residency in loaded.split.residencies} == {first, second}


@pytest.mark.parametrize(
    "where",
    [pytest.param(("cpu", "cpu"), id="cpu"), pytest.param(("cuda:0", "cuda:1"), marks=needs_gpus(2), id="cuda")],
)
def test_leases_come_and_go_between_jobs_and_bits_stay(where: tuple[str, str], tmp_path: Path) -> None:
    source = made("flux", tmp_path)
    work = jobs(source, False)
    first, second = map(torch.device, where)
    wanted = alone(source, work, first)
    cut = (5, 7)
    whole = part_bytes(source, cut)
    given = ((first, 5, whole[0]), (second, 7, whole[1]))
    copy_stream = worst_copy_stream if first == CPU else copy_stream_for
    devices = GivenParts(first, leased=True, cut=cut, copy_stream=copy_stream, given=given)
    loaded = load(source, "denoise", devices, torch.float32)
    assert loaded.split is not None
    several = [DenoiseStage(loaded.another(), first) for _ in range(2)]
    most = [whole[0], int(whole[1] * 0.9)]
    residencies = loaded.split.residencies
    shares = [GpuLease(r.device, (r,), 1 << 20, size) for r, size in zip(residencies, most, strict=True)]
    assert [share.needs().weights for share in shares] == most
    try:
        for fraction in (0.8, 0.0, 1.0, 0.7, 0.8):
            sizes = [int(size * fraction) for size in most]
            leases = [Lease(bytes=size + (1 << 30 if size else 0), weight_bytes=size) for size in sizes]
            leased = apply_leases(shares, leases)
            assert (leased.reason, leased.leases) == ("", tuple(leases))
            if fraction:
                assert together(several, work) == wanted
                assert all(r.device_bytes <= size for r, size in zip(residencies, sizes, strict=True))
            else:
                assert [residency.state for residency in residencies] == ["out", "out"]
        refused = apply_leases(
            shares, [Lease(bytes=1 << 30, weight_bytes=most[0]), Lease(bytes=1 << 30, weight_bytes=100)]
        )
        assert "too few even to stream" in refused.reason
        assert [residency.state for residency in residencies] == ["out", "out"]  # all or none
        assert not any(lease.bytes for lease in refused.leases)
    finally:
        for gpu in range(torch.cuda.device_count()):
            torch.cuda.set_per_process_memory_fraction(1.0, gpu)


def test_a_job_that_breaks_off_while_weights_pass_leaves_the_others_right(tmp_path: Path) -> None:
    source = made("flux", tmp_path)
    work = jobs(source, False)
    wanted = alone(source, work)
    one, other = stages(source, (5, 7), (0.8, 0.8))
    assert latents(one.run(*work[1], lambda *_: None)) == wanted[1]  # they have learned
    inside, go = threading.Event(), threading.Event()

    def stop(step: int, steps: int, saved: Saved | None = None) -> None:
        inside.set()
        go.wait(30)
        raise Cancelled

    def cancelled() -> None:
        with pytest.raises(Cancelled):
            one.run(*work[2], stop)

    thread = threading.Thread(target=cancelled)
    thread.start()
    inside.wait(30)
    broken = other.run(*work[3], lambda *_: None)
    go.set()
    thread.join()
    assert latents(broken) == wanted[3]
    assert together([one, other], work) == wanted


def test_forwards_that_were_not_foreseen_are_right_too(tmp_path: Path) -> None:
    source = made("flux", tmp_path)
    work = jobs(source, False)
    several = stages(source, (6, 6), (0.8, 0.8), forwards=OneForgotten)
    assert together(several, work) == alone(source, work)
    assert several[0].split is not None
    assert several[0].split.residencies[0].modulation is not None


@pytest.mark.parametrize("shares", [pytest.param((1.0, 1.0), marks=pytest.mark.all), (0.8, 0.9)])
def test_compiled_bits_are_those_of_a_compiled_model_on_one_device(shares: tuple[float, float], tmp_path: Path) -> None:
    source = made("flux", tmp_path)
    first, _, _, last = jobs(source, False)  # of one shape: compiling takes long
    work = [first, last, first]
    whole = load(source, "denoise", Devices(CPU, {0: 1 << 40}), torch.float32)
    whole.residencies["transformer"].compile(backend="aot_eager")
    single = DenoiseStage(whole, CPU)
    wanted = [latents(single.run(*job, lambda *_: None)) for job in work]
    torch._dynamo.reset()
    several = stages(source, (5, 7), shares)
    assert several[0].split is not None
    for residency in several[0].split.residencies:
        residency.compile(backend="aot_eager")
    assert together(several, work) == wanted


def test_jobs_that_go_on_from_checkpoints_at_once_have_the_same_bits(tmp_path: Path) -> None:
    source = made("flux", tmp_path)
    work = jobs(source, False)
    wanted = alone(source, work)
    one, other = stages(source, (6, 6), (0.8, 0.75))
    one.checkpoint_seconds = other.checkpoint_seconds = 0
    assert latents(one.run(*work[0], lambda *_: None)) == wanted[0]  # they have learned
    resumed: list[Job] = []
    for recipe, tensors in work[1:]:
        kept: list[Saved] = []
        one.run(recipe, tensors, lambda step, steps, saved=None: kept.append(saved) if saved else None)  # noqa: B023
        resumed.append((recipe, (*tensors, *kept[-1].tensors)))
    assert together([one, other], [*resumed, *resumed]) == wanted[1:] * 2


def test_who_must_be_alone_is_alone() -> None:
    crowd, inside, most = JobGate(), [0], {True: 0, False: 0}
    lock, barrier = threading.Lock(), threading.Barrier(3)

    def visit(alone: bool) -> None:
        with crowd.joined(lambda: alone):
            with lock:
                inside[0] += 1
            if not alone:
                barrier.wait(30)  # three are in at once
            most[alone] = max(most[alone], inside[0])
            with lock:
                inside[0] -= 1

    threads = [threading.Thread(target=visit, args=(index % 4 == 0,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most == {True: 1, False: 3}


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    source = made("chroma", tmp_path)
    rows = block_rows(load(source, "denoise", Devices(CPU), torch.float32).pipeline.transformer)
    with pytest.raises(BadRequest, match="can't be cut"):
        load(source, "denoise", Devices(CPU, cut=(5, len(rows) - 5)), torch.float32)


def test_what_cannot_even_be_streamed_is_refused(tmp_path: Path) -> None:
    source = made("flux", tmp_path)
    with pytest.raises(DoesNotFit, match="part 2"):
        stages(source, (6, 6), (1.0, 0.01))
