"""The prediction for a placement: what fits where, what is streamed, seconds a step, a picture and a job.

Pure arithmetic on a model's profile and the GPUs' rates, by the rules that leases are given by. Longer than other
files: each kind of placement is predicted from the same book of workers' bytes, and they are read beside each other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.memory.lease_sizes import LeaseSize, Need, largest_of, lease_sizes
from orchestrator.memory.margins import FIRST_HEADROOM, HEADROOM, MARGIN, ROUNDING
from orchestrator.planning.hardware import Card, Hardware
from orchestrator.planning.pipeline_cut import Part, SplitGpu, best_cut, parts_of
from orchestrator.planning.placement import Post, with_memory
from orchestrator.planning.streaming_cost import job_seconds, load_of, streaming
from orchestrator.planning.throughput import GpuUse, PlannedWorker, Residency, latency, steady_state
from protocol.errors import DoesNotFit
from protocol.model_profile import ModelProfile, StageProfile
from protocol.stages import TRAITS, Stage
from protocol.units import format_bytes

WORKSPACE = 4.75  # times the largest intermediate result: 3.8 and 4.75 of FLUX.1-dev's denoiser and VAE were measured
LIVE = 1.1  # times all intermediate results that live at once: 1.07 of FLUX.1-dev's VAE was measured
SPLIT_SHARE = 1.01  # times what a job takes on one GPU, for the way from one to the other
COMMUNICATION = 400_000_000  # bytes of NCCL's buffers on each GPU; not measured yet
EXCHANGED = {"tensor": 2 / 5, "context": 1 / 5}  # of the largest intermediate result, for each block and pass
# Seconds in which a host starts a compiled block that exchanges with other GPUs, which large GPUs wait for: two H200s
# were idle a third and a half of the time (2026-11-26); four took 1.6 to 2.1 ms (2026-11-27).
STARTING = {"tensor": 1.8e-3, "context": 2.4e-3}
# Seconds in which a process starts a block's kernels uncompiled, one job after the other: what four jobs at once in a
# denoiser cut over four H200s are bound by without CUDA graphs (2026-11-27). With them Python takes 0.04 ms, found on
# a CPU with launches that do nothing; the rest is a guess of what one graph and three copies take to launch.
STARTING_SPLIT = 1.36e-3
STARTING_GRAPH = 0.15e-3
HOST_LINKS = 183e9  # bytes a second from a host's memory to all of its GPUs: what four H200s copy at once (2026-11-27)
MOST_OF_A_HOST = 8  # GPUs: more are those of several hosts
UNEVEN = 1.02  # times an equal part: norms and some biases are not shared out
LOAN_SECONDS = 0.08  # to borrow GPU memory and give it back, beside the weights that come in: an H100, 2026-11-26
UNCOMPILED_TENSOR = 9.0  # times as long without compiling


@dataclass(frozen=True, slots=True)
class Terms:
    """The other inputs of a prediction; `workspaces` are bytes that were seen."""

    compiled: bool = False
    patience: float = 30.0  # seconds
    workspaces: Mapping[Stage, int] = field(default_factory=dict)
    cuda_graphs: bool = True


@dataclass(frozen=True, slots=True)
class Prediction:
    work: tuple[PlannedWorker, ...]
    job_seconds: float  # between two jobs, with enough of them in the queue
    latency: float  # seconds of one job, prompt not cached, all warm
    pictures: int  # a job

    @property
    def picture_seconds(self) -> float:
        return self.job_seconds / self.pictures

    @property
    def pictures_an_hour(self) -> float:
        return 3600 / self.picture_seconds

    def of(self, stage: Stage) -> list[PlannedWorker]:
        return [work for work in self.work if work.post.stage == stage]

    def used(self, gpu: int) -> int:
        """Bytes of a GPU at most, contexts included; of those that take turns the largest is in.

        Those that borrow work in another's bytes.
        """
        here = [(work, share) for work in self.work for share in work.shares if share.gpu == gpu]
        stay = sum(share.weights + share.workspace for work, share in here if work.residency in ("in", "streamed"))
        turning = [share.weights + share.workspace for work, share in here if work.residency == "turns"]
        return stay + max(turning, default=0) + sum(share.context for _, share in here)


def predict(profile: ModelProfile, hardware: Hardware, posts: Sequence[Post], terms: Terms) -> Prediction:
    """Predict what a placement will do; DoesNotFit, with what would, where a worker can never do anything."""
    book = Book(profile, with_shared_links(hardware, posts), posts, terms)
    settled = [book.settle(post) for post in posts]
    work = [book.work(number, post) for number, post in enumerate(settled)]
    return Prediction(tuple(work), steady_state(work, terms.patience), latency(work), profile.recipe.num_images)


def with_shared_links(hardware: Hardware, posts: Sequence[Post]) -> Hardware:
    """Return the hardware with what each link gives while all GPUs that are used copy at once."""
    used = {gpu for post in posts for gpu in post.gpus}
    most = HOST_LINKS / min(max(1, len(used)), MOST_OF_A_HOST)

    def shared(card: Card) -> Card:
        binds = card.index in used and card.rate.link > most and not card.stands_in
        return replace(card, rate=replace(card.rate, link=most)) if binds else card

    return replace(hardware, cards=tuple(map(shared, hardware.cards)))


class Book:
    """The bytes that each worker has of each GPU."""

    def __init__(self, profile: ModelProfile, hardware: Hardware, posts: Sequence[Post], terms: Terms) -> None:
        self.profile, self.hardware, self.terms = profile, hardware, terms
        self.posts = list(posts)
        self._standing = {card.index: 0 for card in hardware.cards}
        self._levels: dict[int, dict[str, LeaseSize]] = {}

    # -- what each needs ------------------------------------------------------------------------

    def workspace(self, stage: Stage, card: Card) -> int:
        """Bytes that a lease has for a stage's workspace, as the ledger counts."""
        if card.stands_in:
            return 0
        profile = self.profile.stage(stage)
        foreseen = profile.peak * LIVE or profile.largest * WORKSPACE
        return int((self.terms.workspaces.get(stage) or foreseen) * MARGIN) + ROUNDING

    def own_workspace(self, post: Post, card: Card) -> int:
        """Bytes of workspace, for all its jobs, of a worker that keeps its memory."""
        return self.workspace(post.stage, card) * post.jobs

    def context(self, post: Post, card: Card) -> int:
        return context_bytes(post, card) + HEADROOM if card.rate.context else 0

    def need(self, post: Post, card: Card) -> Need:
        profile, traits, leases = self.profile.stage(post.stage), TRAITS[post.stage], post.kind == "leases"
        return Need(
            profile.weights, profile.least, self.workspace(post.stage, card), lends=traits.lends and leases,
            momentary=traits.momentary and leases,
        )  # fmt: skip

    def left(self, card: Card, but: Post | None = None) -> int:
        """Bytes beside all contexts and what workers keep for themselves; `but` one, which is to get its part."""
        here = [post for post in self.posts if card.index in post.gpus]
        own = sum(post.memory[post.gpus.index(card.index)] for post in here if post.memory and post is not but)
        return card.budget - sum(self.context(post, card) for post in here) - own - self._standing[card.index]

    def free_beside_leases(self, card: Card, post: Post) -> int:
        """Bytes for a worker that keeps them, beside the least that those in leases need, before they have worked."""
        if card.rate.context:
            growing = sum(card.index in other.gpus for other in self.posts) * (FIRST_HEADROOM - HEADROOM)
        else:
            growing = 0
        leased = [self.need(other, card) for other in self.posts if other.kind == "leases" and card.index in other.gpus]
        return self.left(card, post) - growing - sum(need.small for need in leased)

    # -- who keeps what -------------------------------------------------------------------------

    def settle(self, post: Post) -> Post:
        """Return a post with the memory that it keeps of its GPUs, if it keeps some and that isn't said yet."""
        cards = [self.hardware.card(gpu) for gpu in post.gpus]
        if post.kind in ("leases", "host", "own"):
            return post
        if post.memory:
            return self._cut(post, cards, post.memory) if post.kind == "split" else post
        if post.kind in ("tensor", "context"):
            self._check_shares(post)
        free = [self.free_beside_leases(card, post) for card in cards]
        settled = self._with_memory(post, cards, free)
        for card, room, wanted in zip(cards, free, settled.memory, strict=True):
            least = self.profile.stage(post.stage).least + post.workspace if post.kind == "context" else wanted
            if least > room:
                raise too_large(post, card, least, room)
            self._standing[card.index] += wanted
        return settled

    def _with_memory(self, post: Post, cards: Sequence[Card], free: Sequence[int]) -> Post:
        profile = self.profile.stage(post.stage)
        if post.kind == "tensor":  # what is run once a job passes through
            shared = sum(block.bytes - block.once for block in profile.blocks)
            alike = profile.weights - profile.once - shared  # what each GPU has whole
            size = profile.loose + alike + int(shared / len(cards) * UNEVEN)
            spaces = [self.own_workspace(post, card) for card in cards]
            return with_memory(post, [size + space for space in spaces], workspace=max(spaces))
        if post.kind == "split" and self._has_rows(post):
            return self._cut(post, cards, free)
        if post.kind == "split" and sum(free) < profile.weights + sum(self.workspace(post.stage, c) for c in cards):
            raise self._uncut(post, free)
        spaces = [self.own_workspace(post, card) for card in cards]
        most = [profile.weights + space for space in spaces]
        return with_memory(post, [min(pair) for pair in zip(free, most, strict=True)], workspace=max(spaces))

    def _check_shares(self, post: Post) -> None:
        """Raise DoesNotFit where heads, or with context parallel tokens, can't be shared out evenly."""
        profile, recipe, ranks = self.profile.stage(post.stage), self.profile.recipe, len(post.gpus)
        multiple = self.profile.model.size_multiple
        tokens = (recipe.width // multiple) * (recipe.height // multiple) if post.kind == "context" else 0
        for what, count in (("heads of attention", profile.heads), ("places of a picture", tokens)):
            if count % ranks:
                raise DoesNotFit(
                    f"{count} {what} can't be shared out evenly among {ranks} GPUs.",
                    "Name fewer, as in --gpus denoise=0,1, or choose another --placement.",
                )

    def _has_rows(self, post: Post) -> bool:
        """Return whether it is one denoiser, whose blocks are simply one after the other."""
        profile = self.profile.stage(post.stage)
        names = [block.name for block in profile.blocks]
        alone = post.stage == "denoise" and len(profile.components) == 1
        return alone and bool(names) and all(name.count(".") == 1 for name in names)

    def _cut(self, post: Post, cards: Sequence[Card], free: Sequence[int]) -> Post:
        """Cut by time, with the memory that the parts take of what is free; leave it where accelerate will cut it."""
        if not self._has_rows(post):
            return post
        profile = self.profile.stage(post.stage)
        split_gpus = self._split_gpus(post, cards, free)
        parts = best_cut(profile, split_gpus)
        if parts is None:
            raise self._uncut(post, [split_gpu.room for split_gpu in split_gpus])
        space = max(self._spaces(post, cards))
        memory = post.memory or [taken(*pair) + space for pair in zip(parts, split_gpus, strict=True)]
        return with_memory(post, memory, [part.blocks for part in parts], space)

    def _spaces(self, post: Post, cards: Sequence[Card]) -> list[int]:
        """Bytes for the jobs that are in flight."""
        return [len(cards) * self.workspace(post.stage, card) for card in cards]

    def _split_gpus(self, post: Post, cards: Sequence[Card], memory: Sequence[int]) -> list[SplitGpu]:
        space, compiled = max(self._spaces(post, cards)), self.terms.compiled
        return [
            SplitGpu(max(0, size - space), card.flops(post.stage, compiled), card.rate.link)
            for size, card in zip(memory, cards, strict=True)
        ]

    def _uncut(self, post: Post, room: Sequence[int]) -> DoesNotFit:
        size, there = self.profile.stage(post.stage).weights, ", ".join(format_bytes(max(0, size)) for size in room)
        return DoesNotFit(
            f"The layers of {post.stage}, {format_bytes(size)}, can't even be streamed through {there} of GPUs "
            f"{', '.join(map(str, post.gpus))}.",
            "Text encoders on the CPU leave more room: --device text=cpu. Or choose another --placement.",
        )

    # -- how they will do -----------------------------------------------------------------------

    def work(self, number: int, post: Post) -> PlannedWorker:
        """Predict how a settled post will do; `number` is its place among all."""
        profile = self.profile.stage(post.stage)
        cards = [self.hardware.card(gpu) for gpu in post.gpus]
        match post.kind:
            case "host":
                a_pass = profile.flop / self.hardware.cpu_flops
                return PlannedWorker(post, (), "host", 0.0, a_pass, a_pass * profile.passes)
            case "leases":
                return self._in_leases(str(number), post, profile, cards[0])
            case "split":
                return self._split(post, profile, cards)
        shares, passes, most = [], [], 0.0
        for card, memory in zip(cards, post.memory, strict=True):
            share, streamed, a_pass = self._alone(post, profile, card, memory, len(cards))
            shares.append(share)
            passes.append(a_pass)
            most = max(most, streamed)
        seconds = max(passes) * profile.passes
        return PlannedWorker(post, tuple(shares), "streamed" if most else "in", most, max(passes), seconds)

    def _alone(
        self, post: Post, profile: StageProfile, card: Card, memory: int, parts: int
    ) -> tuple[GpuUse, float, float]:
        """Predict a rank of several, or one with memory of its own: its share, bytes streamed and seconds a pass."""
        workspace = self.own_workspace(post, card)
        compute = profile.flop / card.flops(post.stage, self.terms.compiled)
        exchanged = len(profile.blocks) * profile.largest * EXCHANGED.get(post.kind, 0.0) / card.rate.to_peer
        starting = len(profile.blocks) * STARTING.get(post.kind, 0.0)
        if post.kind == "tensor":
            factor = 1.0 if self.terms.compiled else UNCOMPILED_TENSOR
            a_pass = max(compute / parts * factor + exchanged, starting)
            return self._share(post, card, memory - workspace, workspace), 0.0, a_pass
        found = streaming(load_of(profile), memory - workspace)
        if found is None:
            raise too_large(post, card, profile.least + workspace, memory)
        if post.kind == "context":
            compute = max(compute / parts + exchanged, starting)
        together = 1 if post.kind == "context" else profile.together
        _, seconds = job_seconds(compute, profile.passes, found, card.rate.link, together)
        share = self._share(post, card, min(profile.weights, memory - workspace), workspace)
        return share, found.a_pass, seconds / profile.passes

    def _split(self, post: Post, profile: StageProfile, cards: Sequence[Card]) -> PlannedWorker:
        spaces = [self.own_workspace(post, card) for card in cards]
        rows = zip(cards, post.memory, spaces, strict=True)
        shares = tuple(self._share(post, card, size - space, space) for card, size, space in rows)
        if post.cut:
            parts = parts_of(profile, post.cut, self._split_gpus(post, cards, post.memory)) or []
            busy = [part.seconds * SPLIT_SHARE for part in parts]
            streamed = max(part.streaming.a_pass for part in parts)
            residency: Residency = "in" if all(part.streaming.nothing for part in parts) else "streamed"
            a_pass = sum(busy) / profile.passes
            blocks = 0 if self.terms.compiled or cards[0].stands_in else len(profile.blocks)
            starting = blocks * profile.passes * (STARTING_GRAPH if self.terms.cuda_graphs else STARTING_SPLIT)
            return PlannedWorker(
                post, shares, residency, streamed, a_pass, sum(busy), busy=tuple(busy), starting=starting
            )
        first, busy = 0, []
        for size, card in zip(post.memory, cards, strict=True):  # as accelerate will cut it: by bytes
            count = len(profile.blocks) * size // max(1, sum(post.memory))
            flop = sum(block.flop for block in profile.blocks[first : first + count])
            busy.append(flop / card.flops(post.stage, self.terms.compiled) * profile.passes * SPLIT_SHARE)
            first += count
        return PlannedWorker(post, shares, "in", 0.0, sum(busy) / profile.passes, sum(busy), busy=tuple(busy))

    def _in_leases(self, name: str, post: Post, profile: StageProfile, card: Card) -> PlannedWorker:
        found = self._levels_on(card)
        lease_size = found[name]
        need = self.need(post, card)
        if not lease_size.exclusive:
            raise too_large(post, card, need.small, max(0, self.left(card)))
        others = [other for key, other in found.items() if key != name]
        largest = largest_of({key: self.need(self.posts[int(key)], card) for key in found})
        turning = [key for key, other in found.items() if other.exclusive and not other.shared and not other.borrows]
        crowded = any(key != largest for key in turning)
        stays = lease_size.shared > 0 or (
            name == largest
            and not crowded
            and lease_size.exclusive + sum(other.shared for other in others) <= self.left(card)
        )
        size = lease_size.shared if lease_size.shared and name != largest else lease_size.exclusive
        weights = min(need.weights, size - need.workspace)
        how = streaming(load_of(profile), weights)
        if how is None:
            raise too_large(post, card, need.small, size)
        compute = profile.flop / card.flops(post.stage, self.terms.compiled)
        a_pass, seconds = job_seconds(compute, profile.passes, how, card.rate.link, profile.together)
        residency: Residency = "turns" if not stays else "in" if how.nothing else "streamed"
        share = self._share(post, card, weights, need.workspace)
        swap = 0.0 if stays else weights / card.rate.link
        if lease_size.borrows:
            residency, swap = "borrows", swap + LOAN_SECONDS
        return PlannedWorker(post, (share,), residency, how.a_pass, a_pass, seconds, swap)

    def _levels_on(self, card: Card) -> dict[str, LeaseSize]:
        if card.index not in self._levels:
            needs = {
                str(index): self.need(post, card)
                for index, post in enumerate(self.posts)
                if post.kind == "leases" and card.index in post.gpus
            }
            self._levels[card.index] = lease_sizes(self.left(card), needs)
        return self._levels[card.index]

    def _share(self, post: Post, card: Card, weights: int, workspace: int) -> GpuUse:
        return GpuUse(card.index, max(0, weights), workspace, self.context(post, card))


def taken(part: Part, split_gpu: SplitGpu) -> int:
    """Bytes that a part's weights take of its GPU."""
    load = part.load
    return min(split_gpu.room, load.weights if part.streaming.nothing else load.weights - load.once + load.loose)


def context_bytes(post: Post, card: Card) -> int:
    """Return a process's bytes of a GPU outside of what its allocator holds."""
    together = COMMUNICATION if post.kind in ("tensor", "context") else 0
    return card.rate.context + together if card.rate.context else 0


def too_large(post: Post, card: Card, least: int, room: int) -> DoesNotFit:
    return DoesNotFit(
        f"{post.stage} takes at least {format_bytes(least)} of GPU {card.index} beside contexts; "
        f"{format_bytes(max(0, room))} of it can be had.",
        "Give it more of that GPU (--budget), another GPU (--gpus), or the CPU (--device).",
    )
