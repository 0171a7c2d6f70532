"""Running modulation ahead: learned from one job, done for the jobs that follow. For one GPU and for a split model."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from workers.weights.forward_trace import Call, ForwardTrace, Results, uncompiled, vectors_of
from workers.weights.modulation import Modulation, PrecomputedJob


class JobForwards(Protocol):
    """A job's forwards of the denoiser, before it makes them."""

    @property
    def whole(self) -> bool:
        """Return whether the job begins with its first forward, and has a second."""

    def foresee(self, results: Results) -> Sequence[Call]:
        """The forwards that it will make, if each gives such results."""

    def rehearse(self) -> None:
        """Make its first two forwards, and stop."""


class Owner(Protocol):
    """The holder of the weights of a model, or of a part of it: see Residency."""

    compiled: bool

    def modulation_of(self, layers: Sequence[str]) -> Modulation | None: ...
    def gains(self, modulation: Modulation) -> bool: ...
    def adopt(self, modulation: Modulation) -> None: ...


class Precompute:
    """`owners` have the weights of a model's parts, in the order in which they run; `rows` are its blocks.

    With `several`, jobs of one model take turns on its parts, so the precomputed layers stay in place between them.
    """

    def __init__(self, owners: Sequence[Owner], rows: Sequence[str], several: bool = False) -> None:
        self._owners, self._rows, self._several = owners, rows, several
        self.learned = False
        self.trace: ForwardTrace | None = None  # of the first job, to learn from before the next one
        self._results: Results | None = None
        self._first = ""  # of the layers that run ahead

    @property
    def active(self) -> bool:
        """Return whether there are layers to be run ahead."""
        return bool(self._first)

    def learn(self, trace: ForwardTrace) -> None:
        """Let jobs run their modulation ahead from now on, where that leaves less to stream, or blocks are compiled."""
        self.trace = None
        if trace.forwards < 2:
            return  # too few steps to tell
        self.learned, self._results = True, trace.results
        layers = trace.layers()
        found = [(owner, modulation) for owner in self._owners if (modulation := owner.modulation_of(layers))]
        if not found or found[0][0] is not self._owners[0]:
            return  # it would take half a model to foresee a vector
        if any(owner.compiled for owner in self._owners) or any(owner.gains(m) for owner, m in found):
            self._first = found[0][1].first
            for owner, modulation in found:
                owner.adopt(modulation)
                if self._several:
                    modulation.put(several=True)

    def rehearse(self, model: torch.nn.Module, forwards: JobForwards) -> None:
        """Learn before the first job, so that its compiled code is that of all later ones, and so are its bits."""
        blocks = [model.get_submodule(row) for row in self._rows]
        with uncompiled(blocks), ForwardTrace(model, self._rows) as trace:
            forwards.rehearse()
        self.learn(trace)

    @contextlib.contextmanager
    def watch(self, model: torch.nn.Module) -> Iterator[None]:
        """Trace the job that is done meanwhile, to be learned from."""
        with ForwardTrace(model, self._rows) as self.trace:
            yield

    @contextlib.contextmanager
    def ahead(
        self,
        model: torch.nn.Module,
        forwards: JobForwards,
        alone: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> Iterator[PrecomputedJob]:
        """Foresee a job's vectors, `alone` on the model's first device, and count its forwards meanwhile."""
        assert self._results is not None

        def vectors(calls: Sequence[Call]) -> list[torch.Tensor]:
            with alone():
                return vectors_of(model, self._rows, self._first, calls)

        job = PrecomputedJob(vectors(forwards.foresee(self._results)), lambda call: vectors([call])[0])
        with job.along(model):
            yield job
