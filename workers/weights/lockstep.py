"""Several works in one thread that take turns at a model's blocks, so that streamed weights pass once for all of them.

Prompts of several jobs are such works (see TextStage), and above all the forwards of one denoising step.
With true classifier-free guidance a step has two forwards or more, which differ in their prompts alone. What the second
one will be given is foreseen at the first one, from the steps before; it is made along with it, and its result is given
once it is called with that. Where it is called with anything else it is made anew, so that results never depend on what
was foreseen. Each forward is computed alone, by the same calls, so its bits are those of one after the other.
"""

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from greenlet import getcurrent, greenlet
from torch.utils._pytree import tree_leaves, tree_map

from workers.errors import FORGIVEN, let_go, refusals, release_memory
from workers.weights.forward_trace import Call, main_input, same, standing_in

log = logging.getLogger(__name__)

MOST = 4  # forwards of a step
KERNELS = 64  # bytes; by no multiple of more are kernels chosen: allocators start tensors at any
Made = TypeVar("Made")
LANE: ContextVar[int | None] = ContextVar("lane", default=None)  # the number of the work that is done, among several


class Ended(Exception):
    """Not an error: the works that this one accompanies have broken off."""


class Passes(Protocol):
    """Blocks whose weights are streamed: see Ring."""

    def shared(self, last: Callable[[], bool]) -> contextlib.AbstractContextManager[None]: ...


@dataclass(frozen=True, slots=True)
class Modes:
    """What torch keeps of one thread, which several works have in turns, each with its own."""

    kind: str  # of device
    grad: bool
    autocast: bool
    dtype: torch.dtype  # of autocast

    @staticmethod
    def now(kind: str) -> "Modes":
        autocast, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        return Modes(kind, torch.is_grad_enabled(), autocast, dtype)

    def set(self) -> None:
        torch.set_grad_enabled(self.grad)
        torch.set_autocast_enabled(self.kind, self.autocast)
        torch.set_autocast_dtype(self.kind, self.dtype)


class Lockstep:
    """Works that take turns at some blocks, each going on until it reaches one or its end, all in one thread.

    Threads would each have a handle of cuBLAS, and 70 MB of GPU memory for it (an H100, 2026-11-26).
    """

    def __init__(self, blocks: Sequence[torch.nn.Module], device: torch.device) -> None:
        self._blocks, self._kind = blocks, device.type

    def run(self, works: Sequence[Callable[[], Made]], passes: Sequence[Passes]) -> tuple[Made, list[Made | None]]:
        """Return the results of the first one, and of the others; None where another has failed.

        Raises: what the first one raises, and torch.OutOfMemoryError of any.
        """
        modes, lanes = Modes.now(self._kind), dict[int, Any]()
        results = dict[int, Made | None]()
        hooks = [block.register_forward_pre_hook(self.pass_on, prepend=True) for block in self._blocks]

        def last() -> bool:
            return LANE.get() == max(lanes)

        try:
            with contextlib.ExitStack() as stack:
                for one in passes:
                    stack.enter_context(one.shared(last))
                for number, work in enumerate(works):
                    lanes[number] = lane = greenlet(functools.partial(in_lane, number, work, modes))
                    lane.gr_context = contextvars.copy_context()
                while lanes:
                    for number, lane in list(lanes.items()):
                        try:
                            made = lane.switch()
                        except Exception as error:  # it is done once more when it is asked for, and tells then
                            if not number or isinstance(error, torch.OutOfMemoryError):
                                raise
                            log.debug("a work beside another failed: %s", error)
                            let_go(error)
                            made = None
                        if lane.dead:
                            results[number] = made
                            del lanes[number]
            first = results.pop(0)
            assert first is not None
            return first, [results[number] for number in sorted(results)]
        finally:
            for lane in lanes.values():
                if lane and not lane.dead:
                    with contextlib.suppress(Exception):
                        lane.throw(Ended)
            for hook in hooks:
                hook.remove()
            modes.set()

    def try_to_run(
        self, works: Sequence[Callable[[], Made]], passes: Sequence[Passes]
    ) -> tuple[Made, list[Made | None]] | None:
        """Return what `run` does; None where there is no memory for all at once, with none of it left in use."""
        refused = refusals()
        try:
            return self.run(works, passes)
        except torch.OutOfMemoryError as error:
            log.info("no memory for %d at once, so they are done one by one: %s", len(works), error)
            let_go(error)
        release_memory()
        FORGIVEN.add(refused)
        return None

    def pass_on(self, *_: object) -> None:
        """Let the other works come to where this one is."""
        if LANE.get() is not None and (others := getcurrent().parent) is not None:
            modes = Modes.now(self._kind)
            others.switch()
            modes.set()


def in_lane(number: int, work: Callable[[], Made], modes: Modes) -> Made:
    LANE.set(number)
    modes.set()
    return work()


@dataclass(frozen=True, slots=True)
class Foreseen:
    """A forward that was made ahead: its arguments, copies of them as they were then, and its result."""

    call: Call
    kept: Call
    versions: dict[int | str, int]  # of the arguments' tensors: torch counts what is written into them
    result: Any  # None where there is none

    def is_of(self, call: Call) -> bool:
        """Return whether a call has the arguments that it was made with: the same values, laid out in the same way.

        The very tensors, unwritten since, are not compared: to see values on a GPU is to wait for it.
        """
        was, copies, now = values_of(self.call), values_of(self.kept), values_of(call)
        untouched = {name for name, version in versions_of(self.call).items() if version == self.versions[name]}
        return now.keys() == was.keys() and all(
            (value is was[name] and name in untouched)
            or (laid_out(value) == laid_out(was[name]) and same(value, copies[name]))
            for name, value in now.items()
        )


class FirstStep:
    """The forwards of a job's first step, by which those of the other steps are foreseen."""

    def __init__(self) -> None:
        self._seen: list[Call] = []
        self._own: list[set[int | str]] = []  # of each forward: the arguments in which it differs from the first
        self._over = False

    @property
    def together(self) -> int:
        """Return how many forwards a step has, if all but the first can be foreseen from the first; else 1."""
        return max(1, len(self._own))

    def forget(self) -> None:
        """Foresee nothing from now on."""
        self._seen, self._own, self._over = [], [], True

    def see(self, call: Call) -> None:
        """Add a call of the first step; or find, with the first one of the second step, how those of a step differ."""
        if self._over:
            return
        latents = latents_of(call)
        if latents is None or len(self._seen) > MOST:
            self.forget()
        elif not self._seen or same(latents, latents_of(self._seen[0])):
            self._seen.append(call)
        else:
            first, *others = self._seen
            moving = differing(call, first)
            own = [differing(other, first) for other in others]
            if others and moving is not None and all(names is not None and not names & moving for names in own):
                self._own = [set(), *(names or set() for names in own)]
            self._over = True

    def like(self, call: Call, number: int) -> Call:
        """Return the arguments of a step's forward of that number, from those of its first."""
        seen, own = self._seen[number], self._own[number]
        args = tuple(seen.args[place] if place in own else value for place, value in enumerate(call.args))
        return Call(args, {name: seen.kwargs[name] if name in own else v for name, v in call.kwargs.items()})


class Steps:
    """A job's forwards of a module: those of its first step are seen, those of the others made together."""

    def __init__(
        self, lockstep: Lockstep, forward: Callable[..., Any], passes: Passes, may: Callable[[int], bool]
    ) -> None:
        """`may` tells whether so many forwards, from the present one on, can be made together."""
        self._lockstep, self._forward, self._passes, self._may = lockstep, forward, passes, may
        self._first_step = FirstStep()
        self._ahead: list[Foreseen] = []  # in the order in which they will be called

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = Call(args, dict(kwargs))
        if self._ahead:
            foreseen = self._ahead.pop(0)
            if foreseen.result is not None and foreseen.is_of(call):
                return foreseen.result
            self._ahead = []
            self._first_step.forget()  # it goes another way: one by one from now on
        self._first_step.see(call)
        together = self._first_step.together
        if together > 1 and self._may(together) and all(map(is_plain, values_of(call).values())):
            others = [self._first_step.like(call, number) for number in range(1, together)]
            kept = [Call(copy_of(other.args), copy_of(other.kwargs)) for other in others]
            versions = [versions_of(other) for other in others]
            forwards = [functools.partial(self._forward, *one.args, **one.kwargs) for one in (call, *others)]
            made = self._lockstep.try_to_run(forwards, [self._passes])
            if made is None:
                self._first_step.forget()
                return self._forward(*args, **kwargs)
            result, results = made
            self._ahead = [Foreseen(*each) for each in zip(others, kept, versions, results, strict=True)]
            return result
        return self._forward(*args, **kwargs)


@contextlib.contextmanager
def in_lockstep(
    lockstep: Lockstep, module: torch.nn.Module, passes: Passes, may: Callable[[int], bool]
) -> Iterator[None]:
    """Surround a job: forwards of a step that differ in their prompts alone are made together."""
    forward = module.forward
    with standing_in(module, functools.wraps(forward)(Steps(lockstep, forward, passes, may))):
        yield


def values_of(call: Call) -> dict[int | str, Any]:
    values: dict[int | str, Any] = dict(enumerate(call.args))
    values.update(call.kwargs.items())
    return values


def latents_of(call: Call) -> torch.Tensor | None:
    try:
        return main_input(call)
    except StopIteration:
        return None


def differing(one: Call, other: Call) -> set[int | str] | None:
    """Return the arguments in which two calls differ; None where they don't have the same ones."""
    mine, theirs = values_of(one), values_of(other)
    if mine.keys() != theirs.keys():
        return None
    return {name for name, value in mine.items() if not same(value, theirs[name])}


def versions_of(call: Call) -> dict[int | str, int]:
    """Return how often each tensor of a call was written into, of those whose writes torch counts."""
    tensors = {name: value for name, value in values_of(call).items() if isinstance(value, torch.Tensor)}
    return {name: tensor._version for name, tensor in tensors.items() if not tensor.is_inference()}


def laid_out(value: Any) -> Any:
    """Return the layout of all tensors in a value: kernels are chosen by it."""
    return [(t.shape, t.stride(), t.data_ptr() % KERNELS) for t in tree_leaves(value) if isinstance(t, torch.Tensor)]


def copy_of(value: Any) -> Any:
    """Return a value with copies of all tensors, laid out as they are."""

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if leaf.is_contiguous() or 0 in leaf.stride():  # the same place several times can't be written to
            return leaf.clone()
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device).copy_(leaf)

    return tree_map(copied, value)


def is_plain(value: Any) -> bool:
    """Return whether an argument is made of tensors and plain values, and changes nothing of the model.

    Whatever else may have a state; `attention_kwargs={"scale": …}` changes a model's LoRA layers meanwhile.
    """
    leaves = tree_leaves(value)
    if isinstance(value, dict):
        return all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    return all(leaf is None or isinstance(leaf, PLAIN) for leaf in leaves)


PLAIN = (torch.Tensor, bool, int, float, str, torch.dtype, torch.device)
