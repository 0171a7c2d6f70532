"""The text stage: the pipeline's own call up to what another stage has to do; its encoders' results are recorded.

Where an encoder's weights are streamed, the prompts of jobs that come next are encoded along with a job's, block by
block in turns, so that the weights pass once for all. What that gives is kept until those jobs come.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from protocol.job import Recipe
from protocol.settings import Settings
from protocol.tensors import Tensor
from workers.errors import StageError
from workers.models.loading import Loaded
from workers.replay.boundaries import Stopped
from workers.replay.call_record import CallRecord
from workers.stages.checkpoint import ended_of
from workers.stages.contract import Outcome, Report
from workers.stages.pipeline_call import arguments_of, new_run, until_stop
from workers.weights.lockstep import Lockstep

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
            self._loaded += [self.loaded.another() for _ in range(1 + len(ahead) - len(self._loaded))]
            works = [
                functools.partial(self._encode, loaded, one, tensors)
                for loaded, one in zip(self._loaded, (recipe, *ahead), strict=False)
            ]
            found = self._lockstep.try_to_run(works, rings) if ahead else None
            if found is None:
                return works[0]()
            outcome, others = found
            made_ahead = zip(ahead, others, strict=True)
            self._made = {one: replace(other, alone=False) for one, other in made_ahead if other}
            return replace(outcome, alone=False)

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

    def _encode(self, loaded: Loaded, recipe: Recipe, tensors: tuple[Tensor, ...]) -> Outcome:
        record = CallRecord.unpack(tensors)
        pipeline = loaded.pipeline_for(recipe)
        # An encoder may be called once more in the middle; what was denoised before then is stood in for.
        run = new_run("text", record, self.device, recipe, goes_on=bool(record.forwards))
        stopped = until_stop(pipeline, run, arguments_of(pipeline, recipe, tensors))
        if not isinstance(stopped, Stopped):
            raise StageError(f"{type(pipeline).__name__} came to its end without a denoiser")
        left = [*record.pack(), *ended_of(tensors)] if record.calls else []
        return Outcome(left, stopped.owner, wants=stopped.label, calls=len(record.calls))


def random_states(device: torch.device) -> list[torch.Tensor]:
    """Return the states of torch's own generators."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
