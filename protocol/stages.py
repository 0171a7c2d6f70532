"""The stages that a job may visit, as data: what each owns, how far it may run ahead, and what its visits leave.

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

    components: tuple[str, ...]  # how names of the pipeline's components begin that it owns
    ahead: int  # jobs nearer to their end that may wait, before no more of its tasks are started
    distance: int  # visits from here to the end of a job, this one included, where no result has told
    leaves: Literal["text", "latents"]  # the kind of artifact that a visit leaves, but for a job's last: its pictures
    resumes: bool = False  # its tasks make checkpoints, from which another worker goes on


TRAITS: Mapping[Stage, StageTraits] = {
    # Finished embeddings (4 MB each for FLUX.1) must not pile up on disk while the denoiser works through them.
    "text": StageTraits(("text_encoder", "tokenizer", "text_processor", "processor"), 64, 3, "text"),
    "denoise": StageTraits(("transformer", "unet", "prior", "decoder"), 256, 2, "latents", resumes=True),
    "vae": StageTraits(("vae", "vqvae", "movq"), 256, 1, "latents"),
}
USUAL_NEXT: Mapping[Stage, Stage | None] = {"text": "denoise", "denoise": "vae", "vae": None}  # from prompt to picture
USUAL_BEFORE: Mapping[Stage, Stage] = {following: stage for stage, following in USUAL_NEXT.items() if following}
