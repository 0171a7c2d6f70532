"""The profile of a model, found without its weights: bytes and FLOP, by stage and by block."""

from typing import Annotated

from pydantic import Field

from protocol.data import Data
from protocol.job import Recipe
from protocol.model import ModelDescription
from protocol.stages import Stage

Bytes = Annotated[int, Field(ge=0)]
Flop = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class BlockProfile(Data):
    """The profile of a module of a row that is run in order."""

    name: str
    bytes: Bytes  # of all its weights
    once: Bytes  # of them, those that act on the timestep alone, and are run once a job where memory is short
    flop: Flop  # of one run


class StageProfile(Data):
    """The bytes and FLOP of a stage for one job, in the model's dtype."""

    stage: Stage
    components: tuple[tuple[str, Bytes], ...]  # those with weights, and their bytes
    least: Bytes  # of weights, where as much of them as can be is streamed
    largest: Bytes  # of its intermediate results
    peak: Bytes = 0  # of all that live at once; 0 where that was not found
    flop: Flop  # of one pass; through the denoiser a step has one, or two with true CFG
    passes: Annotated[int, Field(ge=1)]  # a job
    together: Annotated[int, Field(ge=1)] = 1  # passes of a step that differ in their prompts alone
    blocks: tuple[BlockProfile, ...]  # of its largest component, in the order in which they run
    loose: Bytes  # of its buffer for what is run once a job
    after: Bytes  # of weights of its parts that come after the blocks
    heads: Annotated[int, Field(ge=0)]  # of its attention, 0 where that isn't told
    quantized: bool = False  # a library quantized some of its weights before they were saved

    @property
    def weights(self) -> int:
        return sum(size for _, size in self.components)

    @property
    def once(self) -> int:
        """Bytes of weights that are run once a job where memory is short."""
        return sum(block.once for block in self.blocks)


class ModelProfile(Data):
    """The profiles of a model's stages for one job, `recipe`."""

    model: ModelDescription
    recipe: Recipe
    stages: tuple[StageProfile, ...]
    guessed: str = ""  # why FLOP and intermediate results are guesses; empty where they were found

    def stage(self, stage: Stage) -> StageProfile:
        return next(figures for figures in self.stages if figures.stage == stage)
