"""Several processes that do one job together, one a GPU. The first is the worker that the stack knows.

The others are forked from it before it touches a GPU, get each job through a socket, and go step by step with it: after
each step it says whether to go on, so that all leave the loop at the same one. They live and die together: if one
ends, so do the others, and the supervisor starts them anew as one.

Longer than other files, since both ends of one conversation are in it.
"""

import ctypes
import logging
import os
import signal
import socket
import struct
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch._C._distributed_c10d import FileStore

from protocol import wire
from protocol.errors import BadRequest, DoesNotFit, TriptychError
from protocol.gpu_memory import Lease, WeightNeed
from protocol.job import Recipe
from protocol.messages.common import Message
from protocol.messages.worker import Leased, Ready, SetLease, Task
from protocol.process import PR_SET_PDEATHSIG, log_to_stderr
from protocol.tensors import Tensor
from workers.errors import Cancelled, StageError
from workers.stages.contract import Outcome, Report, Saved
from workers.stages.denoise import DenoiseStage
from workers.weights.gpu_lease import NOTHING, AnyGpuLease, apply_leases

log = logging.getLogger(__name__)

READY, GO, STOP, DONE = b"r", b"g", b"s", b"d"
LENGTH = struct.Struct("!Q")
FAIL_SECONDS = 5.0  # in which the first rank fails, too, if it does
SETTLE_SECONDS = 20.0  # for the others to come to the end of a job that has ended here
INDIVISIBLE = "must be divisible by mesh size"  # what diffusers says of a picture that can't be shared out evenly


class RankLost(Exception):
    """The processes no longer go step by step."""


@dataclass(slots=True)
class Group:
    """A process's view: its rank, the group's size, and its links, the first one's to all, others' to the first."""

    rank: int
    size: int
    links: list[socket.socket]
    meeting: str  # path of the file where they find each other
    pids: list[int] = field(default_factory=list)  # of the others, in the first

    def join(self, device: torch.device) -> None:
        """Meet the others, on this host's loopback alone."""
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
        if device.type == "cuda":
            if (there := torch.cuda.device_count()) < self.size:
                raise BadRequest(f"{self.size} ranks take as many GPUs; {there} can be used.", "Give more with --gpus.")
            torch.cuda.set_device(device)
        store = FileStore(self.meeting, self.size)
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, store=store, rank=self.rank, world_size=self.size)

    def watch(self) -> None:
        """End this process as soon as one of the others has ended."""
        for rank, pid in enumerate(self.pids, 1):
            threading.Thread(target=_end_with, args=(rank, pid), daemon=True, name=f"rank-{rank}").start()


def _end_with(rank: int, pid: int) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code <= 1:
        log.error("rank %d, process %d, ended with %d: so do the others", rank, pid, code)
    logging.shutdown()
    os._exit(code if code > 1 else 1)  # whose last word says what a person can mend


def form(size: int, name: str) -> Group:
    """Fork the other ranks; it returns in each of them, with its own group. Not after CUDA, nor beside busy threads."""
    if sys.platform != "linux":
        raise BadRequest("Parallel placements need Linux.", "Choose another --placement.")
    if torch.cuda.is_initialized():
        raise RuntimeError("an import has brought up CUDA, so that no rank can be forked")
    parent = os.getpid()
    memory = os.memfd_create("triptych-ranks")
    meeting = f"/proc/self/fd/{memory}"
    links: list[socket.socket] = []
    pids: list[int] = []
    for rank in range(1, size):
        near, far = socket.socketpair()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            pid = os.fork()  # the only other thread waits for the supervisor's end
        if pid == 0:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)
            for link in (near, *links):
                link.close()
            log_to_stderr(f"{name}/{rank}")
            return Group(rank, size, [far], meeting)
        far.close()
        links.append(near)
        pids.append(pid)
    return Group(0, size, links, meeting, pids)


# -- the others ---------------------------------------------------------------------------------


def follow(
    load: Callable[[], DenoiseStage], shares_of: Callable[[DenoiseStage], Sequence[AnyGpuLease]], group: Group
) -> NoReturn:
    """Do what the first rank does, until it is gone."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, for the first rank to act on
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (link,) = group.links
        stage = load()
        gpu_leases = shares_of(stage)
        contexts = tuple(gpu_lease.context_bytes() for gpu_lease in gpu_leases)
        link.sendall(READY)
        tell(link, Ready(needs=tuple(gpu_lease.needs() for gpu_lease in gpu_leases), context_bytes=contexts))
        while (frames := receive(link)) is not None:
            envelope = wire.decode(frames, (Task, SetLease))
            match envelope.message:
                case Task(recipe=recipe):
                    take_part(stage, recipe, envelope.tensors, link)
                    tell(link, Ready(context_bytes=tuple(gpu_lease.context_bytes() for gpu_lease in gpu_leases)))
                case SetLease(leases=leases):
                    tell(link, apply_leases(gpu_leases, leases))
        code = 0
    except TriptychError as error:
        print(f"Error: {error}", file=sys.stderr)
        code = error.exit_code
    except BaseException:
        log.exception("this rank ends")
    finally:
        sys.stderr.flush()
        logging.shutdown()
        os._exit(code)


def take_part(
    stage: DenoiseStage,
    recipe: Recipe,
    tensors: tuple[Tensor, ...],
    link: socket.socket,
    fail_seconds: float = FAIL_SECONDS,
) -> None:
    def report(step: int, steps: int, saved: Saved | None = None) -> None:
        if link.recv(1) != GO:
            raise Cancelled

    try:
        stage.run(recipe, tensors, report)
    except Cancelled:
        pass
    except Exception:
        log.exception("a job failed in this rank")
        if not stops(link, fail_seconds):
            raise  # the first rank waits for what this one will never send
    if stage.device.type == "cuda":
        torch.cuda.synchronize(stage.device)  # what was queued for a job must not be met by the next one's
    link.sendall(DONE)


def stops(link: socket.socket, seconds: float) -> bool:
    """Return whether the first rank's job fails, too; it says so within some seconds."""
    link.settimeout(seconds)
    try:
        while (kind := link.recv(1)) == GO:
            pass
        return kind == STOP
    except TimeoutError:
        return False
    finally:
        link.settimeout(None)


def receive(link: socket.socket) -> list[Any] | None:
    """Receive a message's frames, and skip what is left of the last job's steps before them; None at the end."""
    while True:
        kind = link.recv(1)
        if not kind:
            return None
        if kind not in (GO, STOP):
            break
    return frames_of(link)


def frames_of(link: socket.socket) -> list[Any]:
    (count,) = LENGTH.unpack(exactly(link, LENGTH.size))
    return [exactly(link, LENGTH.unpack(exactly(link, LENGTH.size))[0]) for _ in range(count)]


def tell(link: socket.socket, message: Message, tensors: tuple[Tensor, ...] = ()) -> None:
    """Send a message as its frames."""
    frames = wire.encode(message, tensors)
    link.sendall(LENGTH.pack(len(frames)))
    for frame in frames:
        link.sendall(LENGTH.pack(nbytes(frame)))
        link.sendall(frame)


def exactly(link: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        got = link.recv_into(view)
        if not got:
            raise RankLost("another rank is gone")
        view = view[got:]
    return data


# -- the first ----------------------------------------------------------------------------------


class FollowerLease:
    """Another rank's lease of its GPU, asked for through its link."""

    def __init__(self, link: socket.socket, ready: Ready) -> None:
        self._link, self._ready = link, ready

    def needs(self) -> WeightNeed:
        return self._ready.needs[0]

    def take(self, size: int, weights: int) -> None:
        """Take the lease as `GpuLease` does; DoesNotFit, having given everything back."""
        if reason := self._ask(Lease(bytes=size, weight_bytes=weights)).reason:
            raise DoesNotFit(reason, "Give it more memory, more GPUs, or the CPU.")

    def give_back(self) -> None:
        self._ask(NOTHING)

    def kept_bytes(self) -> int:
        return self._ready.kept_bytes[0] if self._ready.kept_bytes else 0

    def context_bytes(self) -> int:
        return self._ready.context_bytes[0]

    def heard(self, ready: Ready) -> None:
        """Keep the context's bytes, which the rank tells after each job."""
        self._ready = self._ready.model_copy(update={"context_bytes": ready.context_bytes})

    def _ask(self, lease: Lease) -> Leased:
        self._link.sendall(DONE)
        tell(self._link, SetLease(leases=(lease,)))
        leased = wire.decode(frames_of(self._link), (Leased,)).message
        assert isinstance(leased, Leased)
        told = {"context_bytes": leased.context_bytes, "kept_bytes": leased.kept_bytes}
        self._ready = self._ready.model_copy(update=told)
        return leased


class LeadStage:
    """A denoise stage whose jobs the other ranks do with it, to be used like any other."""

    def __init__(self, stage: DenoiseStage, group: Group) -> None:
        self.pipeline, self.device, self.residencies = stage.pipeline, stage.device, stage.residencies
        self._stage, self._group = stage, group
        self._gpu_leases: list[FollowerLease] = []
        for link in group.links:
            if link.recv(1) != READY:
                raise RankLost("another rank could not load the model; its reason is above")
            self._gpu_leases.append(FollowerLease(link, told_ready(link)))

    @property
    def gpu_leases(self) -> Sequence[AnyGpuLease]:
        """The leases of the other ranks' GPUs, where they work in leases."""
        return self._gpu_leases

    def run(self, recipe: Recipe, tensors: tuple[Tensor, ...], report: Report) -> Outcome:
        """Run a job as the stage does, with the other ranks; RankLost where they no longer follow."""
        self._say(DONE)
        for link in self._group.links:
            tell(link, Task(job="ranks", stage="denoise", attempt=0, recipe=recipe), tensors)

        def told(step: int, steps: int, saved: Saved | None = None) -> None:
            report(step, steps, saved)
            self._say(GO)

        try:
            return self._stage.run(recipe, tensors, told)
        except AssertionError as error:
            if INDIVISIBLE not in str(error):
                raise
            size = f"{recipe.width}x{recipe.height}"
            raise StageError(f"{size} can't be shared out evenly among {self._group.size} GPUs; try another") from error
        finally:
            self._say(STOP)
            self._settle()

    def _say(self, word: bytes) -> None:
        for link in self._group.links:
            link.sendall(word)

    def _settle(self) -> None:
        for rank, link in enumerate(self._group.links, 1):
            link.settimeout(SETTLE_SECONDS)
            try:
                if link.recv(1) != DONE:
                    raise RankLost(f"rank {rank} said something else")
                self._gpu_leases[rank - 1].heard(told_ready(link))
            except TimeoutError as error:
                raise RankLost(f"rank {rank} did not come to the end of the job") from error
            finally:
                link.settimeout(None)


def told_ready(link: socket.socket) -> Ready:
    ready = wire.decode(frames_of(link), (Ready,)).message
    assert isinstance(ready, Ready)
    return ready


def nbytes(frame: Any) -> int:
    return memoryview(frame).nbytes
