"""What a worker's process is started with, by its place in a plan."""

from orchestrator.planning.placement import Post
from orchestrator.planning.stack_plan import PlannedModel
from protocol.speedups import parse_speedup
from protocol.worker_spec import WorkerSpec


def may_be_forked(spec: WorkerSpec) -> bool:
    """Return whether a worker may come from the fork server: not if it quantizes by a library that no fork survives."""
    return not any(stage == spec.stage and name == "quantize" for stage, name, _ in map(parse_speedup, spec.speedups))


def worker_spec(model: PlannedModel, post: Post, name: str) -> WorkerSpec:
    """Return what a worker is started with, but for what its host alone knows."""
    config, plan = model.config, model.plan
    return WorkerSpec(
        stage=post.stage, name=name, model=config.model_spec(),
        description=plan.description, device=post.device, dtype=plan.dtype,
        visible_gpus=post.gpus if post.gpus and post.device == "cuda" else None,
        leased_gpus=post.gpus if post.leased else (), max_memory=post.memory, workspace=post.workspace or None,
        cut=post.cut, jobs=post.jobs, speedups=plan.speedups,
        checkpoint_seconds=config.checkpoint if post.stage == "denoise" and config.keep else None,
        cuda_graphs=config.cuda_graphs, locked_bytes=post.locked,
    )  # fmt: skip
