"""Plans for other hosts: what each is to run, by its own facts and the stack's configuration."""

from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.planning.placement import Post
from orchestrator.planning.stack_plan import PlannedModel, StackPlan
from orchestrator.settings import HostConfig, StackConfig, StageConfig
from orchestrator.state_folder import StackFolder
from orchestrator.supervisor.host_plans import HostPlans, plan_for, specs_for
from orchestrator.version import VERSION
from protocol.errors import BadRequest, Conflict
from protocol.host import HostFacts, library_versions
from protocol.messages.supervisor import HostPlanned
from scripts.faults.saboteur import patiently

POSTS = tuple(Post(stage, "host", "cpu") for stage in ("text", "denoise", "vae"))
Facts = Callable[..., HostFacts]


def facts(**given: object) -> HostFacts:
    found = {"hostname": "vm", "version": VERSION, "versions": library_versions(), "memory_bytes": 1 << 34, "cores": 4}
    return HostFacts(**{**found, **given})


def planned(name: str = "m", speedups: tuple[str, ...] = (), **settings: object) -> PlannedModel:
    stages = {stage: StageConfig(device="cpu", workers=2) for stage in ("text", "denoise", "vae")}
    config = StackConfig(model=name, **{"stages": stages, **settings})
    return PlannedModel(name, config, StackPlan("float32", POSTS, {}, speedups))


def test_a_host_has_workers_of_its_own_number_in_the_stacks_dtype(tmp_path: Path) -> None:
    (found,) = plan_for("box", facts(), [planned()], StackFolder(tmp_path))
    specs = list(specs_for("box", found, ""))
    assert [spec.name for spec in specs] == ["text-1@box", "denoise-1@box", "vae-1@box"]
    assert all(spec.dtype == "float32" and spec.same_revision and not spec.endpoint for spec in specs)
    own = HostConfig(stages={"text": StageConfig(workers=0), "denoise": StageConfig(workers=3)})
    (found,) = plan_for("box", facts(), [planned(hosts={"box": own})], StackFolder(tmp_path))
    assert [spec.stage for spec in specs_for("box", found, "m-")] == ["denoise"] * 3 + ["vae"]


def test_what_bits_depend_on_must_be_equal(tmp_path: Path) -> None:
    for given in ({"version": "0.0.1"}, {"versions": "torch 1.0"}):
        with pytest.raises(Conflict, match="box has another version"):
            plan_for("box", facts(**given), [planned()], StackFolder(tmp_path))
    with pytest.raises(Conflict, match="other speedups"):
        plan_for("box", facts(), [planned(speedups=("denoise:parallel=tensor-2",))], StackFolder(tmp_path))


def test_models_of_a_host_are_those_that_it_is_said_to_run(tmp_path: Path) -> None:
    both = [planned(name, hosts={"box": HostConfig(models=("b",))}) for name in ("a", "b")]
    assert [model.name for model in plan_for("box", facts(), both, StackFolder(tmp_path))] == ["b"]
    assert plan_for("box", facts(), both[:1], StackFolder(tmp_path)) == ()


def test_a_model_that_fits_no_gpu_of_a_host_is_left_out_and_the_others_run(tmp_path: Path) -> None:
    stages = {stage: StageConfig(device="cuda") for stage in ("text", "denoise", "vae")}
    gpu = PlannedModel("g", StackConfig(model="g", stages=stages), StackPlan("float32", POSTS, {}, ()))
    found = plan_for("box", facts(), [planned("a"), gpu], StackFolder(tmp_path))
    assert [model.name for model in found] == ["a"]
    with pytest.raises(BadRequest, match="CUDA"):
        plan_for("box", facts(), [gpu], StackFolder(tmp_path))


def answers(plans: HostPlans) -> list[HostPlanned]:
    found: list[HostPlanned] = []

    def come() -> bool:
        found.extend(plans.answers())
        return bool(found)

    patiently(come, 10)
    return found


def test_answers_come_when_asked_and_when_models_wake_or_come(tmp_path: Path) -> None:
    models, awake = [planned("a")], {"a"}
    plans = HostPlans(
        StackFolder(tmp_path), lambda: models, awake.__contains__, {"a": "", "b": "b-"}.__getitem__, lambda: None
    )
    plans.joined("box", facts())
    (answer,) = answers(plans)
    assert [spec.name for spec in answer.workers] == ["text-1@box", "denoise-1@box", "vae-1@box"]
    assert not list(plans.answers())  # nothing has changed
    plans.joined("box", facts())  # an orchestrator that has forgotten it
    assert answers(plans) == [answer]
    awake.clear()
    assert answers(plans)[0].workers == ()
    models.append(planned("b"))
    awake.update("ab")
    (answer,) = answers(plans)
    assert {spec.name for spec in answer.workers if spec.stage == "vae"} == {"vae-1@box", "b-vae-1@box"}
    plans.joined("old", facts(version="0"))
    (answer,) = answers(plans)
    assert answer.reason.startswith("old has another version")
