"""What each process of a stack is started with, and how their number changes."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.planning.placement import Post
from orchestrator.planning.stack_plan import PlannedModel, StackPlan
from orchestrator.settings import OrchestratorSpec, StackConfig
from orchestrator.state_folder import StackFolder
from orchestrator.supervisor.children import Children
from orchestrator.supervisor.fork_server import new_fork_server
from protocol.model_spec import ModelSpec
from protocol.stages import STAGES
from protocol.worker_spec import PROCESS_SPEC, DescriberSpec, WorkerSpec

POSTS = (
    Post("text", "leases", "cuda", (0,)),
    Post("denoise", "split", "cuda", (0, 1), memory=(8, 9), cut=(30, 27), workspace=5),
    Post("vae", "host", "cpu"),
)


@pytest.fixture
def children(state: Path) -> Iterator[Children]:
    folder = StackFolder(state / "s")
    folder.create()
    config = StackConfig(model="m", revision="r", checkpoint=0.5, queue_limit=7, stages={"text": {"keep_alive": 3}})
    plan = StackPlan("bfloat16", POSTS, {}, ("denoise:compile",))
    reading, writing = os.pipe()
    yield Children(folder, config, [PlannedModel("m", config, plan)], reading, new_fork_server(folder, reading))
    os.close(reading)
    os.close(writing)


def spec(children: Children, name: str) -> WorkerSpec:
    found = PROCESS_SPEC.validate_json(next(child.spec for child in children if child.name == name))
    assert isinstance(found, WorkerSpec)
    return found


def test_a_worker_gets_its_place_as_data(children: Children) -> None:
    text, denoise, vae = (spec(children, name) for name in ("text-1", "denoise-1", "vae-1"))
    assert (text.visible_gpus, text.leased_gpus, text.max_memory) == ((0,), (0,), ())
    assert (denoise.visible_gpus, denoise.leased_gpus, denoise.max_memory) == ((0, 1), (0, 1), (8, 9))
    assert (denoise.cut, denoise.jobs, denoise.workspace) == ((30, 27), 2, 5)
    assert (vae.visible_gpus, vae.leased_gpus, vae.device) == (None, (), "cpu")
    assert (denoise.checkpoint_seconds, text.checkpoint_seconds) == (0.5, None)
    for one in (text, denoise, vae):
        assert (one.model, one.dtype, one.speedups) == (
            ModelSpec(name="m", revision="r"),
            "bfloat16",
            ("denoise:compile",),
        )
        assert one.endpoint == children.endpoint


def test_a_stage_that_quantizes_starts_by_itself(state: Path) -> None:
    """The fork server has imported everything as if torchao were not installed, and libraries remember that."""
    folder = StackFolder(state / "q")
    folder.create()
    config = StackConfig(model="m", stages={"denoise": {"quantize": "fp8"}})
    model = PlannedModel("m", config, StackPlan("bfloat16", POSTS, {}, config.speedups()))
    found = Children(folder, config, [model], 0, new_fork_server(folder, 0))
    assert [child.forked for stage in STAGES for child in found.workers["m", stage]] == [True, False, True]


def test_the_orchestrator_gets_the_settings_and_the_describer_the_stages(children: Children) -> None:
    orchestrator = OrchestratorSpec.model_validate_json(children.orchestrator.spec)
    (model,) = orchestrator.settings.models
    assert (orchestrator.settings.queue_limit, model.name, model.keep_alive) == (7, "m", {"text": 3.0})
    assert model.fixed == {"denoise": 1}
    assert orchestrator.settings.describer
    (describing,) = children.describers
    describer = PROCESS_SPEC.validate_json(describing.spec)
    assert isinstance(describer, DescriberSpec)
    assert describer.name == "m"
    assert describer.stages == ("text", "denoise", "vae")


def test_scaling_takes_the_last_and_gives_free_names(children: Children) -> None:
    def names() -> list[str]:
        return [child.name for child in children.workers["m", "text"]]

    children.scale("m", "text", 3)
    assert names() == ["text-1", "text-2", "text-3"]
    del children.workers["m", "text"][0]
    children.scale("m", "text", 3)
    assert names() == ["text-2", "text-3", "text-1"]
    children.scale("m", "text", 1)
    assert names() == ["text-2"]
    assert not children.keeper.leaving
    assert spec(children, "text-2").leased_gpus == (0,)


def test_a_restart_is_of_workers_alone_and_forgives(children: Children) -> None:
    (worker,) = children.workers["m", "vae"]
    worker.wanted, worker.failures, worker.start_at = False, 4, 1e12
    assert children.restart("vae-1")
    assert not children.restart("orchestrator")
    assert not children.restart("vae-9")
    assert (worker.wanted, worker.failures, worker.start_at) == (True, 0, 0.0)


def test_of_several_models_the_first_one_has_workers_and_others_when_they_are_asked_for(state: Path) -> None:
    folder = StackFolder(state / "several")
    folder.create()
    config = StackConfig.model_validate({"models": {"a": {"rest_after": 60}, "b": {"model": "x/y", "revision": "r"}}})
    models = [PlannedModel(name, alone, StackPlan("float32", POSTS, {}, ())) for name, alone in config.each().items()]
    found = Children(folder, config, models, 0, new_fork_server(folder, 0))

    def names() -> list[str]:
        return [child.name for child in found if child.stage]

    assert names() == ["a-text-1", "a-denoise-1", "a-vae-1"]
    assert [child.name for child in found.describers] == ["a-describer", "b-describer"]
    orchestrator = OrchestratorSpec.model_validate_json(found.orchestrator.spec)
    assert [(m.name, m.model, m.rest_after) for m in orchestrator.settings.models] == [
        ("a", "a", 60.0),
        ("b", "x/y", None),
    ]
    assert [model.name for model in found.resting] == ["b"]
    found.scale("b", "vae", 2)  # once it is asked for
    assert found.wake("b")
    assert not found.wake("b")
    assert names()[3:] == ["b-text-1", "b-denoise-1", "b-vae-1", "b-vae-2"]
    assert spec(found, "b-text-1").model == ModelSpec(name="x/y", revision="r")
    assert found.rest("a")
    assert not found.rest("a")
    assert found.rest("b", "it can't be loaded")
    assert names() == []
    assert {model.name: model.reason for model in found.resting} == {"a": "", "b": "it can't be loaded"}
    assert found.wake("b")
    assert [(model.name, model.reason) for model in found.resting] == [("a", "")]
    assert len(names()) == 4
