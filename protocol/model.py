"""What a model takes, as the describer finds it and the orchestrator judges requests by it."""

from protocol.data import Data, Positive


class ModelDescription(Data):
    """What a model takes, read from its configuration by a worker; the orchestrator judges requests by it."""

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
