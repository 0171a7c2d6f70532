"""What each process of a stack is started with, and how their number changes."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.planning.placement import Post
from orchestrator.planning.stack_plan import StackPlan
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
    yield Children(folder, config, plan, reading, new_fork_server(folder, reading))
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
    found = Children(folder, config, StackPlan("bfloat16", POSTS, {}, ()), 0, new_fork_server(folder, 0))
    assert [child.forked for stage in STAGES for child in found.workers[stage]] == [True, False, True]


def test_the_orchestrator_gets_the_settings_and_the_describer_the_stages(children: Children) -> None:
    orchestrator = OrchestratorSpec.model_validate_json(children.orchestrator.spec)
    assert (orchestrator.settings.queue_limit, orchestrator.settings.keep_alive) == (7, {"text": 3.0})
    assert orchestrator.settings.fixed == {"denoise": 1}
    assert orchestrator.settings.describer
    describer = PROCESS_SPEC.validate_json(children.describer.spec)
    assert isinstance(describer, DescriberSpec)
    assert describer.stages == ("text", "denoise", "vae")


def test_scaling_takes_the_last_and_gives_free_names(children: Children) -> None:
    def names() -> list[str]:
        return [child.name for child in children.workers["text"]]

    children.scale("text", 3)
    assert names() == ["text-1", "text-2", "text-3"]
    del children.workers["text"][0]
    children.scale("text", 3)
    assert names() == ["text-2", "text-3", "text-1"]
    children.scale("text", 1)
    assert names() == ["text-2"]
    assert not children.leaving
    assert spec(children, "text-2").leased_gpus == (0,)


def test_a_restart_is_of_workers_alone_and_forgives(children: Children) -> None:
    (worker,) = children.workers["vae"]
    worker.wanted, worker.failures, worker.start_at = False, 4, 1e12
    assert children.restart("vae-1")
    assert not children.restart("orchestrator")
    assert not children.restart("vae-9")
    assert (worker.wanted, worker.failures, worker.start_at) == (True, 0, 0.0)
