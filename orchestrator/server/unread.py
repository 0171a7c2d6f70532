"""Bytes of answers that peers have not taken yet: they lie in this process's memory, or in a door's, until they do."""

from collections import deque
from collections.abc import Sequence

import zmq

from orchestrator.principal import Principal

PEER_BYTES = 16 << 20  # unread, after which a peer gets no further answer
PRINCIPAL_BYTES = 64 << 20  # the same of all peers of a principal together


class Unread:
    def __init__(self) -> None:
        self._sizes: dict[Principal, dict[bytes, int]] = {}
        self._tracked: deque[tuple[Principal, bytes, int, Sequence[zmq.MessageTracker]]] = deque()

    def add(
        self, principal: Principal, peer: bytes, size: int, trackers: Sequence[zmq.MessageTracker] | None = None
    ) -> None:
        """Note an answer that was sent: it is read when its trackers are done; without any, when `read` says so."""
        sizes = self._sizes.setdefault(principal, {})
        sizes[peer] = sizes.get(peer, 0) + size
        if trackers is not None:
            self._tracked.append((principal, peer, size, trackers))

    def read(self, principal: Principal, peer: bytes, size: int) -> None:
        """Note that so many bytes more were read."""
        sizes = self._sizes.get(principal, {})
        left = sizes.get(peer, 0) - size
        if left > 0:
            sizes[peer] = left
        else:
            self.forget(principal, peer)

    def forget(self, principal: Principal, peer: bytes) -> None:
        """Forget a peer that is gone, and takes nothing with it."""
        sizes = self._sizes.get(principal, {})
        sizes.pop(peer, None)
        if not sizes:
            self._sizes.pop(principal, None)

    def forget_behind(self, prefix: bytes) -> None:
        """Forget all peers that begin so: their door has come anew."""
        for principal, sizes in list(self._sizes.items()):
            for peer in [peer for peer in sizes if peer.startswith(prefix)]:
                self.forget(principal, peer)

    def takes_answers(self, principal: Principal, peer: bytes) -> bool:
        """Return whether a peer has read enough of what it asked for to get more."""
        for _ in range(len(self._tracked)):
            entry = self._tracked.popleft()
            if all(tracker.done for tracker in entry[3]):
                self.read(*entry[:3])
            else:
                self._tracked.append(entry)
        sizes = self._sizes.get(principal, {})
        own = sizes.get(peer, 0)
        return own < PEER_BYTES and (not own or sum(sizes.values()) < PRINCIPAL_BYTES)
