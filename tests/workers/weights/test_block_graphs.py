"""CUDA graphs of single blocks: those of one GPU share their memory, and none is used that isn't worth it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.workers.split.test_pipeline_split import GivenParts, alone, jobs, made, part_bytes, together
from tests.workers.weights.test_cuda_graphs import CPU, CUDA, Tape, Writing, numbers
from workers.models.devices import Devices
from workers.models.loading import load
from workers.stages.denoise import DenoiseStage
from workers.weights.block_graphs import MOST_TRIALS, BlockGraphs
from workers.weights.cuda_graphs import ALL, JobKind


class Adding(torch.nn.Module):
    """A block of two streams, one of which it leaves as it is."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(number), requires_grad=False)

    def forward(self, latents: torch.Tensor, text: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, Any]:
        return text, latents + self.weight * scale + text


class Row(torch.nn.Module):
    """A denoiser of some blocks."""

    def __init__(self, *blocks: torch.nn.Module) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(blocks)

    def forward(self, latents: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        text = latents * 10
        for block in self.blocks:
            text, latents = block(latents, text, scale=scale)
        return latents


def graphs_of(row: Row, **more: Any) -> tuple[BlockGraphs, Tape]:
    tape = Tape(row)
    return BlockGraphs([*row.blocks], CPU, 1000, record=tape, **more), tape


def job(
    graphs: BlockGraphs, row: torch.nn.Module, inputs: Sequence[torch.Tensor], kind: str = "a", **more: Any
) -> list[torch.Tensor]:
    with graphs.job(JobKind(kind)):
        return [row(given, **more) for given in inputs]


def test_blocks_are_timed_then_recorded_then_compared_and_then_launched() -> None:
    row, plain = Row(Adding(1.0), Adding(2.0)), Row(Adding(1.0), Adding(2.0))
    graphs, tape = graphs_of(row)
    inputs = numbers(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    assert job(graphs, row, inputs) == [plain(one) for one in inputs]
    assert (tape.recorded, tape.launched) == (2, 6)  # of two blocks; in the fourth forward, the fifth and the sixth
    assert job(graphs, row, inputs) == [plain(one) for one in inputs]
    assert (tape.recorded, tape.launched) == (2, 18)
    assert len(graphs._shared) == 2  # blocks of one kind share the memory of their arguments, and of their results


def test_a_process_that_feeds_one_gpu_alone_launches_none() -> None:
    busy = False
    row, plain = Row(Adding(1.0), Adding(2.0)), Row(Adding(1.0), Adding(2.0))
    graphs, tape = graphs_of(row, busy=lambda: busy)
    job(graphs, row, numbers(1, 2, 3, 4))
    proven = tape.launched
    assert job(graphs, row, numbers(5, 6)) == [plain(one) for one in numbers(5, 6)]
    assert tape.launched == proven
    busy = True
    job(graphs, row, numbers(5, 6))
    assert tape.launched == proven + 4


def test_weights_that_moved_are_recorded_anew_and_what_is_held_goes() -> None:
    row = Row(Adding(1.0))
    graphs, _tape = graphs_of(row)
    job(graphs, row, numbers(1, 2, 3, 4, 5))
    assert graphs.held
    assert graphs in ALL
    graphs.drop()
    assert not graphs.held
    row.blocks[0].weight.data = torch.tensor(3.0)
    assert job(graphs, row, numbers(1, 2)) == numbers(14, 25)
    row.blocks[0].weight.data = torch.tensor(5.0)  # nobody told it
    assert job(graphs, row, numbers(1, 2)) == numbers(16, 27)


def test_runs_that_differ_in_more_than_their_tensors_have_graphs_of_their_own() -> None:
    row = Row(Adding(1.0))
    graphs, tape = graphs_of(row)
    job(graphs, row, numbers(1, 2, 3, 4, 5))
    launched = tape.launched
    assert job(graphs, row, numbers(1, 2), scale=2.0) == numbers(13, 24)
    assert job(graphs, row, [torch.ones(2)])[0].tolist() == [12.0, 12.0]
    assert tape.launched == launched
    with graphs.job(JobKind("a")):
        hook = row.blocks[0].register_forward_hook(lambda *_: (torch.zeros(1), torch.zeros(1)))
        assert row(torch.ones(1)) == torch.zeros(1)  # around a graph
        hook.remove()


def test_a_block_that_writes_into_its_arguments_has_no_graph() -> None:
    class One(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([Writing()])

        def forward(self, latents: torch.Tensor) -> torch.Tensor:
            return self.blocks[0](latents)[0]

    row = One()
    tape = Tape(row)
    graphs = BlockGraphs([*row.blocks], CPU, 1000, record=tape)
    given = numbers(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    assert job(graphs, row, given) == numbers(2, 4, 6, 8, 10, 12)
    assert given == numbers(2, 4, 6, 8, 10, 12)
    assert tape.launched == 1
    assert not graphs.held


def test_without_memory_jobs_of_that_kind_go_on_without() -> None:
    row = Row(Adding(1.0))
    tape = Tape(row, full=True)
    graphs = BlockGraphs([*row.blocks], CPU, 1000, record=tape)
    assert job(graphs, row, numbers(1, 2, 3, 4, 5)) == numbers(12, 23, 34, 45, 56)
    tape.full = False
    job(graphs, row, numbers(1, 2, 3, 4, 5))
    assert tape.recorded == 0
    job(graphs, row, numbers(1, 2, 3, 4, 5), kind="smaller")
    assert tape.recorded == 1


def test_jobs_of_which_nothing_can_be_learned_need_not_be_alone_for_ever() -> None:
    row = Row(Adding(1.0))
    graphs, _ = graphs_of(row)
    short = JobKind("short")
    assert not graphs.untried(None)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt), graphs.job(short):  # which says nothing of graphs
            raise KeyboardInterrupt
    for number in range(2):
        assert graphs.untried(short._replace(rest=number))
        with graphs.job(short):
            row(torch.ones(1))
    assert not graphs.untried(short)
    assert not BlockGraphs([*row.blocks], CPU, 4).untried(JobKind("a"))  # a CPU has none


def test_where_a_gpu_is_what_is_waited_for_few_sizes_are_tried() -> None:
    row = Row(Adding(1.0))
    graphs, tape = graphs_of(row)
    graphs.gpus = 0  # so that a host's time is none
    for number in range(MOST_TRIALS):
        assert graphs.untried(JobKind(number))
        job(graphs, row, numbers(1, 2, 3, 4, 5), kind=f"size {number}")
        assert not graphs.untried(JobKind(f"size {number}", "another guidance"))
    assert not graphs.untried(JobKind("one more"))
    job(graphs, row, numbers(1, 2, 3, 4, 5), kind="one more")
    assert tape.recorded == 0


def test_a_block_that_changes_what_its_arguments_hold_has_no_graph() -> None:
    class Nested(torch.nn.Module):
        def forward(self, latents: torch.Tensor, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            pair[1].add_(1)
            return latents + pair[0]

    class Popping(torch.nn.Module):
        def forward(self, latents: torch.Tensor, left: list[torch.Tensor]) -> torch.Tensor:
            return latents + left.pop()

    for block in (Nested(), Popping()):
        graphs = BlockGraphs([block], CPU, 1000, record=Tape(block))
        with graphs.job(JobKind("a")):
            for step in range(1, 8):
                given = [torch.ones(1), torch.full((1,), float(step))]
                pair: Any = given if isinstance(block, Popping) else tuple(given)
                block(torch.zeros(1), pair)
                assert len(pair) == 1 if isinstance(block, Popping) else pair[1] == step + 1
        assert not graphs.held


def test_too_many_kinds_by_turns_are_given_up() -> None:
    row = Row(Adding(1.0))
    graphs, tape = graphs_of(row)
    for turn in range(100):
        job(graphs, row, numbers(1, 2, 3, 4, 5), kind=f"kind {turn % 10}")
    recorded = tape.recorded
    job(graphs, row, numbers(1, 2, 3, 4, 5), kind="kind 3")
    assert tape.recorded == recorded
    assert recorded < 50


def test_many_kinds_one_after_the_other_that_use_their_graphs_are_not_given_up() -> None:
    """A sweep of guidance, say."""
    row = Row(Adding(1.0))
    graphs, tape = graphs_of(row)
    for number in range(40):
        with graphs.job(JobKind("a", number)):
            for _ in range(20):
                row(torch.ones(1))
    assert tape.recorded == 40


@pytest.mark.parametrize(("family", "cfg"), [("flux", False), pytest.param("sd3", True, marks=pytest.mark.all)])
@pytest.mark.parametrize(
    "where",
    [pytest.param(("cpu", "cpu"), id="cpu"), pytest.param(("cuda:0", "cuda:1"), marks=tiny.needs_gpus(2), id="cuda")],
)
def test_jobs_at_once_in_a_cut_denoiser_have_their_bits_by_graphs(
    where: tuple[str, str], family: str, cfg: bool, tmp_path: Path
) -> None:
    source = made(family, tmp_path)
    first, second = map(torch.device, where)
    steps = ({"steps": 6}, {"steps": 9})
    work = [(recipe.model_copy(update=more), tensors) for recipe, tensors in jobs(source, cfg) for more in steps * 2]
    wanted = alone(source, work, first)
    blocks = len(load(source, "denoise", Devices(CPU, {0: 1 << 40}), torch.float32).residencies["transformer"].blocks)
    cut = (blocks // 2, blocks - blocks // 2)
    given = tuple(zip((first, second), cut, part_bytes(source, cut), strict=True))
    loaded = load(source, "denoise", GivenParts(first, cut=cut, given=given), torch.float32)
    assert loaded.split
    for residency in loaded.split.residencies:
        graphs = residency.block_graphs
        assert graphs
        assert graphs.gpus == 2
        graphs.gpus = 1000  # whatever the time of such small blocks is
        if first == CPU:
            graphs._record, graphs._off = Tape(residency.module), False
    at_once = [DenoiseStage(loaded.another(), first) for _ in range(2)]
    for _ in range(2):
        assert together(at_once, work) == wanted
        assert all(residency.block_graphs.held for residency in loaded.split.residencies)
        for residency in loaded.split.residencies:
            residency.block_graphs.drop()


@pytest.mark.parametrize("device", [CUDA])
def test_blocks_on_a_gpu_give_their_bits_by_graphs(device: str) -> None:
    row, plain = Row(Adding(1.0), Adding(2.0)).to(device), Row(Adding(1.0), Adding(2.0)).to(device)
    graphs = BlockGraphs([*row.blocks], torch.device(device), gpus=1000)
    for _ in range(2):
        inputs = numbers(1, 2, 3, 4, 5, 6, device=device)
        assert job(graphs, row, inputs) == [plain(one) for one in inputs]
        assert graphs.held
        graphs.drop()
