"""The vae stage: pictures into latents, as the pipeline's own call asks for them, and its end, from decode on."""

import logging
from collections import Counter
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import torch

from protocol.job import Recipe
from protocol.tensors import Tensor
from workers.errors import StageError, let_go, release_memory
from workers.models.loading import Loaded
from workers.replay.boundaries import Stopped
from workers.replay.call_record import CallRecord, Unprepared
from workers.stages.checkpoint import ended_of
from workers.stages.contract import Outcome, Report
from workers.stages.denoise import shape_of
from workers.stages.pipeline_call import arguments_of, new_run, pictures_of, until_stop
from workers.weights.cuda_graphs import lease_of

log = logging.getLogger(__name__)

BLACKENED = "the model's safety checker has taken a picture away; another prompt or seed may help"
TRIES = 2  # to work without tiles, in as much memory as was too little before
ONLY_TILED = ("AutoencoderKLAllegro",)  # VAEs that can work in no other way
IN_TILES = "decoded in tiles, for want of GPU memory; where tiles meet, the picture differs a little from a whole one"


class VaeStage:
    def __init__(self, loaded: Loaded, device: torch.device) -> None:
        self.loaded, self.device = loaded, device
        self.residencies = tuple(loaded.residencies.values())
        names = ("vae", "vqvae", "movq")
        self.vae: Any = next((vae for name in names if (vae := getattr(loaded.pipeline, name, None)) is not None), None)
        self.may_tile = True  # where memory is short
        self._too_little: Counter[Hashable] = Counter()  # times that a job of a shape found too little, by what it had
        self.only_tiled = type(self.vae).__name__ in ONLY_TILED
        if self.vae is not None and self.only_tiled:
            self.vae.enable_tiling()

    def run(self, recipe: Recipe, tensors: tuple[Tensor, ...], report: Report) -> Outcome:
        """Return the job's pictures in parts; or, where nothing is to be decoded yet, the record."""
        report(0, 1)
        able = self.may_tile and hasattr(self.vae, "enable_tiling") and not self.only_tiled
        room = lease_of(self.device) if self.device.type == "cuda" else 0.0
        tried = shape_of(recipe), room
        if not able or self._too_little[tried] < TRIES:
            try:
                return self.visit(recipe, tensors)
            except torch.OutOfMemoryError as error:
                if not able:
                    raise
                self._too_little[tried] += 1
                let_go(error)
            release_memory()
        log.warning("too little memory; decoding in tiles")
        self.vae.enable_tiling()
        try:
            outcome = self.visit(recipe, tensors)
        finally:
            self.vae.disable_tiling()
        return replace(outcome, warnings=(*outcome.warnings, IN_TILES))

    def visit(self, recipe: Recipe, tensors: tuple[Tensor, ...]) -> Outcome:
        record = CallRecord.unpack(tensors)
        if record.goes_on or (record.forwards and not record.decodes):
            return self.decode_and_go_on(recipe, tensors, record)
        try:
            return self.finish(recipe, tensors, record)
        except Unprepared:
            if not record.unsure:
                raise
            return self.decode_and_go_on(recipe, tensors, CallRecord.unpack(tensors))

    def finish(self, recipe: Recipe, tensors: tuple[Tensor, ...], record: CallRecord) -> Outcome:
        """Come to the end with what was put aside to be decoded; without that, to what is another stage's."""
        pipeline = self.loaded.pipeline_for(recipe)
        arguments = arguments_of(pipeline, recipe, tensors)
        run = new_run("vae", record, self.device, recipe, finishes=bool(record.decodes))
        try:
            result = until_stop(pipeline, run, arguments)
        except UnboundLocalError:  # the loop's own variables, of a pipeline that can't leave it out
            run = new_run("vae", record, self.device, recipe, finishes=bool(record.decodes), skips=False)
            result = until_stop(pipeline, run, arguments)
        if not isinstance(result, Stopped):
            flagged = any(getattr(result, "nsfw_content_detected", None) or ())
            return Outcome(pictures_of(result, pipeline), warnings=(BLACKENED,) if flagged else ())
        if result.owner == "vae":
            raise StageError(f"{type(pipeline).__name__} stopped in the vae stage at {result.label}")
        return Outcome(record.pack(), next=result.owner, wants=result.label, calls=len(record.calls))

    def decode_and_go_on(self, recipe: Recipe, tensors: tuple[Tensor, ...], record: CallRecord) -> Outcome:
        """Record what was put aside to be decoded, and go on with that to what is another stage's."""
        pipeline = self.loaded.pipeline_for(recipe)
        run = new_run("vae", record, self.device, recipe, goes_on=True)
        result = until_stop(pipeline, run, arguments_of(pipeline, recipe, tensors))
        if not isinstance(result, Stopped) or result.owner == "vae":
            raise StageError(f"{type(pipeline).__name__} denoises no further once it has decoded")
        record.decodes, record.goes_on, record.unsure = [], False, False
        left = [*record.pack(), *ended_of(tensors)]
        return Outcome(left, next=result.owner, wants=result.label, calls=len(record.calls))
