"""SDXL with a refiner: the model makes the first steps of a picture, a second denoiser the last ones.

It is what diffusers' own guide calls an ensemble of expert denoisers: `denoising_end` of the one pipeline is
`denoising_start` of the other, with latents between. Here both are one pipeline, with two denoisers and two schedulers.
"""

import functools
import inspect
import json
from typing import Any

from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from protocol.errors import ModelMissing
from workers.models.source import REFINER, Source
from workers.models.weight_files import read_json
from workers.replay.boundaries import install_steps
from workers.replay.placeholder import where_another_is

FIRST_ALONE = ("height", "width", "latents")  # arguments of the first steps: the last ones begin from latents
NOT_GIVEN = ("timesteps", "sigmas", "denoising_end", "output_type", "ip_adapter_image", "ip_adapter_image_embeds")
TEXTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
SETTINGS = ("requires_aesthetics_score", "force_zeros_for_empty_prompt")  # of a refiner's own pipeline
EMBEDDINGS = (
    "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds",
)  # fmt: skip


class RefinedPipeline(StableDiffusionXLPipeline):  # type: ignore[misc]
    """`unet_2` and `scheduler_2` are the refiner's; what else it needs is the model's own."""

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        unet_2: UNet2DConditionModel,
        scheduler_2: KarrasDiffusionSchedulers,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        force_zeros_for_empty_prompt: bool = True,
        refiner_settings: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2, unet, scheduler, image_encoder,
            feature_extractor, force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
        )  # fmt: skip
        self.register_modules(unet_2=unet_2, scheduler_2=scheduler_2)
        self.register_to_config(refiner_settings=refiner_settings or {})

    def encode_for_refiner(self, **given: Any) -> tuple[Any, ...]:
        """Return what the refiner's own pipeline makes of prompts, in the order of EMBEDDINGS."""
        found: tuple[Any, ...] = self._refiner().encode_prompt(**given)
        return found

    def _refiner(self) -> StableDiffusionXLImg2ImgPipeline:
        """Return the pipeline of the last steps."""
        made = where_another_is(StableDiffusionXLImg2ImgPipeline, self)(
            vae=self.vae, text_encoder=None, text_encoder_2=self.text_encoder_2, tokenizer=None,
            tokenizer_2=self.tokenizer_2, unet=self.unet_2, scheduler=self.scheduler_2, **self.config.refiner_settings,
        )  # fmt: skip
        install_steps(made)
        made.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        return made

    @functools.wraps(StableDiffusionXLPipeline.__call__, assigned=("__doc__",))
    def __call__(
        self,
        refine_from: float = 0.8,
        aesthetic_score: float = 6.0,
        negative_aesthetic_score: float = 2.5,
        **given: Any,
    ) -> Any:
        """Return pictures whose denoising from `refine_from` on, a share of it, is the refiner's."""
        if not 0 < refine_from < 1:
            raise ValueError(f"refine_from is {refine_from:g}; it should be between 0 and 1")
        refiner = self._refiner()
        known = inspect.signature(refiner.__call__).parameters
        shared = {name: value for name, value in given.items() if name in known and name not in FIRST_ALONE}
        texts = {name: shared.pop(name, None) for name in TEXTS}
        scale = shared.get("guidance_scale", known["guidance_scale"].default)
        embeddings = self.encode_for_refiner(
            **texts, device=self._execution_device, clip_skip=shared.get("clip_skip"),
            do_classifier_free_guidance=scale > 1 and self.unet_2.config.time_cond_proj_dim is None,
        )  # fmt: skip
        latents = super().__call__(**given, denoising_end=refine_from, output_type="latent").images
        shared |= zip(EMBEDDINGS, embeddings, strict=True)
        return refiner(
            image=latents, denoising_start=refine_from, aesthetic_score=aesthetic_score,
            negative_aesthetic_score=negative_aesthetic_score, **shared,
        )  # fmt: skip


def _describe(call: Any) -> None:
    """Let a call have the parameters of the first steps' that both may have, and those of the refiner's."""
    first = inspect.signature(StableDiffusionXLPipeline.__call__).parameters
    own = inspect.signature(call, follow_wrapped=False).parameters
    kept = [p for n, p in first.items() if n not in NOT_GIVEN and p.kind is not p.VAR_KEYWORD]
    more = [p.replace(kind=p.KEYWORD_ONLY) for n, p in own.items() if n not in first and p.kind is not p.VAR_KEYWORD]
    call.__signature__ = inspect.Signature([*kept, *more])
    call.__annotations__ = {p.name: p.annotation for p in (*kept, *more) if p.annotation is not p.empty}


_describe(RefinedPipeline.__call__)


def refined(source: Source, cls: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    """Return the pipeline of a model and the refiner beside it; ModelMissing where they don't go together."""
    given = str(source.added[REFINER].parent)
    if cls is not StableDiffusionXLPipeline:
        raise ModelMissing(f"{source.model!r} is a {cls.__name__}; refiners are for SDXL.", "Leave --refiner out.")
    encoder = read_json(source.folder_of("text_encoder_2") / "config.json")
    taken = read_json(source.folder_of(REFINER) / "config.json").get("cross_attention_dim")
    if taken != encoder.get("hidden_size"):
        raise ModelMissing(
            f"{given!r} is for another model: its cross_attention_dim is {taken}, and the second text encoder of "
            f"{source.model!r} has {encoder.get('hidden_size')}.",
            "Choose a refiner for this model.",
        )
    return RefinedPipeline


def refiner_settings(source: Source) -> dict[str, Any]:
    """Return the plain settings of the refiner's own pipeline."""
    raw = json.loads((source.added[REFINER].parent / "model_index.json").read_text())
    return {name: raw[name] for name in SETTINGS if isinstance(raw.get(name), bool)}
