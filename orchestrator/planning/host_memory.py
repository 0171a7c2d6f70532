"""Host memory: how many bytes of its weights each worker may page-lock. What is not locked comes from the disk.

Locked memory can't be taken back by the system, so weights that exceed it would end in the killing of processes.
"""

from collections.abc import Iterator, Mapping, Sequence

from orchestrator.planning.throughput import PlannedWorker
from protocol.model_profile import ModelProfile
from protocol.stages import Stage
from protocol.units import format_bytes

RESERVE = 6_000_000_000  # bytes for the stack's own processes, which take some 1.2 GB each, and for everything else
DISK = 3e9  # bytes a second from an NVMe disk
PIECES = 1.06  # bytes that are locked for each that is streamed: files are locked in pieces, which hold others, too


def locked_by_stage(profile: ModelProfile, work: Sequence[PlannedWorker], memory: int) -> dict[Stage, int] | None:
    """Return the bytes of each stage's weights to be locked, of a host's `memory`; None where all weights fit.

    First what is copied most often: the VAE, what is streamed in every step, what is copied once a job, the text
    encoder, which may encode the prompts of many jobs at once, then the rest.
    """
    here = {done.post.stage: done for done in work if done.post.gpus}
    elsewhere = {done.post.stage for done in work} - here.keys()  # on the CPU, where they stay in memory
    room = max(0, memory - RESERVE - sum(profile.stage(stage).weights for stage in elsewhere))
    weights = {stage: profile.stage(stage).weights for stage in here}
    if sum(weights.values()) <= room:
        return None
    found: dict[Stage, int] = dict.fromkeys(here, 0)
    for stage, wanted in (
        ("vae", weights.get("vae", 0)),
        ("denoise", in_steps(here["denoise"]) if "denoise" in here else 0),
        ("denoise", in_steps(here["denoise"]) + in_jobs(profile, work) if "denoise" in here else 0),
        ("text", copied(profile, here["text"]) if "text" in here else 0),
        ("denoise", weights.get("denoise", 0)),
    ):
        if stage in found:
            more = min(room, max(0, min(wanted, weights[stage]) - found[stage]))
            found[stage], room = found[stage] + more, room - more
    return found


def streamed(work: PlannedWorker) -> int:
    """Return the bytes that a worker streams in each pass, to all of its GPUs."""
    return int(work.streamed) * len(work.post.gpus)


def in_steps(work: PlannedWorker) -> int:
    """Return the bytes to be locked for what is streamed in each pass."""
    return int(streamed(work) * PIECES)


def in_jobs(profile: ModelProfile, work: Sequence[PlannedWorker]) -> int:
    """Return the bytes of a streamed denoiser's weights that are copied once a job: run ahead, or lent meanwhile."""
    denoisers = [done for done in work if done.post.stage == "denoise" and done.residency == "streamed"]
    if not denoisers:
        return 0
    decoders = [done for done in work if done.residency == "borrows" and done.post.stage == "vae"]
    lent = [sum(use.weights + use.workspace for use in done.shares) for done in decoders]  # and about as much for text
    return profile.stage("denoise").once + max(lent, default=0)


def copied(profile: ModelProfile, work: PlannedWorker) -> int:
    """Return the bytes of its weights that a worker copies to its GPUs for each task, or for each of its passes."""
    if work.residency in ("in", "streamed"):
        return streamed(work)
    return profile.stage(work.post.stage).weights


def locked_bytes(locked: dict[Stage, int] | None, stage: Stage, work: Sequence[PlannedWorker]) -> int | None:
    """Return the bytes that each of a stage's workers may lock; None for all of them.

    Workers that do the same lock the same pages of the same files; others share the stage's bytes.
    """
    if locked is None:
        return None
    kinds = {
        (done.residency, done.streamed, tuple(share.weights for share in done.shares))
        for done in work
        if done.post.stage == stage
    }
    return locked.get(stage, 0) // max(1, len(kinds))


def told(profile: ModelProfile, work: Sequence[PlannedWorker], memory: int) -> str:
    """Return in words what comes from the disk, and about how long that takes; empty where all weights fit."""
    locked = locked_by_stage(profile, work, memory)
    if locked is None:
        return ""
    here = {done.post.stage: done for done in work if done.post.gpus}
    parts, seconds = [], 0.0
    for name, times, missing in from_disk(profile, work, here, locked):
        if missing > 0:
            parts.append(f"{format_bytes(missing)} for {name}")
            seconds += missing * times / DISK
    weights = sum(profile.stage(stage).weights for stage in here)
    kept = f"of the model's {format_bytes(weights)} {format_bytes(sum(locked.values()))} stay in memory"
    if not parts:
        return f"{kept}, all that is needed once a job runs; the rest is read from the disk at each start"
    return f"{kept}; from the disk come {' and '.join(parts)}, about {seconds:.1f} s a picture more with an NVMe disk"


def from_disk(
    profile: ModelProfile,
    work: Sequence[PlannedWorker],
    here: Mapping[Stage, PlannedWorker],
    locked: Mapping[Stage, int],
) -> Iterator[tuple[str, int, int]]:
    """Yield for what weights are copied, how often a picture takes that, and the bytes that are not in memory then."""
    if "text" in here:
        name = "a turn" if here["text"].residency == "turns" else "a new prompt"
        yield name, 1, copied(profile, here["text"]) - locked["text"]
    if "denoise" in here:
        turns, figures = here["denoise"].residency == "turns", profile.stage("denoise")
        passes = 1 if turns else figures.passes // figures.together
        yield "a turn" if turns else "a step", passes, copied(profile, here["denoise"]) - locked["denoise"]
        yield "a job", 1, in_jobs(profile, work) - max(0, locked["denoise"] - in_steps(here["denoise"]))
