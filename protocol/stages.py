"""The stages that a job may visit, as data: what each owns, and how far it may run ahead.

No order is fixed here: a visit's result names the next stage, and a job's records are its visits so far. What is said
of distances is where a job starts from, until results know better.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Stage = Literal["text", "denoise", "vae"]
STAGES: tuple[Stage, ...] = ("text", "denoise", "vae")
FIRST: Stage = "text"  # where a job begins


@dataclass(frozen=True, slots=True)
class StageTraits:
    """The facts of a stage beside its work."""

    # How names of the pipeline's components with weights begin that it owns; denoise owns what no other does.
    components: tuple[str, ...]
    ahead: int  # jobs nearer to their end that may wait, before no more of its tasks are started
    distance: int  # visits from here to the end of a job, this one included, where no result has told
    resumes: bool = False  # its tasks make checkpoints, from which another worker goes on
    lends: bool = False  # GPU memory, between two of its steps
    momentary: bool = False  # its tasks take a moment, and GPU memory that another stage may lend meanwhile


TEXT_COMPONENTS = (
    "text_encoder", "text_model", "image_encoder", "mllm", "vision_language_encoder", "prompt_enhancer",
    "prompt_upsampler", "connectors", "prior_text_encoder", "prior_image_encoder", "depth_estimator",
    "image_normalizer", "bert", "pe",
)  # fmt: skip
VAE_COMPONENTS = (
    "vae", "vqvae", "movq", "audio_vae", "vocoder", "condition_image_encoder", "safety_checker", "image_upscaler",
)  # fmt: skip
# Components without weights, which every stage has.
SHARED_COMPONENTS = (
    "scheduler", "tokenizer", "feature_extractor", "processor", "text_processor", "image_processor", "guider",
    "prior_tokenizer", "prior_scheduler", "prior_image_processor", "pe_tokenizer", "prompt_upsampler_processor",
)  # fmt: skip
TRAITS: Mapping[Stage, StageTraits] = {
    # Finished embeddings (4 MB each for FLUX.1) must not pile up on disk while the denoiser works through them.
    "text": StageTraits(TEXT_COMPONENTS, 64, 3, momentary=True),
    "denoise": StageTraits((), 256, 2, resumes=True, lends=True),
    "vae": StageTraits(VAE_COMPONENTS, 256, 1, momentary=True),
}
USUAL_NEXT: Mapping[Stage, Stage | None] = {"text": "denoise", "denoise": "vae", "vae": None}  # from prompt to picture
