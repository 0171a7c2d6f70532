"""Speedups, which make a stage faster or smaller at the cost of bits: how each is written, and its pictures' tier.

A speedup is 'STAGE:NAME' or 'STAGE:NAME=VALUE', such as 'denoise:compile' or 'text:quantize=int8'. A stack's are part
of each job's recipe, and so of its record.
"""

import itertools
from collections.abc import Iterable
from typing import Literal

from protocol.errors import BadRequest
from protocol.stages import STAGES, Stage

Tier = Literal["exact", "numeric", "approximate"]

CACHES = ("first-block", "taylorseer", "pyramid-attention", "faster")
QUANTIZATIONS = ("int8", "int8-dynamic", "fp8", "fp8-dynamic")
PARALLEL = ("tensor", "context")  # with how many processes, as in tensor-2
MOST_RANKS = 64
MOST_BATCH = 16  # jobs at once
TIERS: dict[str, Tier] = {
    "compile": "numeric",
    "attention": "numeric",
    "fuse-qkv": "numeric",
    "parallel": "numeric",
    "batch": "numeric",
    "cache": "approximate",
    "quantize": "approximate",
}
ROUGH_ATTENTION = ("sage", "_sage")  # backends that begin so compute in 8 bits
STAGES_OF: dict[str, tuple[Stage, ...]] = {"quantize": ("text", "denoise")}  # others: the denoiser alone


def parse_speedup(text: str) -> tuple[Stage, str, str]:
    """Stage, name and value ('' for none); BadRequest."""
    stage, colon, rest = text.partition(":")
    name, _, value = rest.partition("=")
    if stage not in STAGES or not colon or name not in TIERS:
        names = ", ".join(TIERS)
        raise BadRequest(f"There is no speedup {text!r}.", f"Write STAGE:NAME or STAGE:NAME=VALUE, NAME being {names}.")
    if stage not in STAGES_OF.get(name, ("denoise",)):
        fits = " and ".join(STAGES_OF.get(name, ("denoise",)))
        raise BadRequest(f"{name} does not apply to {stage}.", f"It is for {fits}.")
    match name:
        case "cache":
            kind, _, threshold = value.partition(":")
            if kind not in CACHES:
                raise BadRequest(f"There is no step cache {kind!r}.", f"Choose one of {', '.join(CACHES)}.")
            if threshold and not (kind == "first-block" and _positive(threshold)):
                raise BadRequest(f"The cache {value!r} is not right.", "Only first-block takes a threshold, a number.")
        case "quantize" if value not in QUANTIZATIONS:
            raise BadRequest(f"There is no quantization {value!r}.", f"Choose one of {', '.join(QUANTIZATIONS)}.")
        case "parallel":
            kind, _, size = value.partition("-")
            if kind not in PARALLEL or not size.isdigit() or not 2 <= int(size) <= MOST_RANKS:
                raise BadRequest(f"{value!r} can't be parallel.", "Write parallel=tensor-2 or parallel=context-2.")
        case "batch" if not (value.isdigit() and 2 <= int(value) <= MOST_BATCH):
            raise BadRequest(f"There are no batches of {value!r} jobs.", f"Give a number from 2 to {MOST_BATCH}.")
        case "attention" if not value:
            raise BadRequest("attention needs the name of a backend.", "Such as native, _native_cudnn, flash or sage.")
        case "compile" | "fuse-qkv" if value:
            raise BadRequest(f"{name} takes no value.", f"Write {stage}:{name}.")
    return stage, name, value


def _positive(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False


def canonical(speedups: Iterable[str]) -> tuple[str, ...]:
    """Return speedups in a fixed order, each checked; BadRequest where two say different things of one."""
    found = sorted(set(speedups))
    names = [parse_speedup(text)[:2] for text in found]
    for one, other in itertools.pairwise(names):
        if one == other:
            raise BadRequest(f"{one[1]} of {one[0]} is given twice.", "Give it once.")
    return tuple(found)


def batch_of(speedups: Iterable[str]) -> int:
    """Return how many jobs a denoiser may have at once."""
    return next((int(value) for _, name, value in map(parse_speedup, speedups) if name == "batch"), 1)


def tier_of(speedups: Iterable[str]) -> Tier:
    """Return the tier of pictures: how near they are to those of the plain pipeline."""
    tiers: set[Tier] = set()
    for text in speedups:
        _, name, value = parse_speedup(text)
        rough = name == "attention" and value.startswith(ROUGH_ATTENTION)
        tiers.add("approximate" if rough else TIERS[name])
    return "approximate" if "approximate" in tiers else "numeric" if tiers else "exact"
