"""The clients that want to hear of each job."""

from collections import defaultdict


class Subscriptions:
    """Forgets a job when it ends and a client when it can't be reached."""

    def __init__(self) -> None:
        self._clients: defaultdict[str, set[bytes]] = defaultdict(set)  # by job
        self._jobs: defaultdict[bytes, set[str]] = defaultdict(set)  # by client

    def add(self, client: bytes, job: str) -> None:
        self._clients[job].add(client)
        self._jobs[client].add(job)

    def of(self, job: str) -> set[bytes]:
        return self._clients.get(job, set())

    def forget_job(self, job: str) -> None:
        for client in self._clients.pop(job, ()):
            self._jobs[client].discard(job)
            if not self._jobs[client]:
                del self._jobs[client]

    def forget_client(self, client: bytes) -> None:
        for job in self._jobs.pop(client, ()):
            self._clients[job].discard(client)
            if not self._clients[job]:
                del self._clients[job]
