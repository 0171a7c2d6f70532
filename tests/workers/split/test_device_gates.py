"""Several jobs at once in one denoiser: bits as alone, each part of it with one job at a time."""

import threading
from pathlib import Path

import pytest
import torch

from protocol.errors import BadRequest
from protocol.job import JobRequest, Recipe
from protocol.model_spec import ModelSpec
from protocol.recipe import resolve
from protocol.tensors import Tensor
from protocol.worker_spec import WorkerSpec
from tests import tiny
from tests.records import bits, latents_of
from workers.errors import Cancelled
from workers.models.devices import Devices
from workers.models.loading import load
from workers.models.source import locate
from workers.runtime.worker import prepare
from workers.split.device_gates import DeviceGates
from workers.split.pipeline_split import places_of
from workers.stages.contract import Outcome, Saved
from workers.stages.denoise import DenoiseStage
from workers.stages.text import TextStage
from workers.weights.residency import block_rows

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.flux(depth=3), tmp_path_factory.mktemp("deep"))


def settings(model: Path, **values: object) -> WorkerSpec:
    return WorkerSpec(
        stage="denoise", model=ModelSpec(name=str(model)), device="cpu", dtype="float32", max_memory=(), name="d",
        **values,
    )  # fmt: skip


def jobs(model: Path, count: int) -> list[tuple[Recipe, tuple[Tensor, ...]]]:
    source = locate(ModelSpec(name=str(model)), "text")
    text = TextStage(load(source, "text", Devices(CPU), torch.float32), CPU)
    description = prepare(settings(model)).description
    found = []
    for seed in range(count):
        request = JobRequest(prompt=f"a red circle {seed}", width=32, height=32, steps=4, seed=seed)
        recipe = resolve(request, description, "float32", None)
        found.append((recipe, tuple(text.run(recipe, (), lambda *_: None).tensors)))
    return found


def latents(outcome: Outcome) -> bytes:
    return bits(latents_of(outcome.tensors))


def test_jobs_in_flight_have_the_bits_of_single_ones_and_no_part_works_on_two_at_once(deep: Path) -> None:
    work = jobs(deep, 3)
    alone, _ = prepare(settings(deep)).load()
    wanted = [latents(alone.run(recipe, tensors, lambda *_: None)) for recipe, tensors in work]

    stages = [loader()[0] for loader in prepare(settings(deep, cut=(4, 5), jobs=3)).loaders()]
    assert all(isinstance(stage, DenoiseStage) for stage in stages)
    model = stages[0].pipeline.transformer
    inside: dict[int, set[int]] = {0: set(), 1: set()}
    crowd: list[int] = []
    rows = block_rows(model)
    for index, row in enumerate(rows):
        part = 0 if index < 4 else 1

        def see(*_: object, part: int = part) -> None:
            inside[part].add(threading.get_ident())
            crowd.append(len(inside[part]))

        block = model.get_submodule(row)
        block.register_forward_pre_hook(see)
        if index in (3, len(rows) - 1):
            block.register_forward_hook(lambda *_, part=part: inside[part].discard(threading.get_ident()))
    found: dict[int, bytes] = {}

    def run(index: int) -> None:
        recipe, tensors = work[index]
        found[index] = latents(stages[index].run(recipe, tensors, lambda *_: None))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(3)] == wanted
    assert max(crowd) == 1


def test_a_job_that_ends_in_the_middle_leaves_its_part_to_others(deep: Path) -> None:
    (first, second) = jobs(deep, 2)
    one, other = (loader()[0] for loader in prepare(settings(deep, cut=(4, 5), jobs=2)).loaders())
    wanted = latents(other.run(*second, lambda *_: None))

    def stop(step: int, steps: int, saved: Saved | None = None) -> None:
        if step == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        one.run(*first, stop)
    breaking = one.pipeline.transformer.get_submodule("single_transformer_blocks.2")

    def fail(*_: object) -> None:
        raise RuntimeError("broken")

    hook = breaking.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        one.run(*first, lambda *_: None)
    hook.remove()
    assert latents(other.run(*second, lambda *_: None)) == wanted
    assert one.split is not None
    assert not any(gate.locked for gate in one.split.gates.all())


def test_blocks_go_where_the_cut_says_and_the_rest_to_the_ends() -> None:
    model = tiny.flux(depth=3).transformer
    found = places_of(model, [4, 5])
    assert [found[row] for row in block_rows(model)] == [0] * 4 + [1] * 5
    assert (found["x_embedder"], found["time_text_embed"], found["proj_out"]) == (0, 0, 1)
    covered = {name for name, _ in model.named_parameters() if any(name.startswith(f"{part}.") for part in found)}
    assert covered == {name for name, _ in model.named_parameters()}
    for wrong in ([3], [9, 0]):
        with pytest.raises(BadRequest, match="there are 9"):
            places_of(model, wrong)
    with pytest.raises(BadRequest, match="3 parts for 1"):
        Devices(CPU, {0: 1}, cut=(1, 2, 3)).parts("denoise")
    assert DeviceGates(model, [(CPU, 9)]).devices == [CPU]
