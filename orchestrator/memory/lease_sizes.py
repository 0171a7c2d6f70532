"""The sizes of leases of a GPU: pure arithmetic on what its workers need.

If all fit, all are in. If not, workers on several GPUs are in first, but for the least of the others. Of the others
one, the largest, works in what the rest leave: those that can do with little keep that little beside it, as long as the
largest still has a quarter of its weights in place: streaming the rest costs little up to there. Workers that find no
room take turns.
"""

from collections.abc import Mapping
from dataclasses import dataclass

LEAST_IN_PLACE = 0.25  # of the largest one's weights, for others to stay beside it


@dataclass(frozen=True, slots=True)
class Need:
    """A worker's need of a GPU, in bytes; `least` of weights is where all that can be is streamed."""

    weights: int
    least: int
    workspace: int
    spread: bool = False  # it is a part of what lies on several GPUs

    @property
    def whole(self) -> int:
        return self.weights + self.workspace

    @property
    def small(self) -> int:
        return self.least + self.workspace


@dataclass(frozen=True, slots=True)
class LeaseSize:
    """Bytes that a worker may have: `shared`, whatever others do; and at most, `exclusive`; 0 if it can't fit."""

    shared: int
    exclusive: int


def lease_sizes(available: int, needs: Mapping[str, Need]) -> dict[str, LeaseSize]:
    """Return each worker's size on a GPU of `available` bytes; all `shared` fit together, with any one `exclusive`."""
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
    largest = max(needs, key=lambda name: (needs[name].weights, name))
    main = needs[largest]
    left = available - main.workspace - max(main.least, int(main.weights * LEAST_IN_PLACE))
    shared = dict.fromkeys(needs, 0)
    for name, need in sorted(needs.items(), key=lambda item: (item[1].small, item[0])):
        if name != largest and need.small <= left:
            shared[name] = need.small
            left -= need.small
    found: dict[str, LeaseSize] = {}
    for name, need in needs.items():
        turn = min(need.whole, available - sum(size for other, size in shared.items() if other != name))
        if turn < need.small:
            turn = available if need.small <= available else 0  # alone, then
            turn = min(turn, need.whole)
        found[name] = LeaseSize(shared[name], turn)
    return found
