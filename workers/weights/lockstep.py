"""The forwards of one denoising step, made block by block in turns: streamed weights pass once for all of them.

With true classifier-free guidance a step has two forwards or more, which differ in their prompts alone. What the second
one will be given is foreseen at the first one, from the steps before; it is made along with it, and its result is given
once it is called with that. Where it is called with anything else it is made anew, so that results never depend on what
was foreseen. Each forward is computed alone, by the same calls, so its bits are those of one after the other.
"""

import contextlib
import contextvars
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch.utils._pytree import tree_leaves, tree_map

from workers.errors import let_go
from workers.weights.forward_trace import Call, main_input, same, standing_in

log = logging.getLogger(__name__)

MOST = 4  # forwards of a step
KERNELS = 64  # bytes; by no multiple of more are kernels chosen: allocators start tensors at any


Made = TypeVar("Made")


class Lane(threading.local):
    """The place of the forward that a thread makes among those in lockstep; None where it is made alone."""

    number: int | None = None


LANE = Lane()


class Ended(Exception):
    """Not an error: the forwards that this one accompanies have broken off."""


class Passes(Protocol):
    """Blocks whose weights are streamed: see Ring."""

    def shared(self, last: Callable[[], bool]) -> contextlib.AbstractContextManager[None]: ...


class Turns:
    """The turns of so many threads, one of which runs at a time: each goes on until it reaches a block or its end."""

    def __init__(self, count: int) -> None:
        self.broken = False
        self._lanes = list(range(count))  # that are on their way
        self._go = [threading.Semaphore(0) for _ in self._lanes]

    def at_last(self) -> bool:
        """Return whether no other one is yet to come where this thread's has been."""
        return LANE.number == max(self._lanes)

    def wait(self, lane: int) -> None:
        self._go[lane].acquire()
        if self.broken:
            raise Ended

    def pass_on(self, lane: int) -> None:
        """Let the next one go on, and wait until it is this one's turn again; Ended."""
        following = self._after(lane)
        if following != lane:
            self._go[following].release()
            self.wait(lane)

    def leave(self, lane: int) -> None:
        following = self._after(lane)
        self._lanes.remove(lane)
        if following != lane:
            self._go[following].release()

    def _after(self, lane: int) -> int:
        return self._lanes[(self._lanes.index(lane) + 1) % len(self._lanes)]


class Lockstep:
    """Works that take turns at some blocks, up to `most` at once."""

    def __init__(self, blocks: Sequence[torch.nn.Module], device: torch.device, most: int = MOST) -> None:
        self._blocks, self._device = blocks, device
        self._threads = ThreadPoolExecutor(most - 1, "lockstep")
        self._turns: Turns | None = None

    def run(self, works: Sequence[Callable[[], Made]], passes: Sequence[Passes]) -> tuple[Made, list[Made | None]]:
        """Return the results of the first one, done in this thread, and of the others; None where one has failed."""
        self._turns = turns = Turns(len(works))
        hooks = [block.register_forward_pre_hook(self._at_block, prepend=True) for block in self._blocks]
        try:
            with contextlib.ExitStack() as stack:
                for one in passes:
                    stack.enter_context(one.shared(turns.at_last))
                others = [self._beside(turns, lane, work) for lane, work in enumerate(works) if lane]
                try:
                    first = in_lane(0, works[0])
                except BaseException:
                    turns.broken = True
                    raise
                finally:
                    turns.leave(0)
                    results = [other.result() for other in others]
            return first, results
        finally:
            for hook in hooks:
                hook.remove()

    def _beside(self, turns: Turns, lane: int, work: Callable[[], Made]) -> "Future[Made | None]":
        kind, grad, inference = self._device.type, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        stream = torch.cuda.current_stream(self._device) if kind == "cuda" else None

        def run() -> Made | None:
            try:
                turns.wait(lane)
                with contextlib.ExitStack() as stack:
                    stack.enter_context(torch.inference_mode(inference))
                    stack.enter_context(torch.set_grad_enabled(grad))
                    stack.enter_context(autocast)
                    if stream is not None:
                        stack.enter_context(torch.cuda.stream(stream))
                    return in_lane(lane, work)
            except Exception as error:  # it is done once more when it is asked for, and tells then
                log.debug("a work beside another failed: %s", error)
                let_go(error)
                return None
            finally:
                turns.leave(lane)

        return self._threads.submit(contextvars.copy_context().run, run)

    def _at_block(self, *_: object) -> None:
        if LANE.number is not None and self._turns is not None:
            self._turns.pass_on(LANE.number)


def in_lane(lane: int, work: Callable[[], Made]) -> Made:
    LANE.number = lane
    try:
        return work()
    finally:
        LANE.number = None


@dataclass(frozen=True, slots=True)
class Foreseen:
    """A forward that was made ahead: its arguments, copies of them as they were then, and its result."""

    call: Call
    kept: Call
    result: Any  # None where there is none

    def is_of(self, call: Call) -> bool:
        """Return whether a call has the arguments that it was made with: the same values, laid out in the same way."""
        was, copies, now = values_of(self.call), values_of(self.kept), values_of(call)
        return now.keys() == was.keys() and all(
            laid_out(value) == laid_out(was[name]) and same(value, copies[name]) for name, value in now.items()
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
        if together > 1 and self._may(together) and all(map(leaves_no_trace, values_of(call).values())):
            others = [self._first_step.like(call, number) for number in range(1, together)]
            kept = [Call(copy_of(other.args), copy_of(other.kwargs)) for other in others]
            forwards = [functools.partial(self._forward, *one.args, **one.kwargs) for one in (call, *others)]
            result, results = self._lockstep.run(forwards, [self._passes])
            self._ahead = [Foreseen(*each) for each in zip(others, kept, results, strict=True)]
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


def laid_out(value: Any) -> Any:
    """Return the layout of all tensors in a value: kernels are chosen by it."""
    return [(t.shape, t.stride(), t.data_ptr() % KERNELS) for t in tree_leaves(value) if isinstance(t, torch.Tensor)]


def copy_of(value: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, value)


def leaves_no_trace(value: Any) -> bool:
    """Return whether an argument changes nothing of the model, as `attention_kwargs={"scale": …}` does meanwhile."""
    return not isinstance(value, dict) or all(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value))
