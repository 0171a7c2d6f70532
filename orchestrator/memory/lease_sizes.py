"""The sizes of leases of a GPU: pure arithmetic on what its workers need.

If all fit, all are in. If not, workers on several GPUs are in first, but for the least of the others. Of the others
one, the largest whose tasks take longer than a moment, works in what the rest leave: those that can do with little keep
that little beside it, as long as the largest still has a quarter of its weights in place: streaming the rest costs
little up to there. Workers that find no room take turns.

Of several that lend, which are the denoisers of several models, all stay where there is room for all of each; else they
take turns, since streaming most of a model in every step costs more than a copy of it at each turn.

Those whose tasks take a moment hold nothing beside a largest one that lends: they borrow from it, between two of its
steps, what they need, and the rest of the time it has all that they would hold.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

LEAST_IN_PLACE = 0.25  # of the largest one's weights, for others to stay beside it
KEPT_BETWEEN_STEPS = 0.25  # of a workspace: latents, embeddings, what was computed ahead


@dataclass(frozen=True, slots=True)
class Need:
    """A worker's need of a GPU, in bytes; `least` of weights is where all that can be is streamed."""

    weights: int
    least: int
    workspace: int
    spread: bool = False  # it is a part of what lies on several GPUs
    lends: bool = False  # what others need for a moment, between two of its steps
    momentary: bool = False  # its tasks take a moment

    @property
    def whole(self) -> int:
        return self.weights + self.workspace

    @property
    def small(self) -> int:
        return self.least + self.workspace

    @property
    def between_steps(self) -> int:
        """Bytes that it can't lend."""
        return self.least + int(self.workspace * KEPT_BETWEEN_STEPS)


@dataclass(frozen=True, slots=True)
class Loan:
    """Bytes of a worker's lease that it lends for a moment: asked for, and then given."""

    bytes: int
    given: bool = False


@dataclass(frozen=True, slots=True)
class LeaseSize:
    """Bytes that a worker may have: `shared`, whatever others do; and at most, `exclusive`; 0 if it can't fit."""

    shared: int
    exclusive: int
    borrows: bool = False  # it holds nothing but for moments, in what the largest lends


def lease_sizes(available: int, needs: Mapping[str, Need]) -> dict[str, LeaseSize]:
    """Return each worker's size on a GPU of `available` bytes; all `shared` fit together, and with an `exclusive` one.

    Where all denoisers stay, what has a turn beside them may need room that one of them makes.
    """
    if sum(need.whole for need in needs.values()) <= available:
        return {name: LeaseSize(need.whole, need.whole) for name, need in needs.items()}
    spread = {name: need for name, need in needs.items() if need.spread}
    others = {name: need for name, need in needs.items() if not need.spread}
    left = max(0, available - sum(need.small for need in needs.values()))
    taken: dict[str, int] = {}
    for name, need in spread.items():
        taken[name] = min(need.whole, need.small + left)
        left -= taken[name] - need.small
    if spread and len(needs) > 1 and sum(taken.values()) <= available:
        rest = lease_sizes(available - sum(taken.values()), others)
        alone = {n: min(need.whole, available) for n, need in others.items() if not rest[n].exclusive}
        turns = {n: LeaseSize(0, size) for n, size in alone.items() if others[n].small <= available}
        return rest | turns | {name: LeaseSize(size, size) for name, size in taken.items()}
    largest = largest_of(needs)
    main = needs[largest]
    rivals = {name: need for name, need in needs.items() if name != largest and need.lends and main.lends}
    if rivals and (together := all_denoisers_in(available, needs, largest, rivals)):
        return together
    left = available - main.workspace - max(main.least, int(main.weights * LEAST_IN_PLACE))
    beside = {name: need for name, need in needs.items() if name != largest and name not in rivals}
    momentary = {name for name, need in beside.items() if need.momentary and main.lends}
    lent = available - main.between_steps - sum(smallest_first(left, beside, momentary).values())
    borrow = {name for name in momentary if needs[name].small <= lent}
    shared = smallest_first(left, beside, borrow)
    found: dict[str, LeaseSize] = {}
    for name, need in needs.items():
        turn = min(need.whole, available - sum(size for other, size in shared.items() if other != name))
        if turn < need.small:
            turn = available if need.small <= available else 0  # alone, then
            turn = min(turn, need.whole)
        found[name] = LeaseSize(shared.get(name, 0), turn, name in borrow)
    return found


def all_denoisers_in(
    available: int, needs: Mapping[str, Need], largest: str, rivals: Mapping[str, Need]
) -> dict[str, LeaseSize] | None:
    """Return the sizes where the largest and all its rivals stay, whole; None where that leaves others no room."""
    left = available - sum(need.whole for need in rivals.values())
    rest = lease_sizes(left, {name: need for name, need in needs.items() if name not in rivals})
    others = sum(size.shared for name, size in rest.items() if name != largest)
    if needs[largest].whole + others > left or not all(size.exclusive for size in rest.values()):
        return None
    stay = {name: needs[name].whole for name in (largest, *rivals)}
    return rest | {name: LeaseSize(whole, whole) for name, whole in stay.items()}


def largest_of(needs: Mapping[str, Need]) -> str:
    """Return who works in what the others leave: the largest whose tasks take longer than a moment, if there is one."""
    return max(needs, key=lambda name: (not needs[name].momentary, needs[name].weights, name))


def smallest_first(left: int, needs: Mapping[str, Need], without: Collection[str]) -> dict[str, int]:
    """Return how much of what is `left` each gets that does with little; nobody where it isn't enough."""
    found: dict[str, int] = {}
    for name, need in sorted(needs.items(), key=lambda item: (item[1].small, item[0])):
        if name not in without and need.small <= left:
            found[name] = need.small
            left -= need.small
    return found
