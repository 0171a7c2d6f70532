"""The plan of a stack: which placement is best on a machine, what it will do, and what would make it better.

`choose` looks at every placement that a configuration leaves open, and predicts each. Pure.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from orchestrator.planning import host_memory
from orchestrator.planning.hardware import Card, Hardware
from orchestrator.planning.placement import FEW_CARDS, SEVERAL, Kind, Post, candidates, stage_gpus, stand_ins
from orchestrator.planning.prediction import Prediction, Terms, predict
from orchestrator.settings import StackConfig
from protocol.errors import BadRequest, DoesNotFit
from protocol.model_profile import ModelProfile
from protocol.stages import STAGES, Stage
from protocol.units import format_bytes

WORTH_SAYING = 0.95  # of the time that it takes now
LEAST_SECONDS = 0.1  # that a picture takes, for anybody to wish for less
LEAST_USE = 0.7  # of a text encoder or VAE beside many denoisers, before there is another


@dataclass(frozen=True, slots=True)
class Plan:
    prediction: Prediction
    why: str  # this placement was chosen
    notes: tuple[str, ...] = ()  # what a person should know
    better: tuple[str, ...] = ()  # what would have to change for it to be faster
    others: tuple[tuple[str, Prediction], ...] = ()  # the best of each kind of placement, this one first

    @property
    def posts(self) -> tuple[Post, ...]:
        return tuple(work.post for work in self.prediction.work)


def choose(config: StackConfig, profile: ModelProfile, hardware: Hardware, terms: Terms) -> Plan:
    """The best placement by the configuration's measure; DoesNotFit or BadRequest where there is none."""
    check(config, hardware)
    found, refusals = look(config, profile, hardware, terms)
    if not found:
        raise _nothing_fits(config, profile, hardware, terms, refusals)
    best = min(found, key=lambda prediction: _score(prediction, config.optimize))
    kinds, notes = best_of_kinds(config, found), _notes(config, profile, hardware, best, terms.compiled)
    return Plan(best, _why(config, kinds), notes, _better(config, profile, hardware, terms, best), kinds)


def check(config: StackConfig, hardware: Hardware) -> None:
    """Check that all the GPUs that the configuration names are there, and can do what it wants of them; BadRequest."""
    there = {card.index for card in hardware.cards}
    for stage in STAGES:
        where = stage_gpus(config.stage(stage), tuple(there))
        chosen = config.stage(stage).gpus or ()
        if where.device != "cpu" and (missing := [gpu for gpu in chosen if gpu not in there]):
            raise BadRequest(f"{stage} is to use GPU {missing[0]}.", f"GPUs here: {sorted(there) or 'none'}.")
        if len(set(chosen)) < len(chosen):
            raise BadRequest(f"{stage} is to use GPU {chosen[0]} twice.", "Name each GPU once.")
        if unknown := [gpu for gpu in where.gpus if gpu not in there]:
            raise BadRequest(f"{stage} is to use GPU {unknown[0]}.", f"GPUs here: {sorted(there) or 'none'}.")
        amounts = len(config.stage(stage).max_memory)
        if amounts > 1 and amounts != len(where.gpus):
            raise BadRequest(
                f"--max-memory of {stage} has {amounts} amounts for {len(where.gpus)} GPU(s).",
                "Give one, or one for each.",
            )
    if config.placement in SEVERAL and len(stage_gpus(config.stage("denoise"), sorted(there)).gpus) < 2:
        raise BadRequest(
            f"--placement {config.placement} takes several GPUs for the denoiser.",
            f"GPUs here: {sorted(there) or 'none'}.",
        )
    if config.placement in ("replicas", "tensor", "context") and config.stage("denoise").max_memory:
        given = f"--placement {config.placement} says itself how much of its GPUs the denoiser gets."
        raise BadRequest(given, "Leave out --max-memory of denoise, or give the GPUs a --budget.")
    rivals = {"--quantize": config.stage("denoise").quantize, "--cache": config.cache, "--batch": config.batch}
    for option in (option for option, given in rivals.items() if given and config.placement in SEVERAL):
        raise BadRequest(f"--placement {config.placement} does not go with {option}.", "Leave one of them out.")
    if config.batch and config.cache:
        raise BadRequest("--batch does not go with --cache, which remembers one job's steps.", "Leave one of them out.")


def look(
    config: StackConfig, profile: ModelProfile, hardware: Hardware, terms: Terms
) -> tuple[list[Prediction], list[DoesNotFit]]:
    """All placements that fit, and why others don't; with text encoders on the CPU only where none fits else."""
    found, refusals = _look(config, profile, hardware, terms)
    text = config.stage("text")
    if not found and text.device == "auto" and text.gpus is None and not text.max_memory and hardware.cards:
        there = {**config.stages, "text": text.model_copy(update={"device": "cpu"})}
        found, _ = _look(config.model_copy(update={"stages": there}), profile, hardware, terms)
    return found, refusals


def _look(
    config: StackConfig, profile: ModelProfile, hardware: Hardware, terms: Terms
) -> tuple[list[Prediction], list[DoesNotFit]]:
    found: list[Prediction] = []
    refusals: list[DoesNotFit] = []
    for posts in candidates(config, cards_of(config, hardware), several(config, profile), counts(profile, hardware)):
        try:
            found.append(predict(profile, hardware, posts, terms))
        except DoesNotFit as error:
            refusals.append(error)
    return found, refusals


def cards_of(config: StackConfig, hardware: Hardware) -> list[int]:
    """The driver's GPUs; a CPU that stands in for one is used by the stages that ask for it."""
    return [card.index for card in hardware.cards if card.index not in stand_ins(config)]


def several(config: StackConfig, profile: ModelProfile) -> list[Kind]:
    """Return a denoiser's possible kinds on several GPUs; parallel ones change bits, as compiling does."""
    quantized = config.stage("denoise").quantize or profile.stage("denoise").quantized
    if quantized or config.cache or config.batch:
        return []
    return ["split", "tensor", "context"] if config.compile else ["split"]


def counts(profile: ModelProfile, hardware: Hardware) -> dict[Stage, int]:
    """Workers beside one denoiser a GPU, so that none of them waits for long."""
    if len(hardware.cards) <= FEW_CARDS:
        return {}
    card = min(hardware.cards, key=lambda card: card.rate.denoise)
    seconds = {s.stage: s.flop * s.passes / card.flops(s.stage) for s in profile.stages}
    seconds["text"] = max(seconds["text"], profile.stage("text").weights / card.rate.link)  # if it is streamed
    found: dict[Stage, int] = {}
    for stage in ("text", "vae"):
        found[stage] = max(1, math.ceil(len(hardware.cards) * seconds[stage] / seconds["denoise"] / LEAST_USE))
    return found


def _score(prediction: Prediction, optimize: str) -> tuple[float, float, int]:
    """Score a prediction: the less the better; of equal ones, those with fewer GPUs and processes."""
    size = len({gpu for work in prediction.work for gpu in work.post.gpus}) + len(prediction.work)
    first, second = prediction.job_seconds, prediction.latency
    if optimize == "latency":
        first, second = second, first
    return round(first, 3), round(second, 3), size


def kind_of(prediction: Prediction) -> str:
    """'replicas', 'split' …, or 'one' for a single denoiser."""
    kinds = [work.post.kind for work in prediction.of("denoise")]
    if kinds and kinds[0] in SEVERAL:
        return kinds[0]
    return "replicas" if len(kinds) > 1 else "one"


def best_of_kinds(config: StackConfig, found: Sequence[Prediction]) -> tuple[tuple[str, Prediction], ...]:
    rivals: dict[str, Prediction] = {}
    for prediction in sorted(found, key=lambda p: _score(p, config.optimize)):
        rivals.setdefault(kind_of(prediction), prediction)
    return tuple(rivals.items())


def _why(config: StackConfig, kinds: Sequence[tuple[str, Prediction]]) -> str:
    """Name the first kind, with the seconds of each kind where there are others."""
    fast, best = config.optimize == "throughput", kinds[0][0]
    parts = [f"{kind} {p.picture_seconds if fast else p.latency:.2f}" for kind, p in kinds]
    said = "seconds a picture" if fast else "seconds for a single job"
    return f"{best}, by {said}: {', '.join(parts)}" if len(parts) > 1 else best


def _notes(
    config: StackConfig, profile: ModelProfile, hardware: Hardware, best: Prediction, compiled: bool
) -> tuple[str, ...]:
    notes: list[str] = []
    if from_disk := host_memory.told(profile, best.work, hardware.ram):
        notes.append(from_disk)
    uncounted = [f"{stage} is to be quantized" for stage in STAGES if config.stage(stage).quantize]
    uncounted += ["a step cache"] if config.cache else []
    uncounted += [f"batches of up to {config.batch} jobs"] if config.batch else []
    if best.work and profile.recipe.dtype == "float32" and any(not card.stands_in for card in hardware.cards):
        uncounted.append("what float32 costs in time")
    notes += [f"not counted in any figure: {what}" for what in uncounted]
    used = {gpu for work in best.work for gpu in work.post.gpus}
    if used and any(not work.post.gpus and work.post.stage == "text" for work in best.work):
        notes.append("text encoders work on the CPU, and leave the GPUs to the others")
    if profile.guessed:
        notes.append("seconds are guesses by its weights: this pipeline can't be run on shapes alone")
    if unknown := sorted({card.name for card in hardware.cards if card.index in used and not card.rate.known}):
        notes.append(f"the speed of {', '.join(unknown)} is a guess; a stack that has run knows better")
    if idle := [card.index for card in hardware.cards if card.index not in used]:
        notes.append(f"GPU {', '.join(map(str, idle))} would not help, and is left alone")
    if any(work.post.kind == "tensor" for work in best.work) and not compiled:
        notes.append("tensor parallel takes many times as long uncompiled: add --compile")
    turning = sorted({gpu for work in best.work if work.residency == "turns" for gpu in work.post.gpus})
    notes += [f"on GPU {gpu} not all fit at once: they take turns" for gpu in turning]
    return tuple(notes)


def _better(
    config: StackConfig, profile: ModelProfile, hardware: Hardware, terms: Terms, best: Prediction
) -> tuple[str, ...]:
    """Return the changes that would make it faster, found by planning for each."""
    if not hardware.cards or len(hardware.cards) > 8 or any(card.stands_in for card in hardware.cards):
        return ()
    first = hardware.cards[0]
    more = [replace(card, budget=card.budget + 8_000_000_000) for card in hardware.cards]
    twice = [replace(card, rate=replace(card.rate, link=card.rate.link * 2)) for card in hardware.cards]
    compiled = config.model_copy(update={"compile": True})
    changes = [
        ("8 GB more on each GPU", config, replace(hardware, cards=tuple(more)), terms),
        ("links twice as fast", config, replace(hardware, cards=tuple(twice)), terms),
    ]
    if not _says_which(config):
        another = replace(first, index=max(card.index for card in hardware.cards) + 1)
        cards = (*hardware.cards, another)
        changes.append((f"another GPU like {first.index}", config, replace(hardware, cards=cards), terms))
    if not terms.compiled:
        changes.append(("--compile (numeric)", compiled, hardware, replace(terms, compiled=True)))
    said: list[str] = []
    for what, under, other, then_terms in changes:
        found, _ = look(under, profile, other, then_terms)
        if found:
            then = min(found, key=lambda p: _score(p, config.optimize))
            now, after = (
                (best.picture_seconds, then.picture_seconds)
                if config.optimize == "throughput"
                else (best.latency, then.latency)
            )
            if after < WORTH_SAYING * now and now >= LEAST_SECONDS:
                said.append(f"{what}: {after:.2f} s instead of {now:.2f}")
    return tuple(said)


def _says_which(config: StackConfig) -> bool:
    """Return whether the configuration names its GPUs, or what it takes of each, so that another would not be used."""
    stages = [config.stage(stage) for stage in STAGES]
    return any(stage.gpus is not None or len(stage.max_memory) > 1 for stage in stages)


def _nothing_fits(
    config: StackConfig, profile: ModelProfile, hardware: Hardware, terms: Terms, refusals: Sequence[DoesNotFit]
) -> DoesNotFit:
    """The first reason, and the smallest GPUs on which something fits."""
    if not refusals:
        return DoesNotFit("There is nothing to place: every stage has 0 workers.", "Leave --workers out.")

    def fits(size: int) -> bool:
        cards: list[Card] = [replace(card, budget=size) for card in hardware.cards]
        return bool(look(config, profile, replace(hardware, cards=tuple(cards)), terms)[0])

    low, high = 0, 1_000_000_000_000
    if not fits(high):
        return refusals[0]
    while high - low > high // 100 + 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return DoesNotFit(refusals[0].message, f"With {format_bytes(high)} of each GPU it would fit. {refusals[0].hint}")
