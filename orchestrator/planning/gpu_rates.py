"""Rates of kinds of GPUs, for plans that are made before anything was measured on them.

H200 and H100: measured (docs/benchmarks). Others: the vendor's rate for dense products in bf16 with sums in float32,
times the share of it that a denoiser is expected to reach; what a stack has measured takes its place.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.gpu_driver import PCIE_BYTES
from protocol.stages import Stage

# Of a GPU's rate for dense products: what diffusers reaches in each stage. Large GPUs wait more for small kernels.
SHARES: Mapping[Stage, float] = {"text": 0.3, "denoise": 0.6, "vae": 0.15}
COMPILED = 1.2  # times as fast as uncompiled: a cautious guess
SMALL_CONTEXT, LARGE_CONTEXT = 500_000_000, 940_000_000  # bytes of a CUDA context with its libraries


@dataclass(frozen=True, slots=True)
class GpuRate:
    """FLOP/s of each stage in bf16, of a compiled denoiser, bytes/s from page-locked memory, bytes of a context."""

    text: float
    denoise: float
    vae: float
    compiled: float
    link: float
    context: int
    known: bool = True
    peer: float = 0.0  # bytes/s from one such GPU to another, 0: by way of memory

    @property
    def to_peer(self) -> float:
        """Bytes a second between two such GPUs."""
        return self.peer or self.link / 2

    def of(self, stage: Stage, compiled: bool = False) -> float:
        match stage:
            case "text":
                return self.text
            case "denoise":
                return self.compiled if compiled else self.denoise
            case "vae":
                return self.vae


def _vendor(tera: float, link: float, context: int = SMALL_CONTEXT, known: bool = True, peer: float = 0.0) -> GpuRate:
    rate = tera * 1e12
    denoise = rate * SHARES["denoise"]
    return GpuRate(rate * SHARES["text"], denoise, rate * SHARES["vae"], denoise * COMPILED, link, context, known, peer)


NVLINK = 200e9  # bytes/s that collectives reach, cautiously
H200 = GpuRate(187e12, 428e12, 122e12, 557e12, 55.5e9, LARGE_CONTEXT, peer=NVLINK)
# FLUX.1-dev takes 5.27 s on it and 4.95 s on an H200, everything resident (2026-11-26).
H100 = GpuRate(176e12, 402e12, 115e12, 523e12, 55.5e9, LARGE_CONTEXT, peer=NVLINK)
GEN3, GEN4, GEN5 = PCIE_BYTES[3], PCIE_BYTES[4], PCIE_BYTES[5]
BY_NAME: Mapping[str, GpuRate] = {  # the longest name that is a part of the driver's wins
    "H200": H200,
    "H100": H100,
    "A100": _vendor(312, GEN4, LARGE_CONTEXT, peer=NVLINK),
    "L40S": _vendor(181, GEN4),
    "L4": _vendor(60, GEN4),
    "A10": _vendor(62, GEN4),
    "RTX A6000": _vendor(77, GEN4),
    "RTX 6000 Ada": _vendor(182, GEN4),
    "RTX 5090": _vendor(209, GEN5),
    "RTX 5080": _vendor(113, GEN5),
    "RTX 5070 Ti": _vendor(88, GEN5),
    "RTX 5070": _vendor(62, GEN5),
    "RTX 5060 Ti": _vendor(47, GEN5 / 2),
    "RTX 4090": _vendor(165, GEN4),
    "RTX 4080": _vendor(98, GEN4),
    "RTX 4070 Ti": _vendor(80, GEN4),
    "RTX 4070": _vendor(58, GEN4),
    "RTX 4060 Ti": _vendor(44, GEN4 / 2),
    "RTX 4060": _vendor(30, GEN4 / 2),
    "RTX 3090": _vendor(71, GEN4),
    "RTX 3080": _vendor(60, GEN4),
    "RTX 3070": _vendor(41, GEN4),
    "RTX 3060": _vendor(26, GEN4),
}
UNKNOWN = _vendor(98, GEN4, known=False)  # as an RTX 4080, a common card of 16 GB
CPU_CORE = 0.08e12  # FLOP/s of a core in bf16: T5-XXL on 32 cores was measured
STAND_IN = GpuRate(1e11, 1e11, 1e11, 1e11, 10e9, 0, known=False)  # a CPU that plays a GPU


def rate_of(name: str) -> GpuRate:
    """Return the rate of a GPU by the driver's name for it, such as 'NVIDIA GeForce RTX 4080 SUPER'."""
    plain = name.replace(" ", "").lower()
    fitting = [known for known in BY_NAME if known.replace(" ", "").lower() in plain]
    return BY_NAME[max(fitting, key=len)] if fitting else UNKNOWN
