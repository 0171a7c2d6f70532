"""The variables that a loop carries from one step to the next, told from its code."""

import inspect
from collections.abc import Callable
from types import FrameType
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from workers.stages.loop_state import LoopState, carried_in, loop_state

Call = Callable[..., Any]


def simple(self: Any, steps: int, callback_on_step_end: Call, prompt_embeds: Any = 0) -> Any:
    latents = 0
    for i in range(steps):
        noise = prompt_embeds + i
        latents = self.scheduler.step(noise, latents)
        outputs = callback_on_step_end(self, i, i, {})
        latents = outputs.pop("latents", latents)
        prompt_embeds = outputs.pop("prompt_embeds", prompt_embeds)
    return latents


def with_more(self: Any, steps: int, callback_on_step_end: Call) -> Any:
    latents = old = count = 0
    total, solver = 1, FlowMatchEulerDiscreteScheduler()
    for section in range(2):
        for i in range(steps):
            if i > 0:
                fresh = 1
            latents, old = solver.step(latents, old)
            count += 1
            seen = [x for x in range(latents) if x]
            callback_on_step_end(self, i, seen, {"fresh": fresh})
        total += section
    return latents, total, count


def of_schedulers_made_on_the_way(self: Any, steps: int, callback: Call) -> None:
    for i in range(steps):
        solver = self.solvers[i]
        solver.step(i)
        callback(i)


def without_callback(self: Any) -> None:
    for _ in range(2):
        self.scheduler.step()


def test_what_is_read_before_it_is_assigned_is_carried_along() -> None:
    found = carried_in(simple.__code__)
    assert found is not None
    assert found.values == {"latents"}
    assert not found.schedulers
    found = carried_in(with_more.__code__)
    assert found is not None
    assert found.values == {"latents", "old", "count", "fresh"}
    assert found.schedulers == {"solver"}


def test_what_cannot_be_told_is_not() -> None:
    assert carried_in(of_schedulers_made_on_the_way.__code__) is None
    assert carried_in(without_callback.__code__) is None


def test_values_and_schedulers_are_those_of_the_frame() -> None:
    found: list[LoopState | None] = []

    def see(*_: object) -> dict[str, Any]:
        frame = inspect.currentframe()
        assert isinstance(frame, FrameType)
        assert frame.f_back is not None
        found.append(loop_state(frame.f_back))
        return {}

    class Pipeline:
        class scheduler:
            @staticmethod
            def step(noise: int, latents: int) -> int:
                return latents + 5

    simple(Pipeline, 2, see)
    assert [state and state.values for state in found] == [{"latents": 5}, {"latents": 10}]
