"""A lease of a GPU, on a CPU that stands in for it: taken, kept to, given back; and an executor that obeys leases."""

import contextlib
import gc
from collections.abc import Callable, Iterator

import pytest
import torch

from protocol.gpu_memory import Lease, WeightNeed
from protocol.job import JobRequest, Recipe
from protocol.messages.common import Message
from protocol.messages.worker import Borrow, Leased, Lent, Progress, Ready, Result, SetLease, Task, TaskFailed
from protocol.recipe import resolve
from protocol.tensors import Tensor
from tests import tiny
from tests.records import before_denoising
from tests.tiny import needs_gpus
from tests.workers.worst_stream import worst_copy_stream
from workers.errors import StageError
from workers.models.description import describe
from workers.models.devices import WORKSPACE, Devices
from workers.models.loading import load
from workers.models.source import Source, read
from workers.replay.call_record import CallRecord
from workers.runtime.executor import (
    Event,
    Executor,
    Load,
    LoanLost,
    Measured,
    Run,
    StageRunner,
    StartAnew,
    run_measured,
)
from workers.stages.contract import Outcome, Report, Saved
from workers.stages.denoise import DenoiseStage
from workers.stages.text import TextStage
from workers.stages.vae import VaeStage
from workers.weights.gpu_lease import GpuLease

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda:0", marks=needs_gpus(1))]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return read("x", tiny.save(tiny.flux(depth=6), tmp_path_factory.mktemp("flux")), None)


@pytest.fixture
def uncapped() -> Iterator[None]:
    """The process's allocator is as it was, for the tests after this one."""
    yield
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.usefixtures("uncapped")
@pytest.mark.parametrize("device", DEVICES)
def test_small_components_come_whole_and_the_largest_streams_in_what_is_left(device: str, source: Source) -> None:
    where = torch.device(device)
    gc.collect()
    before = torch.cuda.memory_allocated() if device != "cpu" else 0  # of other tests
    for stage in ("text", "denoise", "vae"):
        loaded = load(source, stage, Devices(where, leased=True), torch.float32)
        gpu_lease = GpuLease(where, tuple(loaded.residencies.values()), WORKSPACE[stage])
        needs = gpu_lease.needs()
        assert all(residency.state == "out" for residency in gpu_lease.residencies)
        assert 0 < needs.least <= needs.weights
        assert (needs.least == needs.weights) == (stage == "vae")
        for weights in (needs.weights, needs.least, (needs.weights + needs.least) // 2):
            gpu_lease.take(weights + (1 << 30), weights)
            assert sum(residency.device_bytes for residency in gpu_lease.residencies) <= weights
            assert all(residency.state != "out" for residency in gpu_lease.residencies)
        gpu_lease.give_back()
        assert gpu_lease.kept_bytes() <= before + (32 << 20)
        assert all(residency.device_bytes == 0 for residency in gpu_lease.residencies)
        assert (gpu_lease.context_bytes() > 0) == (device != "cpu")


Start = Callable[..., Executor]


@pytest.fixture
def start() -> Iterator[Start]:
    """Executors at work, given how to load, and a lease of each GPU if they work in leases."""
    with contextlib.ExitStack() as stack:

        def started(load: Load, lease: type[GpuLease] | None = None, run: Run = run_measured) -> Executor:
            executor = Executor(
                load, None, lambda runner: [lease(CPU, runner.residencies, 1)] if lease else [], run=run
            )
            stack.enter_context(executor.wake).settimeout(30)
            stack.enter_context(executor.bell)
            executor.start()
            return executor

        yield started


def lease_of(size: int) -> SetLease:
    return SetLease(leases=(Lease(bytes=size, weight_bytes=size),))


def next_event(executor: Executor) -> Event | BaseException:
    executor.wake.recv(1)  # one for each event
    return executor.events.get_nowait()


def next_of(executor: Executor) -> Message:
    event = next_event(executor)
    assert not isinstance(event, BaseException), event
    return event[0]


def task(source: Source, allow_tiling: bool) -> Task:
    recipe = resolve(JobRequest(prompt="a", width=32, height=32, seed=1), describe(source), "float32", None)
    return Task(job="j", stage="text", attempt=1, recipe=recipe, allow_tiling=allow_tiling)


def denoise_task(source: Source) -> Task:
    request = JobRequest(prompt="a", width=32, height=32, seed=1, steps=4)
    recipe = resolve(request, describe(source), "float32", None)
    return Task(job="j", stage="denoise", attempt=1, recipe=recipe)


def test_an_executor_obeys_leases_and_tells_what_could_not_be(source: Source, start: Start) -> None:
    def loading() -> tuple[TextStage, tuple[tuple[str, str], ...]]:
        return TextStage(load(source, "text", Devices(CPU, leased=True), torch.float32), CPU), ()

    executor = start(loading, GpuLease)
    ready = next_of(executor)
    assert isinstance(ready, Ready)
    assert ready.needs
    executor.give(lease_of(ready.needs[0].weights), ())
    leased = next_of(executor)
    assert isinstance(leased, Leased)
    assert (leased.leases[0].bytes, leased.reason) == (ready.needs[0].weights, "")
    assert {component.state for component in leased.residency} == {"in"}
    executor.give(task(source, True), ())
    assert isinstance(next_of(executor), Result)
    assert isinstance(next_of(executor), Ready)
    executor.give(lease_of(100), ())
    refused = next_of(executor)
    assert isinstance(refused, Leased)
    assert refused.leases[0].bytes == 0
    assert "too few even to stream" in refused.reason
    assert {component.state for component in refused.residency} == {"out"}


def test_bits_of_a_library_that_was_short_of_memory_count_only_where_no_more_can_be_had(
    source: Source, start: Start
) -> None:
    """Torch keeps the algorithm that cuDNN chose in need, so a new process has to take its place for other bits."""
    runs = [
        Measured(Outcome([]), 0.1, 1, 1, short=True),
        Measured(Outcome([]), 0.1, 1, 1, short=False),
        Measured(Outcome([]), 0.1, 1, 1, short=True),
    ]
    executor = start(
        lambda: (TextStage(load(source, "text", Devices(CPU), torch.float32), CPU), ()), run=lambda *_: runs.pop(0)
    )
    assert isinstance(next_of(executor), Ready)
    for _ in range(2):
        executor.give(task(source, allow_tiling=True), ())
        result = next_of(executor)
        assert isinstance(result, Result)
        assert "last bits may differ" in result.warnings[0]
        assert isinstance(next_of(executor), Ready)
    executor.give(task(source, allow_tiling=False), ())
    assert isinstance(next_event(executor), StartAnew)
    executor = start(
        lambda: (TextStage(load(source, "text", Devices(CPU), torch.float32), CPU), ()), run=lambda *_: runs.pop(0)
    )
    assert isinstance(next_of(executor), Ready)
    executor.give(task(source, allow_tiling=False), ())
    failed = next_of(executor)
    assert isinstance(failed, TaskFailed)
    assert failed.out_of_memory
    assert isinstance(next_of(executor), Ready)
    executor.give(task(source, allow_tiling=False), ())
    assert isinstance(next_event(executor), StartAnew)


def test_a_process_whose_library_found_no_host_memory_is_replaced(source: Source, start: Start) -> None:
    """OneDNN went on without, in all jobs that followed."""

    def without(*_: object) -> Measured:
        raise StageError("it failed") from RuntimeError("could not create a primitive")

    executor = start(lambda: (TextStage(load(source, "text", Devices(CPU), torch.float32), CPU), ()), run=without)
    assert isinstance(next_of(executor), Ready)
    executor.give(task(source, allow_tiling=True), ())
    failed = next_of(executor)
    assert isinstance(failed, TaskFailed)
    assert "no more memory on its host" in failed.reason
    assert isinstance(next_event(executor), StartAnew)


def test_a_vae_does_not_tile_while_more_memory_can_be_had(source: Source, start: Start) -> None:
    stage = VaeStage(load(source, "vae", Devices(CPU, leased=True), torch.float32), CPU)

    def cramped(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    stage.vae.decoder.register_forward_pre_hook(cramped)
    record = CallRecord()
    record.add("encode_prompt", (torch.zeros(1, 512, 32), torch.zeros(1, 32), torch.zeros(512, 3)), CPU)
    record.add_decode("vae.decode", ((torch.zeros(1, 4, 16, 16),), {"return_dict": False}, None), CPU)
    executor = start(lambda: (stage, ()))
    next_of(executor)
    executor.give(task(source, allow_tiling=False), tuple(record.pack()))
    failed = next_of(executor)
    assert isinstance(failed, TaskFailed)
    assert not stage.may_tile
    assert isinstance(next_of(executor), Ready)
    executor.give(task(source, allow_tiling=False), tuple(record.pack()))
    assert isinstance(next_event(executor), StartAnew)


def denoising(source: Source) -> Load:
    def loading() -> tuple[DenoiseStage, tuple[tuple[str, str], ...]]:
        loaded = load(source, "denoise", Devices(CPU, leased=True, copy_stream=worst_copy_stream), torch.float32)
        return DenoiseStage(loaded, CPU), ()

    return loading


def weights_of(executor: Executor) -> WeightNeed:
    ready = next_of(executor)
    assert isinstance(ready, Ready)
    return ready.needs[0]


def done_in(executor: Executor, source: Source, share: float, lent: int = 0) -> list[bytes]:
    """Return what a job leaves, in a lease of a share of the weights, which are `lent` of, in the middle of it."""
    needs = weights_of(executor)
    executor.give(lease_of(int(needs.weights * share)), ())
    leased = next_of(executor)
    assert isinstance(leased, Leased)
    assert not leased.reason
    work = denoise_task(source)
    executor.give(work, before_denoising(source, work.recipe))
    if lent:
        assert next_but_progress(executor)[0] == Lent(bytes=lent)
        assert executor.events.empty()
        executor.returned(int(needs.weights * share))
    result, tensors = next_but_progress(executor)
    assert isinstance(result, Result), result
    assert isinstance(next_of(executor), Ready)
    return [bytes(tensor.data) for tensor in tensors]


def next_but_progress(executor: Executor) -> Event:
    event = next_event(executor)
    assert not isinstance(event, BaseException), event
    return next_but_progress(executor) if isinstance(event[0], Progress) else event


@pytest.mark.parametrize("share", [1.0, 0.75])
def test_a_denoiser_lends_at_the_end_of_a_step_and_waits_until_it_has_it_back(
    source: Source, start: Start, share: float
) -> None:
    def lending(runner: StageRunner, recipe: Recipe, tensors: tuple[Tensor, ...], report: Report) -> Measured:
        def reporting(step: int, steps: int, saved: Saved | None = None) -> None:
            if step == 2:
                executor.give(Borrow(bytes=1 << 14), ())
            report(step, steps, saved)

        return run_measured(runner, recipe, tensors, reporting)

    executor = start(denoising(source), GpuLease, run=lending)
    found = done_in(executor, source, share, lent=1 << 14)
    assert found == done_in(start(denoising(source), GpuLease), source, share)


def test_a_denoiser_without_work_lends_at_once_and_what_it_can_not_lend_it_says(source: Source, start: Start) -> None:
    executor = start(denoising(source), GpuLease)
    needs = weights_of(executor)
    executor.give(lease_of(needs.weights), ())
    assert isinstance(next_of(executor), Leased)
    executor.give(Borrow(bytes=needs.weights), ())  # even what is of no block
    assert next_of(executor) == Lent(bytes=0)
    executor.give(Borrow(bytes=1000), ())
    assert next_of(executor) == Lent(bytes=1000)
    executor.give(lease_of(needs.weights), ())
    assert executor.events.empty()
    executor.returned(needs.weights)
    assert isinstance(next_of(executor), Leased)


class BrokenLoan(GpuLease):
    def take_again(self, size: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_a_denoiser_that_does_not_get_back_what_it_lent_ends(source: Source, start: Start) -> None:
    executor = start(denoising(source), BrokenLoan)
    needs = weights_of(executor)
    executor.give(lease_of(needs.weights), ())
    assert isinstance(next_of(executor), Leased)
    executor.give(Borrow(bytes=1000), ())
    assert next_of(executor) == Lent(bytes=1000)
    executor.returned(needs.weights)
    assert isinstance(next_event(executor), LoanLost)


class BrokenLease(GpuLease):
    def take(self, size: int, weights: int) -> None:
        raise ZeroDivisionError


def test_whatever_goes_wrong_in_the_executor_ends_the_worker(source: Source, start: Start) -> None:
    def loading() -> tuple[TextStage, tuple[tuple[str, str], ...]]:
        return TextStage(load(source, "text", Devices(CPU, leased=True), torch.float32), CPU), ()

    executor = start(loading, BrokenLease)
    next_of(executor)
    executor.give(lease_of(1), ())
    assert isinstance(next_event(executor), ZeroDivisionError)
