"""The part of weights that stays in a host's memory where they exceed it."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.planning.gpu_rates import rate_of
from orchestrator.planning.hardware import Card, Hardware, free_memory, free_of_group
from orchestrator.planning.host_memory import RESERVE, in_jobs, in_steps, locked_by_stage, locked_bytes, told
from orchestrator.planning.planner import choose
from orchestrator.planning.prediction import Terms
from orchestrator.settings import StackConfig
from tests.chance import examples
from tests.orchestrator.planning.test_planner import FLUX

GB = 10**9
CARD = Hardware((Card(0, "H200", 17 * GB, rate_of("H200")),), 64 * GB)
WORK = choose(StackConfig(model="m"), FLUX, CARD, Terms()).prediction.work
WEIGHTS = {stage.stage: stage.weights for stage in FLUX.stages}


def test_all_is_locked_where_it_fits() -> None:
    assert locked_by_stage(FLUX, WORK, sum(WEIGHTS.values()) + RESERVE) is None
    assert told(FLUX, WORK, 64 * GB) == ""
    assert locked_bytes(None, "denoise", WORK) is None


def test_what_is_copied_in_every_step_stays_before_what_a_new_prompt_takes() -> None:
    (denoise,) = [work for work in WORK if work.post.stage == "denoise"]
    often, once = in_steps(denoise), in_jobs(FLUX, WORK)
    assert once > FLUX.stage("denoise").once > 0  # the latter is run ahead, and some is lent meanwhile
    locked = locked_by_stage(FLUX, WORK, RESERVE + often + WEIGHTS["vae"] + GB)
    assert locked == {"vae": WEIGHTS["vae"], "denoise": often + GB, "text": 0}
    assert f"{(once - GB) / 1e9:.1f} GB for a job" in told(FLUX, WORK, RESERVE + sum(locked.values()))
    locked = locked_by_stage(FLUX, WORK, RESERVE + often + once + WEIGHTS["vae"] + GB)
    assert locked == {"vae": WEIGHTS["vae"], "denoise": often + once, "text": GB}
    assert f"{(WEIGHTS['text'] - GB) / 1e9:.1f} GB for a new prompt" in told(FLUX, WORK, RESERVE + sum(locked.values()))
    assert [locked_bytes(locked, "text", WORK), locked_bytes(locked, "text", [*WORK, *WORK])] == [GB, GB]
    (text,) = [work for work in WORK if work.post.stage == "text"]
    assert locked_bytes(locked, "text", [*WORK, replace(text, streamed=5.0)]) == GB // 2
    enough = RESERVE + often + once + WEIGHTS["vae"] + WEIGHTS["text"]
    assert "read from the disk at each start" in told(FLUX, WORK, enough)


def test_what_a_cpu_works_with_stays_in_memory() -> None:
    (text,) = [work for work in WORK if work.post.stage == "text"]
    on_cpu = [replace(work, post=replace(work.post, gpus=())) if work is text else work for work in WORK]
    memory = RESERVE + sum(WEIGHTS.values())
    assert locked_by_stage(FLUX, on_cpu, memory) is None
    locked = locked_by_stage(FLUX, on_cpu, memory - GB)
    assert locked is not None
    assert sum(locked.values()) <= WEIGHTS["denoise"] + WEIGHTS["vae"] - GB


@given(memory=st.integers(0, 60 * GB))
@examples(100)
def test_no_more_is_locked_than_there_is(memory: int) -> None:
    locked = locked_by_stage(FLUX, WORK, memory)
    if locked is None:
        assert memory >= sum(WEIGHTS.values()) + RESERVE
        return
    assert sum(locked.values()) <= max(0, memory - RESERVE)
    assert all(0 <= size <= WEIGHTS[stage] for stage, size in locked.items())


@pytest.mark.parametrize(("limit", "left"), [("max", 0), ("1000", 1000 - 700 + 300), ("500", 100), ("100", 1)])
def test_a_container_may_have_less_than_the_machine(limit: str, left: int, tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 200\nactive_file 100\n")
    assert free_of_group(tmp_path) == left
    assert free_of_group(tmp_path / "none") == 0
    assert free_memory() > 0
