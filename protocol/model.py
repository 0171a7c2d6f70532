"""The description of a model: found by the describer, used by the orchestrator to judge requests."""

from protocol.data import Data, Positive


class ModelDescription(Data):
    """The inputs that a model takes, and its defaults, read from its configuration without weights."""

    model: str  # as it was given: a folder or a hub repo id
    revision: str
    pipeline: str  # class name in diffusers
    size_multiple: Positive  # pixels
    width: Positive  # default, pixels
    height: Positive
    max_pixels: Positive
    steps: Positive
    guidance: float | None  # default; None where the denoiser takes none
    cfg_scale: float | None  # default; None where the pipeline has no true CFG
    negative_prompt: bool
    max_sequence_length: int | None  # default; None where the pipeline has no such argument
    max_sequence_limit: Positive  # tokens that fit a prompt at most
    demo: bool = False
