"""The most that any schedule could have done: work conservation, as a fluid."""

from collections.abc import Sequence


def most_done(
    arrivals: Sequence[float],
    alone: float,
    seconds: float,
    gpus: int,
    changes: Sequence[tuple[float, int]],
    marks: Sequence[float],
) -> list[float]:
    """Return the most jobs that can be done by each of `marks` (seconds, in order).

    `arrivals` are in order; a job takes at least `alone` seconds, and `seconds` of one of so many `gpus`; `changes` are
    moments at which some go or come back. No schedule does more: no GPU is idle while something waits, nothing is done
    twice, and jobs can be divided at will.
    """  # fmt: skip
    moments = [(at + max(0.0, alone - seconds), 1, 0.0) for at in arrivals]
    moments += [(at, 0, float(count)) for at, count in changes] + [(at, 0, 0.0) for at in marks]
    found: dict[float, float] = {}
    now, waiting, done, there = 0.0, 0.0, 0.0, float(gpus)
    left = set(marks)
    for at, jobs, more in sorted(moments):
        finished = min(waiting, (at - now) * there / seconds)
        waiting, done, now = waiting - finished + jobs, done + finished, at
        there += more
        if at in left:
            found[at] = done
    return [found[at] for at in marks]
