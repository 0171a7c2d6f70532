"""The text stage: the pipeline's own call up to what another stage has to do; its encoders' results are recorded."""

import contextlib

import torch

from protocol.job import Recipe
from protocol.tensors import Tensor
from workers.errors import StageError
from workers.models.loading import Loaded
from workers.replay.boundaries import Stopped
from workers.replay.call_record import CallRecord
from workers.stages.checkpoint import ended_of
from workers.stages.contract import Outcome, Report
from workers.stages.pipeline_call import arguments_of, new_run, until_stop


class TextStage:
    def __init__(self, loaded: Loaded, device: torch.device) -> None:
        self.loaded, self.device = loaded, device
        self.residencies = tuple(loaded.residencies.values())

    def run(self, recipe: Recipe, tensors: tuple[Tensor, ...], report: Report) -> Outcome:
        """Return the record of the stages so far, with the results of this one's encoders."""
        report(0, 1)
        record = CallRecord.unpack(tensors)
        with contextlib.ExitStack() as stack:
            for residency in self.residencies:
                stack.enter_context(residency.job(None))
            pipeline = self.loaded.pipeline_for(recipe)
            # An encoder may be called once more in the middle; what was denoised before then is stood in for.
            run = new_run("text", record, self.device, recipe, goes_on=bool(record.forwards))
            stopped = until_stop(pipeline, run, arguments_of(pipeline, recipe, tensors))
        if not isinstance(stopped, Stopped):
            raise StageError(f"{type(pipeline).__name__} came to its end without a denoiser")
        left = [*record.pack(), *ended_of(tensors)] if record.calls else []
        return Outcome(left, stopped.owner, wants=stopped.label, calls=len(record.calls))
