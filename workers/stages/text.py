"""The text stage: the pipeline's own call up to what another stage has to do; its encoders' results are recorded.

Where an encoder's weights are streamed, a job's negative prompt, and the prompts of jobs that come next, are encoded
along with its prompt, block by block in turns, so that the weights pass once for all. What is for jobs to come is kept
until then; what is for this job's own later calls is taken where those have the arguments that were foreseen.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from protocol.job import Recipe
from protocol.settings import Settings
from protocol.tensors import Tensor
from workers.errors import StageError
from workers.models.loading import Loaded
from workers.replay.boundaries import MadeCall, Stopped
from workers.replay.call_record import Call as RecordedCall
from workers.replay.call_record import CallRecord
from workers.stages.checkpoint import ended_of
from workers.stages.contract import Outcome, Report
from workers.stages.pipeline_call import arguments_of, new_run, until_stop
from workers.weights.forward_trace import Call
from workers.weights.lockstep import Lockstep, differing
from workers.weights.streaming import Ring

NO_CALL = MadeCall("", (), {}, None)
MOST_RUNS = 4  # of an encoder for a job: one that generates runs for each token, and keeps what it has read


class TextStage:
    def __init__(self, loaded: Loaded, device: torch.device) -> None:
        self.loaded, self.device = loaded, device
        self.residencies = tuple(loaded.residencies.values())
        self.ahead: Sequence[Recipe] = ()  # of jobs that come next, and bring nothing but a prompt
        self._blocks = [block for residency in self.residencies for block in residency.row_modules]
        self._lockstep = Lockstep(self._blocks, device)
        self._loaded = [loaded]  # the same models in a pipeline for each prompt at once
        self._made: dict[Recipe, Outcome] = {}  # ahead
        self._go_along: dict[Settings, bool] = {}  # whether prompts can be encoded together, as a job has shown it
        self._calls: dict[Hashable, Sequence[RecordedCall]] = {}  # of jobs of a kind: zeros for the results of each
        self._unforeseen: set[Hashable] = set()  # kinds of jobs whose calls were not those that were foreseen

    def run(self, recipe: Recipe, tensors: tuple[Tensor, ...], report: Report) -> Outcome:
        """Return the record of the stages so far, with the results of this one's encoders."""
        report(0, 1)
        ahead, self.ahead = self.ahead, ()
        if not tensors and (made := self._made.pop(recipe, None)):
            return made
        with contextlib.ExitStack() as stack:
            if self.loaded.loras:
                stack.enter_context(self.loaded.loras.job([lora for lora in recipe.loras if lora.encoders]))
            for residency in self.residencies:
                stack.enter_context(residency.job(None))
            rings = [residency.ring for residency in self.residencies if residency.ring]
            if recipe.settings not in self._go_along:
                with self._watched(recipe.settings):
                    return self._encode(self.loaded, recipe, tensors)
            if not rings or tensors or not self._go_along[recipe.settings]:
                return self._encode(self.loaded, recipe, tensors)
            ahead = [one for one in ahead if (one.settings, one.loras) == (recipe.settings, recipe.loras)]
            return self._along(recipe, ahead, rings)

    def _along(self, recipe: Recipe, ahead: Sequence[Recipe], rings: Sequence[Ring]) -> Outcome:
        """Encode all prompts of a job and of those `ahead` in one pass of the weights, as far as they are foreseen."""
        jobs = [recipe, *ahead]
        lanes = [(job, number) for job in jobs for number in range(max(1, len(self._calls.get(kind_of(job), ()))))]
        if len(lanes) == 1:
            return self._encode(self.loaded, recipe, ())
        self._loaded += [self.loaded.another() for _ in range(len(lanes) - len(self._loaded))]
        works = [
            functools.partial(self._call, loaded, job, number)
            for loaded, (job, number) in zip(self._loaded, lanes, strict=False)
        ]
        if (found := self._lockstep.try_to_run(works, rings)) is None:
            return self._encode(self.loaded, recipe, ())
        calls: dict[Recipe, list[MadeCall | None]] = {job: [] for job in jobs}
        for (job, _), made in zip(lanes, (found[0], *found[1]), strict=True):
            calls[job].append(made)
        complete = {job: [one for one in made if one] for job, made in calls.items() if all(made)}
        self._made = {
            job: replace(self._encode(self.loaded, job, (), complete[job]), alone=False)
            for job in ahead if job in complete
        }  # fmt: skip
        outcome = self._encode(self.loaded, recipe, (), complete.get(recipe, ()))
        return replace(outcome, alone=False) if ahead else outcome

    def _call(self, loaded: Loaded, recipe: Recipe, number: int) -> MadeCall:
        """Make one of a job's calls, with zeros for the results of those before it; one of no name if there is none."""
        record = CallRecord(calls=[*self._calls.get(kind_of(recipe), ())[:number]])
        run = new_run("text", record, self.device, recipe, most=1)
        pipeline = loaded.pipeline_for(recipe)
        until_stop(pipeline, run, arguments_of(pipeline, recipe))
        return run.made[0] if run.made else NO_CALL

    @contextlib.contextmanager
    def _watched(self, settings: Settings) -> Iterator[None]:
        """See whether prompts can go together: their encoders run a few times each, and draw no random numbers."""
        runs: Counter[torch.nn.Module] = Counter()
        hooks = [block.register_forward_pre_hook(lambda block, _: runs.update([block])) for block in self._blocks]
        before = random_states(self.device)
        try:
            yield
            same = all(map(torch.equal, before, random_states(self.device)))
            few = max(runs.values(), default=0) <= MOST_RUNS
            self._go_along[settings] = same and few
        finally:
            for hook in hooks:
                hook.remove()

    def _encode(
        self, loaded: Loaded, recipe: Recipe, tensors: tuple[Tensor, ...], made: Sequence[MadeCall] = ()
    ) -> Outcome:
        """Make a job's calls, but for those that were made with the same arguments."""
        ahead = MadeAhead(made) if made else None
        record = CallRecord.unpack(tensors)
        pipeline = loaded.pipeline_for(recipe)
        # An encoder may be called once more in the middle; what was denoised before then is stood in for.
        run = new_run("text", record, self.device, recipe, goes_on=bool(record.forwards), foreseen=ahead)
        stopped = until_stop(pipeline, run, arguments_of(pipeline, recipe, tensors))
        if not isinstance(stopped, Stopped):
            raise StageError(f"{type(pipeline).__name__} came to its end without a denoiser")
        if not tensors and kind_of(recipe) not in self._unforeseen:
            self._calls[kind_of(recipe)] = record.shapes_only().calls
        if ahead and ahead.missed:  # what comes of one call is given to another, say: they are made one by one
            self._unforeseen.add(kind_of(recipe))
            self._calls.pop(kind_of(recipe), None)
        left = [*record.pack(), *ended_of(tensors)] if record.calls else []
        return Outcome(left, stopped.owner, wants=stopped.label, calls=len(record.calls))


def kind_of(recipe: Recipe) -> Hashable:
    """Return what jobs have in common that encode as many prompts."""
    return recipe.settings, recipe.negative_prompt is None, recipe.cfg_scale, recipe.num_images


class MadeAhead:
    """A job's calls that were made ahead, in their order: each is taken where it has the same arguments."""

    def __init__(self, made: Sequence[MadeCall]) -> None:
        self._made, self.missed = made, False

    def __call__(self, place: int, label: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> MadeCall | None:
        if place >= len(self._made):
            return None
        one = self._made[place]
        if one.label == label and differing(Call(args, kwargs), Call(one.args, one.kwargs)) == set():
            return one
        self.missed = True
        return None


def random_states(device: torch.device) -> list[torch.Tensor]:
    """Return the states of torch's own generators."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
