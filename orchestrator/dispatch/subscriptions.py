"""The clients that want to hear of each job."""

from collections import defaultdict
from collections.abc import Mapping


class Subscriptions:
    """Forgets a job when it ends and a client when it can't be reached."""

    def __init__(self) -> None:
        self._clients: defaultdict[str, dict[bytes, str]] = defaultdict(dict)  # by job, each with its id for it
        self._jobs: defaultdict[bytes, set[str]] = defaultdict(set)  # by client
        self._round: list[bytes] = []  # clients that are still to be probed
        self._part = self._rounds_left = 0  # of them at a time, and in how many calls yet

    def add(self, client: bytes, job: str, known_as: str = "") -> None:
        """Let a client hear of a job, which it knows by another id where one is given."""
        self._clients[job][client] = known_as or job
        self._jobs[client].add(job)

    def of(self, job: str) -> Mapping[bytes, str]:
        """Return the clients that want to hear of a job, each with the id by which it knows it."""
        return self._clients.get(job, {})

    def count(self, client: bytes) -> int:
        """Return how many jobs a client wants to hear of."""
        return len(self._jobs.get(client, ()))

    def probe(self, rounds: int) -> list[tuple[bytes, str]]:
        """Return the next clients, each with one of its jobs by this stack's id; in so many calls, about each once."""
        if not self._rounds_left:
            self._round, self._rounds_left = list(self._jobs), rounds
            self._part = -(-len(self._round) // rounds)
        self._rounds_left -= 1
        now, self._round = self._round[: self._part], self._round[self._part :]
        return [(client, next(iter(jobs))) for client in now if (jobs := self._jobs.get(client))]

    def forget_job(self, job: str) -> None:
        for client in self._clients.pop(job, ()):
            self._jobs[client].discard(job)
            if not self._jobs[client]:
                del self._jobs[client]

    def forget_client(self, client: bytes) -> None:
        for job in self._jobs.pop(client, ()):
            self._clients[job].pop(client, None)
            if not self._clients[job]:
                del self._clients[job]
