"""A plan as a person reads it, and as a program does."""

from collections.abc import Sequence
from typing import Any

from orchestrator.planning.hardware import Hardware
from orchestrator.planning.planner import Plan
from orchestrator.planning.throughput import GpuUse, PlannedWorker
from protocol.model_profile import ModelProfile
from protocol.units import format_bytes

HEADER = ("stage", "where", "weights", "workspace", "context", "residency", "streams", "a step", "a picture")


def in_words(plan: Plan) -> list[str]:
    """A few lines for whoever starts a stack."""
    lines = []
    for work in plan.prediction.work:
        streams = f", {streamed(work)}" if work.streamed else ""
        lines.append(f"{work.post.stage} on {where(work)}: {residency(work)}{streams}, {seconds(work.seconds)}")
    return [*lines, summary(plan), *plan.notes]


def rows(plan: Plan) -> list[Sequence[str]]:
    """A line for each worker on each of its GPUs."""
    found: list[Sequence[str]] = []
    for work in plan.prediction.work:
        for index, share in enumerate(work.shares or (GpuUse(-1, 0, 0, 0),)):
            first = index == 0
            place = where(work) if share.gpu < 0 else f"GPU {share.gpu}"
            sizes = (share.weights, share.workspace, share.context)
            found.append((
                work.post.stage if first else "", place + kind(work),
                *(format_bytes(size) if share.gpu >= 0 else "–" for size in sizes),
                residency(work), streamed(work) if work.streamed else "–",
                seconds(work.pass_seconds) if first else "", seconds(work.seconds) if first else "",
            ))  # fmt: skip
    return found


def streamed(work: PlannedWorker) -> str:
    """Say what is streamed each time the model runs; text encoders and VAE have no steps."""
    return format_bytes(int(work.streamed)) + (" a step" if work.post.stage == "denoise" else "")


def where(work: PlannedWorker) -> str:
    if not work.post.gpus:
        return "the CPU" if work.post.device in ("cpu", "auto") else work.post.device
    return f"GPU {'+'.join(map(str, work.post.gpus))}{kind(work)}"


def kind(work: PlannedWorker) -> str:
    return f" ({work.post.kind})" if work.post.kind in ("split", "tensor", "context") else ""


def residency(work: PlannedWorker) -> str:
    words = {"in": "all in", "streamed": "streamed", "turns": "takes turns", "host": "in memory", "borrows": "borrows"}
    return words[work.residency]


def seconds(value: float) -> str:
    if value < 0.001:
        return "under 1 ms"
    return f"{value * 1000:.0f} ms" if value < 0.995 else f"{value:.2f} s"


def summary(plan: Plan) -> str:
    p = plan.prediction
    return (
        f"{plan.why}: a picture every {seconds(p.picture_seconds)}, {p.pictures_an_hour:.0f} an hour; "
        f"{seconds(p.latency)} for a single job with a new prompt"
    )


def as_data(plan: Plan, profile: ModelProfile, hardware: Hardware) -> dict[str, Any]:
    """Return a plan as data for JSON, in bytes and seconds."""
    p, recipe = plan.prediction, profile.recipe
    return {
        "model": profile.model.model,
        "pipeline": profile.model.pipeline,
        "picture": {
            "width": recipe.width, "height": recipe.height, "steps": recipe.steps, "dtype": recipe.dtype,
        },
        "why": plan.why,
        "picture_seconds": p.picture_seconds,
        "pictures_an_hour": p.pictures_an_hour,
        "latency_seconds": p.latency,
        "workers": [
            {
                "stage": work.post.stage, "kind": work.post.kind, "device": work.post.device, "cut": work.post.cut,
                "residency": work.residency, "streamed_bytes_a_step": int(work.streamed),
                "step_seconds": work.pass_seconds, "job_seconds": work.seconds, "swap_seconds": work.swap_seconds,
                "gpus": [
                    {"gpu": s.gpu, "weights": s.weights, "workspace": s.workspace, "context": s.context}
                    for s in work.shares
                ],
            }
            for work in p.work
        ],
        "gpus": [
            {
                "gpu": card.index, "name": card.name, "budget": card.budget, "used": p.used(card.index),
                "link_bytes_a_second": int(card.rate.link),
            }
            for card in hardware.cards
        ],
        "placements": [{"placement": name, "picture_seconds": o.picture_seconds, "latency_seconds": o.latency}
                   for name, o in plan.others],
        "notes": list(plan.notes),
        "better": list(plan.better),
    }  # fmt: skip
