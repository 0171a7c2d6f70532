"""Counts and distributions that a stack keeps of its work since its orchestrator was started."""

from typing import Annotated, Literal

from pydantic import Field

from protocol.data import Data

Word = Annotated[str, Field(max_length=256)]


class Sample(Data):
    """One series of a metric."""

    labels: Annotated[tuple[Word, ...], Field(max_length=8)]  # their values, in the order of the metric's names
    value: float  # of a distribution the sum of what was measured
    counts: Annotated[tuple[int, ...], Field(max_length=64)] = ()  # of a distribution, by its limits; the last: above


class Metric(Data):
    name: Word  # without the prefix of all
    kind: Literal["counter", "histogram"]
    what: Word  # it counts, for a person
    labels: Annotated[tuple[Word, ...], Field(max_length=8)] = ()  # their names
    limits: Annotated[tuple[float, ...], Field(max_length=63)] = ()  # of a distribution, in seconds
    samples: Annotated[tuple[Sample, ...], Field(max_length=10_000)] = ()
