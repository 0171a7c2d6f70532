"""The forwards of a step in lockstep: weights pass once for all, and results are those of one after the other."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from protocol.job import JobRequest
from protocol.recipe import resolve
from tests import tiny
from tests.workers.weights.test_residency import jobs
from tests.workers.worst_stream import worst_copy_stream
from workers.models import devices
from workers.models.description import describe
from workers.models.devices import Devices
from workers.models.loading import load
from workers.models.source import read
from workers.stages.contract import unheard
from workers.stages.denoise import DenoiseStage
from workers.stages.text import TextStage
from workers.weights.copy_stream import Copies, HostCopyStream, Mark
from workers.weights.lockstep import LANE, Lockstep, in_lockstep
from workers.weights.residency import Residency


class Denoiser(torch.nn.Module):
    """Some blocks, and something before and after them; notes what runs."""

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.after = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(blocks))
        self.ran: list[tuple[int, float]] = []  # (block, the prompt's first value)

    def forward(self, latents: torch.Tensor, prompt: torch.Tensor, scale: Any = None) -> tuple[torch.Tensor]:
        if prompt.isnan().any():
            raise ValueError("no prompt")
        x = self.before(latents + prompt)
        for number, block in enumerate(self.blocks):
            self.ran.append((number, prompt.flatten()[0].item()))
            x = torch.tanh(block(x))
        return (self.after(x),)


Guide = Callable[[Denoiser, torch.Tensor, int], torch.Tensor]
PROMPTS = [torch.full((1, 8), 0.1 * n) for n in range(4)]


def guided(count: int, prompts: Sequence[torch.Tensor] = PROMPTS) -> Guide:
    """A step of so many forwards, which differ in their prompts."""

    def step(denoiser: Denoiser, latents: torch.Tensor, number: int) -> torch.Tensor:
        return sum((denoiser(latents, prompt)[0] for prompt in prompts[:count]), torch.zeros(1))

    return step


def in_place(denoiser: Denoiser, latents: torch.Tensor, number: int) -> torch.Tensor:
    """A step that writes over what its second forward is to be given, between the two."""
    prompt = torch.zeros(1, 8)
    first = denoiser(latents, PROMPTS[1])[0].clone()
    prompt += number
    return first + denoiser(latents, prompt)[0]


def in_one_place(denoiser: Denoiser, latents: torch.Tensor, number: int) -> torch.Tensor:
    """A step like that, whose second forward is given the same tensor in every step."""
    if not number:
        KEPT.zero_()
    first = denoiser(latents, PROMPTS[1])[0].clone()
    KEPT.add_(1)
    return first + denoiser(latents, KEPT)[0]


KEPT = torch.zeros(1, 8)


def other_latents(denoiser: Denoiser, latents: torch.Tensor, number: int) -> torch.Tensor:
    return denoiser(latents, PROMPTS[0])[0] + denoiser(latents * 2, PROMPTS[1])[0]


def guided_at_times(denoiser: Denoiser, latents: torch.Tensor, number: int) -> torch.Tensor:
    return guided(1 if number == 3 else 2)(denoiser, latents, number)


def turned_round(denoiser: Denoiser, latents: torch.Tensor, number: int) -> torch.Tensor:
    return guided(2, PROMPTS[::-1] if number == 3 else PROMPTS)(denoiser, latents, number)


def run(step: Guide, denoiser: Denoiser, steps: int = 5) -> list[torch.Tensor]:
    latents = torch.linspace(-1, 1, 32).reshape(1, 4, 8)
    seen = []
    for number in range(steps):
        latents = latents + 0.1 * step(denoiser, latents, number)
        seen.append(latents.clone())
    return seen


GUIDES: dict[str, tuple[Guide, bool]] = {  # whether it runs in lockstep at all
    "none": (guided(1), False),
    "two": (guided(2), True),
    "three": (guided(3), True),
    "what is given is written over": (in_place, True),
    "one tensor is written over again and again": (in_one_place, True),
    "its second forward has other latents": (other_latents, False),
    "a step has one forward": (guided_at_times, True),
    "a step has its forwards the other way round": (turned_round, True),
}


@pytest.mark.parametrize("name", GUIDES)
@torch.no_grad()
def test_results_are_those_of_one_forward_after_the_other(name: str) -> None:
    step, together = GUIDES[name]
    wanted = run(step, Denoiser())
    denoiser, passes = Denoiser(), Counted()
    with in_lockstep(Lockstep(list(denoiser.blocks), torch.device("cpu")), denoiser, passes, lambda count: True):
        assert all(map(torch.equal, run(step, denoiser), wanted))
    assert bool(passes.count) == together


class Counted:
    """Counts the passes that are shared."""

    def __init__(self) -> None:
        self.count = 0

    def shared(self, last: Callable[[], bool]) -> Any:
        self.count += 1
        return torch.no_grad()


@torch.no_grad()
def test_forwards_take_turns_at_every_block() -> None:
    denoiser = Denoiser()
    with in_lockstep(Lockstep(list(denoiser.blocks), torch.device("cpu")), denoiser, Counted(), lambda count: True):
        run(guided(2), denoiser, 1)
        one_by_one, denoiser.ran = denoiser.ran, []
        assert [block for block, _ in one_by_one] == [0, 1, 2, 3] * 2
        latents = torch.rand(1, 4, 8)
        guided(2)(denoiser, latents, 1)
    assert [block for block, _ in denoiser.ran] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert sorted(denoiser.ran) == sorted(one_by_one)


@pytest.mark.parametrize("wrong", [0, 1])
@torch.no_grad()
def test_an_error_is_told_where_it_is_called_and_leaves_the_next_job_as_it_was(wrong: int) -> None:
    denoiser = Denoiser()
    lockstep = Lockstep(list(denoiser.blocks), torch.device("cpu"))
    wanted = run(guided(2), Denoiser())
    prompts = [prompt.clone() for prompt in PROMPTS[:2]]

    def step(denoiser: Denoiser, latents: torch.Tensor, number: int) -> torch.Tensor:
        if number == 3:
            prompts[wrong].fill_(float("nan"))
        return guided(2, prompts)(denoiser, latents, number)

    def in_turns() -> AbstractContextManager[None]:
        return in_lockstep(lockstep, denoiser, Counted(), lambda count: True)

    with in_turns(), pytest.raises(ValueError, match="no prompt"):
        run(step, denoiser)
    with in_turns():
        assert all(map(torch.equal, run(guided(2), denoiser), wanted))


@pytest.mark.parametrize("lane", [0, 1])
@torch.no_grad()
def test_without_memory_for_forwards_together_they_are_made_one_by_one(lane: int) -> None:
    wanted, denoiser, passes = run(guided(2), Denoiser()), Denoiser(), Counted()
    real = denoiser.blocks[2].forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        if LANE.get() == lane:
            raise torch.OutOfMemoryError("two do not fit")
        return real(x)

    denoiser.blocks[2].forward = forward
    with in_lockstep(Lockstep(list(denoiser.blocks), torch.device("cpu")), denoiser, passes, lambda count: True):
        assert all(map(torch.equal, run(guided(2), denoiser), wanted))
    assert passes.count == 1


def test_each_work_keeps_its_own_modes_and_leaves_those_of_its_thread() -> None:
    lockstep, seen = Lockstep([], torch.device("cpu")), list[tuple[str, bool, bool]]()

    def note(name: str) -> None:
        lockstep.pass_on()
        seen.append((name, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))

    def without_gradients() -> int:
        with torch.no_grad():
            note("no_grad")
        return 1

    def in_autocast() -> int:
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(3):
                note("autocast")
        return 2

    def plainly() -> int:
        for _ in range(3):
            note("plain")
        return 3

    assert lockstep.run([without_gradients, in_autocast, plainly], []) == (1, [2, 3])
    assert set(seen) == {("no_grad", False, False), ("autocast", True, True), ("plain", True, False)}
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


@torch.no_grad()
def test_an_argument_that_may_change_the_model_meanwhile_is_given_to_one_forward_alone() -> None:
    denoiser, passes = Denoiser(), Counted()

    def step(denoiser: Denoiser, latents: torch.Tensor, number: int) -> torch.Tensor:
        return sum((denoiser(latents, prompt, scale={"scale": 0.5})[0] for prompt in PROMPTS[:2]), torch.zeros(1))

    with in_lockstep(Lockstep(list(denoiser.blocks), torch.device("cpu")), denoiser, passes, lambda count: True):
        run(step, denoiser)
    assert not passes.count


class Counting(HostCopyStream):
    copied = 0

    def copy(self, copies: Copies, after: Mark) -> Mark:
        Counting.copied += sum(source.nbytes for _, source in copies)
        return super().copy(copies, after)


@pytest.mark.parametrize("worst", [False, True])
@torch.no_grad()
def test_streamed_weights_pass_once_a_step_and_are_there_for_each_forward(worst: bool) -> None:
    wanted = run(guided(2), Denoiser(12), 8)
    copied = []
    for in_steps in (False, True):
        denoiser = Denoiser(12)
        stream = worst_copy_stream if worst else lambda device, locks: Counting(device)
        residency = Residency("denoiser", denoiser, torch.device("cpu"), copy_stream=stream)
        residency.swap_in(int(residency.total_bytes * 0.6))
        Counting.copied = 0
        with residency.job(None, in_steps=in_steps):
            assert all(map(torch.equal, run(guided(2), denoiser, 8), wanted))
        copied.append(Counting.copied)
    if not worst:
        assert residency.plan
        streamed = sum(denoiser.get_parameter(name).nbytes for piece in residency.plan.pieces for name in piece)
        assert copied[0] - copied[1] == 7 * streamed  # in all steps but the first


@pytest.mark.parametrize(("model", "compiled"), [("flux", False), ("flux", True), ("chroma", False)])
def test_guided_jobs_have_equal_bits_where_modulation_runs_ahead_too(
    model: str, compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(devices.WORKSPACE, "denoise", 0)
    source = read("x", tiny.save(getattr(tiny, model)(depth=4), tmp_path), None)
    cpu, made = torch.device("cpu"), list[int]()
    wanted = jobs(DenoiseStage(load(source, "denoise", Devices(cpu), torch.float32), cpu), tmp_path, True)
    whole = load(source, "denoise", Devices(cpu, {0: 1 << 40}), torch.float32).residencies["transformer"]
    budget = {0: int(whole.total_bytes * 0.75)}
    loaded = load(source, "denoise", Devices(cpu, budget, copy_stream=worst_copy_stream), torch.float32)
    if compiled:
        loaded.residencies["transformer"].compile("eager")
    together = Lockstep.run

    def run(self: Lockstep, *args: Any) -> tuple[Any, list[Any]]:
        made.append(1)
        return together(self, *args)

    monkeypatch.setattr(Lockstep, "run", run)
    assert all(map(torch.equal, jobs(DenoiseStage(loaded, cpu), tmp_path, True), wanted))
    assert len(made) == 1 + 2 + 3  # the steps of three jobs but their first


@pytest.mark.parametrize("worst", [False, True])
def test_prompts_that_come_next_are_encoded_along_and_the_weights_pass_once(worst: bool, tmp_path: Path) -> None:
    source = read("x", tiny.save(tiny.flux(), tmp_path), None)
    cpu, model = torch.device("cpu"), describe(source)
    prompts = ["a red circle", "a blue square, much longer than all of the others", "a ring", "a star"]
    recipes = [
        resolve(JobRequest(prompt=p, steps=2, seed=n, width=32, height=32), model, "float32", None)
        for n, p in enumerate(prompts)
    ]
    alone = TextStage(load(source, "text", Devices(cpu), torch.float32), cpu)
    wanted = [alone.run(recipe, (), unheard) for recipe in recipes]
    stream = worst_copy_stream if worst else lambda device, locks: Counting(device)
    loaded = load(source, "text", Devices(cpu, {0: 1 << 40}, copy_stream=stream), torch.float32)
    encoder = loaded.residencies["text_encoder_2"]
    encoder.swap_in(encoder.least_bytes)
    assert encoder.state == "streamed"
    text = TextStage(loaded, cpu)
    copied = []
    for ahead in ((), (), recipes[1:]):
        text.ahead, Counting.copied = ahead, 0
        made = text.run(recipes[0], (), unheard)
        copied.append(Counting.copied)
        assert replace(made, alone=True) == wanted[0]
        assert made.alone == (not ahead)
    text.ahead, Counting.copied = (), 0
    for recipe, one in zip(recipes[1:3], wanted[1:3], strict=True):
        assert text.run(recipe, (), unheard) == replace(one, alone=False)
    assert not Counting.copied
    assert copied[1] == copied[2]
    assert text.run(recipes[1], (), unheard) == wanted[1]  # asked for again, it is encoded again
    assert worst or Counting.copied


@pytest.mark.parametrize("worst", [False, True])
def test_a_negative_prompt_is_encoded_in_the_same_pass_of_the_weights(worst: bool, tmp_path: Path) -> None:
    source = read("x", tiny.save(tiny.flux(), tmp_path), None)
    cpu, model = torch.device("cpu"), describe(source)

    def recipe(prompt: str, **given: Any) -> Any:
        request = JobRequest(prompt=prompt, steps=2, seed=1, width=32, height=32, **given)
        return resolve(request, model, "float32", None)

    guided = [recipe(p, negative_prompt="blurry", cfg_scale=2.0) for p in ("a ring", "a star", "a red circle, large")]
    plain = recipe("a blue star")
    alone = TextStage(load(source, "text", Devices(cpu), torch.float32), cpu)
    wanted = {one: alone.run(one, (), unheard) for one in (*guided, plain)}
    assert [wanted[one].calls for one in (guided[0], plain)] == [2, 1]
    stream = worst_copy_stream if worst else lambda device, locks: Counting(device)
    loaded = load(source, "text", Devices(cpu, {0: 1 << 40}, copy_stream=stream), torch.float32)
    loaded.residencies["text_encoder_2"].swap_in(loaded.residencies["text_encoder_2"].least_bytes)
    text = TextStage(loaded, cpu)
    copied = []
    text.run(plain, (), unheard)
    text.ahead = (guided[0],)  # of a kind that was not seen yet
    assert replace(text.run(plain, (), unheard), alone=True) == wanted[plain]
    text._made.clear()
    for one, ahead in ((plain, ()), (guided[0], ()), (plain, ()), (guided[1], ()), (guided[0], (plain, guided[2]))):
        text.ahead, Counting.copied = ahead, 0
        assert replace(text.run(one, (), unheard), alone=True) == wanted[one]
        copied.append(Counting.copied)
    text.ahead, Counting.copied = (), 0
    for one in (plain, guided[2]):
        assert replace(text.run(one, (), unheard), alone=True) == wanted[one]
    assert not Counting.copied
    assert worst or copied[0] > 0
    assert copied == [copied[0]] * 5


def test_a_call_that_was_foreseen_otherwise_is_made_as_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = read("x", tiny.save(tiny.flux(), tmp_path), None)
    cpu, model = torch.device("cpu"), describe(source)
    request = JobRequest(prompt="a ring", negative_prompt="blurry", cfg_scale=2.0, steps=2, seed=1, width=32, height=32)
    recipe = resolve(request, model, "float32", None)
    alone = TextStage(load(source, "text", Devices(cpu), torch.float32), cpu)
    wanted = alone.run(recipe, (), unheard)
    loaded = load(source, "text", Devices(cpu, {0: 1 << 40}), torch.float32)
    loaded.residencies["text_encoder_2"].swap_in(loaded.residencies["text_encoder_2"].least_bytes)
    text = TextStage(loaded, cpu)
    assert text.run(recipe, (), unheard) == wanted
    real = TextStage._call

    def otherwise(self: TextStage, loaded: Any, recipe: Any, number: int) -> Any:
        return real(self, loaded, recipe.model_copy(update={"negative_prompt": "sharp"}) if number else recipe, number)

    monkeypatch.setattr(TextStage, "_call", otherwise)
    assert text.run(recipe, (), unheard) == wanted
    monkeypatch.setattr(TextStage, "_call", None)  # and they are not foreseen again
    assert text.run(recipe, (), unheard) == wanted


def test_a_prompt_that_fails_among_others_fails_where_it_is_asked_for(tmp_path: Path) -> None:
    source = read("x", tiny.save(tiny.flux(), tmp_path), None)
    cpu, model = torch.device("cpu"), describe(source)
    good, bad, other = (
        resolve(JobRequest(prompt=p, steps=2, seed=1, width=32, height=32), model, "float32", None)
        for p in ("a", "b", "c")
    )
    loaded = load(source, "text", Devices(cpu, {0: 1 << 40}), torch.float32)
    loaded.residencies["text_encoder_2"].swap_in(loaded.residencies["text_encoder_2"].least_bytes)
    text = TextStage(loaded, cpu)
    wanted = [text.run(recipe, (), unheard) for recipe in (good, other)]
    bad = bad.model_copy(update={"max_sequence_length": 100_000})
    text.ahead = (bad, other)
    assert text.run(good, (), unheard).tensors == wanted[0].tensors
    text.ahead = ()
    with pytest.raises(ValueError, match="max_sequence_length"):
        text.run(bad, (), unheard)
    assert text.run(other, (), unheard).tensors == wanted[1].tensors
    text.ahead = (other,)
    with pytest.raises(ValueError, match="max_sequence_length"):
        text.run(bad, (), unheard)
    assert text.run(other, (), unheard) == wanted[1]


def test_an_encoder_that_draws_or_generates_encodes_one_prompt_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = read("x", tiny.save(tiny.flux(), tmp_path), None)
    cpu, model = torch.device("cpu"), describe(source)
    made = list[int]()
    together = Lockstep.run

    def run(self: Lockstep, works: Any, passes: Any) -> tuple[Any, list[Any]]:
        made.append(len(works))
        return together(self, works, passes)

    monkeypatch.setattr(Lockstep, "run", run)
    recipes = [
        resolve(JobRequest(prompt=p, steps=2, seed=1, width=32, height=32), model, "float32", None) for p in "abc"
    ]
    for draws in (False, True):
        loaded = load(source, "text", Devices(cpu, {0: 1 << 40}), torch.float32)
        encoder = loaded.residencies["text_encoder_2"]
        encoder.swap_in(encoder.least_bytes)
        if draws:
            encoder.module.register_forward_pre_hook(lambda *_: torch.rand(1) and None)
        text = TextStage(loaded, cpu)
        for recipe in recipes[:2]:
            text.ahead = recipes[2:]
            text.run(recipe, (), unheard)
        assert made == [2]
