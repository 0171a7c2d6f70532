"""Latents → pictures: `vae.decode` of exactly what the pipeline would have decoded, then its image processor."""

import logging

import torch

from protocol.job import Recipe
from protocol.tensors import Tensor
from workers.errors import StageError, release_memory
from workers.models.loading import Loaded
from workers.stages.contract import Outcome, Report
from workers.tensors import to_wire, unpack

log = logging.getLogger(__name__)

IN_TILES = "decoded in tiles, for want of GPU memory; where tiles meet, the picture differs a little from a whole one"


class VaeStage:
    def __init__(self, loaded: Loaded, device: torch.device) -> None:
        self.pipeline, self.device = loaded.pipeline, device
        self.residencies = tuple(loaded.residencies.values())
        self.vae = next(
            part for name in ("vae", "vqvae", "movq") if (part := getattr(self.pipeline, name, None)) is not None
        )
        self.dtype = self.vae.dtype
        self.may_tile = True  # where memory is short

    def run(self, recipe: Recipe, tensors: tuple[Tensor, ...], report: Report) -> Outcome:
        """`pictures`, uint8 (n, height, width, 3), RGB."""
        report(0, 1)
        warnings: tuple[str, ...] = ()
        try:
            pictures = self.decode(tensors)
        except torch.OutOfMemoryError:
            if not (self.may_tile and hasattr(self.vae, "enable_tiling")):
                raise
            release_memory()
            warnings = (IN_TILES,)
            log.warning("out of memory; decoding in tiles")
            self.vae.enable_tiling()
            try:
                pictures = self.decode(tensors)
            finally:
                self.vae.disable_tiling()
        return Outcome([to_wire("pictures", pictures)], warnings=warnings)

    @torch.no_grad()
    def decode(self, tensors: tuple[Tensor, ...]) -> torch.Tensor:
        values = {name.removeprefix("decode:"): value for name, value in unpack(tensors, self.device).items()}
        positional = [values.pop(name) for name in sorted(filter(str.isdigit, values), key=int)]
        latents = positional[0] if positional else next(iter(values.values()))
        assert isinstance(latents, torch.Tensor)
        upcast = latents.dtype != self.dtype  # some pipelines decode in float32 what they denoised in float16
        if upcast:
            self.vae.to(latents.dtype)
        try:
            decoded = self.vae.decode(*positional, **values, return_dict=False)[0]
        finally:
            if upcast:
                self.vae.to(self.dtype)
        if decoded.ndim == 5 and decoded.shape[2] == 1:
            decoded = decoded[:, :, 0]  # a video VAE's single frame
        if decoded.ndim != 4:
            raise StageError(f"decoded a tensor of shape {tuple(decoded.shape)}; only pictures are supported")
        return to_uint8(self.pipeline.image_processor.postprocess(decoded, output_type="pt"))


def to_uint8(pictures: torch.Tensor) -> torch.Tensor:
    """(n, 3, height, width) in 0 … 1 → uint8 (n, height, width, 3), where they lie.

    As `pt_to_numpy` and `numpy_to_pil` of diffusers, but a NaN is an error and never a black picture.
    """
    if not torch.isfinite(pictures).all():
        raise StageError("the decoded picture holds NaN or infinity; another --dtype may help")
    return (pictures.permute(0, 2, 3, 1).float() * 255).round().to(torch.uint8).contiguous()
