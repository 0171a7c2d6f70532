"""CUDA graphs of forwards: used only where they give the bits of the forward itself, and never once weights moved."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from protocol.job import JobRequest
from protocol.recipe import resolve
from tests import tiny
from tests.records import latents_of
from workers.models.description import describe
from workers.models.devices import Devices
from workers.models.loading import load
from workers.models.source import Source, read
from workers.stages.contract import unheard
from workers.stages.denoise import DenoiseStage
from workers.stages.text import TextStage
from workers.weights.cuda_graphs import ForwardGraphs, JobKind
from workers.weights.lockstep import copy_of

CPU = torch.device("cpu")
CUDA = pytest.param("cuda:0", marks=tiny.needs_gpus(1))


class Tape:
    """A recorder on a CPU: what it made runs a forward again, with the arguments and weights that it was made of."""

    def __init__(self, module: torch.nn.Module, full: bool = False) -> None:
        self.module, self.full = module, full
        self.recorded = self.launched = 0

    def places(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self.module.parameters()]

    def __call__(self, recorded: functools.partial[Any]) -> tuple[Callable[[], None], Any]:
        def forward() -> Any:  # with the same tensors in lists of its own: only what is computed is recorded
            args, kwargs = tree_map(lambda leaf: leaf, (recorded.args, recorded.keywords))
            return recorded.func(*args, **kwargs)

        if self.full:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.recorded += 1
        places, result = self.places(), forward()

        def launch() -> None:
            assert self.places() == places, "a graph reads weights where they no longer are"
            self.launched += 1
            for place, made in zip(tree_leaves(result), tree_leaves(forward()), strict=True):
                place.copy_(made)

        return launch, result


class Doubling(torch.nn.Module):
    """A denoiser of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.calls = 0

    def forward(self, latents: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor]:
        self.calls += 1
        return (self.result(latents) * scale,)

    def result(self, latents: torch.Tensor) -> torch.Tensor:
        return latents * self.weight


class Counting(Doubling):
    """Its result depends on how often it was called, which no graph knows."""

    def result(self, latents: torch.Tensor) -> torch.Tensor:
        return latents * (self.weight + self.calls)


class Taking(Doubling):
    """It takes from a list that it is given."""

    def forward(self, latents: torch.Tensor, residuals: list[torch.Tensor]) -> tuple[torch.Tensor]:  # type: ignore[override]
        return (latents * self.weight + residuals.pop(0),)


class Writing(Doubling):
    """It writes its result into its argument."""

    def result(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.mul_(self.weight)


class Looking(Doubling):
    """It looks at what its GPU has computed."""

    def result(self, latents: torch.Tensor) -> torch.Tensor:
        return latents * (1 if latents.sum().item() > 1e9 else self.weight)


def job(
    graphs: ForwardGraphs, module: torch.nn.Module, inputs: Sequence[Any], kind: str = "a", **more: Any
) -> list[torch.Tensor]:
    """Return the results of a job's forwards, as its pipeline has them in the end."""
    with graphs.job(JobKind(kind), **more):
        return [module(*(given if isinstance(given, tuple) else (given,)))[0] for given in inputs]


def numbers(*values: float, device: str = "cpu") -> list[torch.Tensor]:
    return [torch.tensor([value], device=device) for value in values]


def test_a_graph_is_compared_with_its_forward_once_and_then_used() -> None:
    module = Doubling()
    graphs = ForwardGraphs(module, CPU, tape := Tape(module))
    assert job(graphs, module, numbers(1, 2, 3, 4, 5)) == numbers(2, 4, 6, 8, 10)  # none overwrites another
    assert tape.launched == 3  # for the third, which is compared, the fourth and the fifth
    assert job(graphs, module, numbers(6, 7)) == numbers(12, 14)
    assert (tape.recorded, tape.launched) == (2, 5)  # and once more after it was let go of for the comparison
    assert "forward" not in vars(module)


def test_jobs_of_another_kind_have_graphs_of_their_own() -> None:
    module = Doubling()
    graphs = ForwardGraphs(module, CPU, tape := Tape(module))
    job(graphs, module, numbers(1, 2, 3, 4))
    before = tape.launched
    assert job(graphs, module, numbers(1, 2), kind="b") == numbers(2, 4)
    assert tape.launched == before
    assert job(graphs, module, numbers(3, 4)) == numbers(6, 8)  # of the first kind, which is known to be sound
    assert tape.launched == before + 2


def test_weights_that_moved_are_recorded_anew() -> None:
    module = Doubling()
    graphs = ForwardGraphs(module, CPU, tape := Tape(module))
    job(graphs, module, numbers(1, 2, 3, 4))
    module.weight.data = torch.tensor(3.0)
    assert job(graphs, module, numbers(1, 2)) == numbers(3, 6)
    with graphs.job(JobKind("a")):
        assert module(torch.tensor([1.0])) == (torch.tensor([3.0]),)
        graphs.drop()  # in the middle of a job, for a loan
        module.weight.data = torch.tensor(4.0)
        assert module(torch.tensor([1.0])) == (torch.tensor([4.0]),)
    assert tape.launched > 3


def test_where_a_graph_gives_other_bits_none_is_used() -> None:
    module, plain = Counting(), Counting()
    graphs = ForwardGraphs(module, CPU, tape := Tape(module))
    job(graphs, module, numbers(1, 2, 3, 4, 5))
    assert tape.launched == 1
    assert not graphs.can_record
    module.calls = 0
    assert job(graphs, module, numbers(1, 2, 3)) == [plain(*pair)[0] for pair in zip(numbers(1, 2, 3))]


def test_forwards_that_change_in_what_is_no_tensor_are_never_recorded() -> None:
    module = Doubling()
    graphs = ForwardGraphs(module, CPU, tape := Tape(module))
    steps = [(torch.tensor([1.0]), step / 100) for step in range(100)]
    assert torch.equal(torch.cat(job(graphs, module, steps)), torch.arange(100) / 100 * 2)
    module_on_meta = [(torch.ones(1, device="meta"),)] * 4  # nor what lies elsewhere
    assert all(one.is_meta for one in job(graphs, module, module_on_meta))
    assert tape.recorded == 0


def test_what_is_hooked_on_to_a_part_in_later_steps_is_heeded() -> None:
    module = torch.nn.Sequential(torch.nn.Identity(), Doubling())
    graphs = ForwardGraphs(module, CPU, tape := Tape(module))
    found: list[torch.Tensor] = []
    with graphs.job(JobKind("a")):
        for step in range(16):
            if step == 6:  # as guiders do that skip layers in some of a loop's steps
                hook = module[0].register_forward_hook(lambda *_: torch.tensor([100.0]))
            if step == 12:
                hook.remove()
            found += module(torch.tensor([float(step)]))
    assert found == numbers(*[200.0 if 6 <= step < 12 else 2.0 * step for step in range(16)])
    assert tape.launched >= 6


def test_copies_are_laid_out_as_what_they_are_of() -> None:
    sliced, turned, spread = torch.ones(4, 6)[:, :3], torch.ones(2, 3).t(), torch.ones(1).expand(4)
    copies = copy_of([sliced, turned, (spread, 1)])
    assert [copies[0].stride(), copies[1].stride()] == [(6, 1), (1, 3)]
    assert torch.equal(copies[2][0], spread)
    copies[2][0].copy_(torch.zeros(4))  # can be written to
    assert copies[2][1] == 1


def test_a_forward_that_writes_into_its_arguments_has_no_graph() -> None:
    module = Writing()
    graphs = ForwardGraphs(module, CPU, tape := Tape(module))
    given = numbers(1.0, 2.0, 3.0, 4.0, 5.0)
    assert job(graphs, module, given) == numbers(2, 4, 6, 8, 10)
    assert given == numbers(2, 4, 6, 8, 10)
    assert tape.launched == 1
    assert not graphs.can_record


def test_kinds_that_come_once_each_are_given_up() -> None:
    module = Doubling()
    graphs = ForwardGraphs(module, CPU, tape := Tape(module))
    for _ in range(5):
        job(graphs, module, [(torch.tensor([1.0]), step / 20) for step in range(20)])
    recorded = tape.recorded
    for _ in range(5):
        job(graphs, module, [(torch.tensor([1.0]), step / 20) for step in range(20)])
    assert tape.recorded == recorded


def test_forwards_that_take_from_their_arguments_have_graphs_too() -> None:
    module = Taking()
    graphs = ForwardGraphs(module, CPU, tape := Tape(module))
    steps = [(torch.tensor([step]), [torch.tensor([10.0 * step])]) for step in (1.0, 2.0, 3.0, 4.0, 5.0)]
    assert job(graphs, module, steps) == numbers(12, 24, 36, 48, 60)
    assert tape.launched == 3


def test_without_memory_for_a_graph_jobs_of_that_kind_go_on_without() -> None:
    module = Doubling()
    graphs = ForwardGraphs(module, CPU, tape := Tape(module, full=True))
    assert job(graphs, module, numbers(1, 2, 3, 4)) == numbers(2, 4, 6, 8)
    tape.full = False
    assert job(graphs, module, numbers(1, 2, 3, 4)) == numbers(2, 4, 6, 8)
    assert tape.recorded == 0
    job(graphs, module, numbers(1, 2, 3, 4), kind="smaller")
    assert tape.recorded > 0


def test_what_is_computed_ahead_for_a_job_is_read_by_its_own_graphs_alone() -> None:
    module = Doubling()
    graphs = ForwardGraphs(module, CPU, tape := Tape(module))
    for _ in range(3):
        assert job(graphs, module, numbers(1, 2, 3, 4), keep=False) == numbers(2, 4, 6, 8)
        module.weight.data = torch.tensor(2.0)
    assert tape.launched > 3
    mixed = [*numbers(1, 2), torch.ones(2, 1), *numbers(3, 4)]
    before = tape.launched
    assert torch.equal(torch.cat([one.ravel() for one in job(graphs, module, mixed, keep=False)]),
                       torch.tensor([2.0, 4, 2, 2, 6, 8]))  # fmt: skip
    assert tape.launched == before + 1  # not after a forward of another shape, which may have moved it


@torch.no_grad()
def latents(stage: DenoiseStage, source: Source) -> list[torch.Tensor]:
    """Return the latents of five jobs of two sizes."""
    text = TextStage(load(source, "text", Devices(CPU), torch.float32), CPU)
    found = []
    for seed, size in enumerate((32, 32, 48, 32, 48)):
        request = JobRequest(prompt=f"a red circle {seed}", width=size, height=size, steps=6, seed=seed)
        recipe = resolve(request, describe(source), "float32", None)
        found.append(latents_of(stage.run(recipe, tuple(text.run(recipe, (), unheard).tensors), unheard).tensors))
    return found


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("family", ["flux", "sdxl", pytest.param("sd3", marks=pytest.mark.all)])
def test_jobs_with_graphs_have_the_bits_of_jobs_without(family: str, device: str, tmp_path: Path) -> None:
    source = read("x", tiny.save(getattr(tiny, family)(), tmp_path), None)
    where = torch.device(device)
    devices = Devices(where, leased=True)
    plain = DenoiseStage(load(source, "denoise", devices, torch.float32), where, cuda_graphs=False)
    stage = DenoiseStage(load(source, "denoise", devices, torch.float32), where)
    (residency,) = stage.residencies
    residency.graphs = ForwardGraphs(residency.module, where, Tape(residency.module) if device == "cpu" else None)
    for one in (*plain.residencies, residency):
        one.swap_in(one.total_bytes)
    wanted = latents(plain, source)
    for _ in range(2):
        assert all(map(torch.equal, latents(stage, source), wanted))
        assert residency.graphs._proven
        residency.swap_out()  # as between two leases
        residency.swap_in(residency.total_bytes)


@pytest.mark.parametrize("device", [CUDA])
def test_a_forward_that_no_graph_can_have_is_run_as_ever(device: str) -> None:
    module = Looking().to(device)
    graphs = ForwardGraphs(module, torch.device(device))
    graphs._worth[JobKind("a")] = True
    for _ in range(2):
        assert job(graphs, module, numbers(1, 2, 3, 4, device=device)) == numbers(2, 4, 6, 8, device=device)
    assert not graphs.can_record
    torch.randn(3, device=device)  # whose generator took part in what failed
    sound = Doubling().to(device)
    again = ForwardGraphs(sound, torch.device(device))
    again._worth[JobKind("a")] = True
    assert job(again, sound, numbers(1, 2, 3, 4, device=device)) == numbers(2, 4, 6, 8, device=device)
    assert again.can_record
