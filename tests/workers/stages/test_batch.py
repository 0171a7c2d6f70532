"""Jobs that are denoised in a batch: as good as alone, and alone where they don't go together."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from protocol.job import JobRequest, Recipe
from protocol.recipe import resolve
from protocol.tensors import Tensor
from tests import tiny
from tests.records import latents_of
from workers.models import devices
from workers.models.description import describe
from workers.models.devices import Devices
from workers.models.loading import load
from workers.models.source import Source, read
from workers.stages.batch import BatchedDenoiseStage, put_together
from workers.stages.contract import unheard
from workers.stages.denoise import DenoiseStage
from workers.stages.text import TextStage
from workers.weights.forward_trace import Call

CPU = torch.device("cpu")
Task = tuple[Recipe, tuple[Tensor, ...]]


def tasks_of(source: Source, prompts: Sequence[str], **more: Any) -> list[Task]:
    text = TextStage(load(source, "text", Devices(CPU), torch.float32), CPU)
    found = []
    for seed, prompt in enumerate(prompts):
        request = JobRequest(prompt=prompt, width=32, height=32, steps=3, seed=seed, **more)
        recipe = resolve(request, describe(source), "float32", None)
        found.append((recipe, tuple(text.run(recipe, (), unheard).tensors)))
    return found


def two_jobs(folder: Path) -> tuple[list[Task], list[torch.Tensor], BatchedDenoiseStage]:
    """Return two tasks, the latents that each gives alone, and a stage that has done none of them."""
    source = read("x", tiny.save(tiny.flux(), folder), None)
    tasks = tasks_of(source, ["a red circle", "a star"])
    alone = DenoiseStage(load(source, "denoise", Devices(CPU), torch.float32), CPU)
    wanted = [latents_of(alone.run(*task, unheard).tensors) for task in tasks]
    return tasks, wanted, BatchedDenoiseStage(load(source, "denoise", Devices(CPU), torch.float32), CPU)


def counted(stage: DenoiseStage, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the batches of the forwards that a stage's denoiser will make."""
    (denoiser,) = stage.denoisers()
    real, batches = denoiser.forward, list[int]()

    def forward(*args: Any, **kwargs: Any) -> Any:
        batches.append(next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)).shape[0])
        return real(*args, **kwargs)

    monkeypatch.setattr(denoiser, "forward", forward)
    return batches


@pytest.mark.parametrize(
    ("model", "more", "samples"),
    [
        ("flux", {}, 1),
        ("flux", {"cfg_scale": 2.0, "negative_prompt": "blurry"}, 1),
        ("sd15", {}, 2),
        pytest.param("sdxl", {}, 2, marks=pytest.mark.all),
        pytest.param("sd3", {}, 2, marks=pytest.mark.all),
    ],
)
def test_jobs_in_a_batch_are_equal_but_for_rounding(
    model: str, more: dict[str, Any], samples: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = read("x", tiny.save(getattr(tiny, model)(), tmp_path), None)
    tasks = tasks_of(source, ["a red circle", "a blue square", "a star"], **more)
    alone = DenoiseStage(load(source, "denoise", Devices(CPU), torch.float32), CPU)
    forwards = counted(alone, monkeypatch)
    wanted = [latents_of(alone.run(*task, unheard).tensors) for task in tasks]
    stage = BatchedDenoiseStage(load(source, "denoise", Devices(CPU), torch.float32), CPU)
    batches = counted(stage, monkeypatch)
    told: list[int] = []
    stage.ahead = tasks[1:]
    made = [stage.run(*tasks[0], lambda step, steps, saved=None: told.append(step))]
    steps = len(forwards) // 3
    assert batches == [3 * samples, *[samples] * 3, *[3 * samples] * (steps - 1)]  # the first is compared
    assert told == [0, 1, 2, 3]
    stage.ahead = ()
    made += [stage.run(*task, unheard) for task in tasks[1:]]
    assert len(batches) == steps + 3
    stage.ahead = tasks[1:]
    stage.run(*tasks[0], unheard)
    assert batches[-steps:] == [3 * samples] * steps
    stage.ahead = ()
    for task in tasks[1:]:
        stage.run(*task, unheard)
    for one, other in zip(made, wanted, strict=True):
        torch.testing.assert_close(latents_of(one.tensors), other, rtol=1e-3, atol=1e-3)
    assert torch.equal(latents_of(stage.run(*tasks[1], unheard).tensors), wanted[1])  # alone, and as ever


def test_jobs_that_do_not_go_together_are_run_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = read("x", tiny.save(tiny.flux(), tmp_path), None)
    (short,) = tasks_of(source, ["a red circle"])
    (long,) = tasks_of(source, ["a star"], max_sequence_length=12)
    alone = DenoiseStage(load(source, "denoise", Devices(CPU), torch.float32), CPU)
    wanted = [latents_of(alone.run(*task, unheard).tensors) for task in (short, long)]
    stage = BatchedDenoiseStage(load(source, "denoise", Devices(CPU), torch.float32), CPU)
    stage.ahead = [long]
    assert torch.equal(latents_of(stage.run(*short, unheard).tensors), wanted[0])
    assert torch.equal(latents_of(stage.run(*long, unheard).tensors), wanted[1])


def test_without_memory_for_a_batch_its_jobs_are_run_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, wanted, stage = two_jobs(tmp_path)
    (denoiser,) = stage.denoisers()
    real = denoiser.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if kwargs["hidden_states"].shape[0] > 1:
            raise torch.OutOfMemoryError("too large")
        return real(*args, **kwargs)

    monkeypatch.setattr(denoiser, "forward", forward)
    stage.ahead = tasks[1:]
    made = [stage.run(*task, unheard) for task in tasks]
    assert all(torch.equal(latents_of(one.tensors), other) for one, other in zip(made, wanted, strict=True))


@pytest.mark.parametrize("how", ["other results", "an error"])
def test_a_pipeline_whose_batches_are_not_its_jobs_is_run_one_by_one(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, wanted, stage = two_jobs(tmp_path)
    (denoiser,) = stage.denoisers()
    real, batches = denoiser.forward, list[int]()

    def forward(*args: Any, **kwargs: Any) -> Any:
        batches.append(kwargs["hidden_states"].shape[0])
        if batches[-1] > 1 and how == "an error":
            raise RuntimeError("places matter")
        result = real(*args, **kwargs)
        return tuple(part * batches[-1] for part in result)

    monkeypatch.setattr(denoiser, "forward", forward)
    for _ in range(2):
        stage.ahead = tasks[1:]
        made = [stage.run(*task, unheard) for task in tasks]
        assert all(torch.equal(latents_of(one.tensors), other) for one, other in zip(made, wanted, strict=True))
    assert batches.count(2) == 1


def test_a_batch_is_made_only_where_nothing_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(devices.WORKSPACE, "denoise", 0)
    source = read("x", tiny.save(tiny.flux(depth=4), tmp_path), None)
    tasks = tasks_of(source, ["a red circle", "a star"])
    alone = DenoiseStage(load(source, "denoise", Devices(CPU), torch.float32), CPU)
    wanted = [latents_of(alone.run(*task, unheard).tensors) for task in tasks]
    whole = load(source, "denoise", Devices(CPU, {0: 1 << 40}), torch.float32).residencies["transformer"]
    budget = int(whole.total_bytes * 0.75)
    stage = BatchedDenoiseStage(load(source, "denoise", Devices(CPU, {0: budget}), torch.float32), CPU)
    for task in tasks:
        stage.run(*task, unheard)  # by which modulation is learned
    stage.ahead = tasks[1:]
    made = [stage.run(*task, unheard) for task in tasks]
    assert all(torch.equal(latents_of(one.tensors), other) for one, other in zip(made, wanted, strict=True))


def test_a_job_that_fails_in_a_batch_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = read("x", tiny.save(tiny.flux(), tmp_path), None)
    tasks = tasks_of(source, ["a red circle", "a star"])
    stage = BatchedDenoiseStage(load(source, "denoise", Devices(CPU), torch.float32), CPU)
    wanted = latents_of(stage.run(*tasks[0], unheard).tensors)
    broken = tasks[1][0].model_copy(update={"steps": 0})
    stage.ahead = [(broken, tasks[1][1])]
    made = stage.run(*tasks[0], unheard)
    torch.testing.assert_close(latents_of(made.tensors), wanted, rtol=1e-3, atol=1e-3)
    stage.ahead = ()
    with pytest.raises((ValueError, IndexError, ZeroDivisionError)):
        stage.run(broken, tasks[1][1], unheard)


def test_what_is_no_batch_must_be_equal() -> None:
    x, ids = torch.rand(2, 4, 8), torch.rand(5, 3)
    one = Call((x,), {"t": torch.tensor(3.0), "ids": ids, "shapes": [1, 2], "more": {"pooled": torch.rand(2, 8)}})
    other = Call((x + 1,), {**one.kwargs, "ids": ids.clone()})
    both = put_together([one, other])
    assert both is not None
    assert both.args[0].shape == (4, 4, 8)
    assert both.kwargs["shapes"] == [1, 2, 1, 2]
    assert both.kwargs["more"]["pooled"].shape == (4, 8)
    assert torch.equal(both.kwargs["ids"], ids)
    for name, value in (("t", torch.tensor(4.0)), ("ids", ids + 1), ("more", {}), ("shapes", [1, 2, 3])):
        assert put_together([one, Call(other.args, {**other.kwargs, name: value})]) is None
    assert put_together([one, Call((), {"x": x})]) is None
