"""Quotas: a job is accepted only where there is room for it, to the end."""

import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from orchestrator.job import LiveJob
from orchestrator.principal import KeyHolder, Principal
from orchestrator.settings import OrchestratorSettings
from orchestrator.storage.job_store import Store
from orchestrator.token_bucket import TokenBucket
from protocol.errors import QueueFull
from protocol.job import JobRequest
from protocol.units import format_bytes

KEPT_INPUTS = 1_000_000_000  # bytes of pictures to begin from that are kept when no unfinished job needs them
LOOK_SECONDS = 1.0  # between two looks at the disk


class Quotas:
    """Counts the unfinished jobs, all together and by owner."""

    def __init__(
        self,
        settings: OrchestratorSettings,
        store: Store,
        disk: Path,
        free: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
    ) -> None:
        """`free` gives the bytes that are left on a path's disk."""
        self._settings, self._store, self._disk, self._free_of = settings, store, disk, free
        self.jobs = 0
        self.request_bytes = 0
        self._of: defaultdict[Principal, int] = defaultdict(int)  # by owner
        self._buckets: dict[str, TokenBucket] = {}  # by the names of keys
        self._free, self._looked = 0, -LOOK_SECONDS

    def add(self, job: LiveJob, by: int = 1) -> None:
        """Count a job that begins, or with `by` -1 one that ends."""
        self.jobs += by
        self.request_bytes += by * len(job.request)
        self._of[job.owner] += by
        if not self._of[job.owner]:
            del self._of[job.owner]

    def check(self, requests: Sequence[JobRequest], owner: Principal, earlier: int = 0) -> None:
        """Check that so many more may come, after so many `earlier` ones; QueueFull says what is in the way."""
        limits, count = self._settings, len(requests) + earlier
        if self.jobs + count > limits.queue_limit:
            raise QueueFull(
                f"The queue holds {self.jobs} of at most {limits.queue_limit} jobs; {count} more don't fit.",
                "Wait for some to finish, cancel some, or start the stack with a larger --queue-limit.",
            )
        if (held := self.held()) > limits.queue_bytes:
            raise QueueFull(
                f"Unfinished jobs hold {format_bytes(held)} of at most {format_bytes(limits.queue_bytes)}.",
                "Wait for some to finish, cancel some, or start the stack with a larger --queue-bytes.",
            )
        if (free := self.free()) < limits.disk_floor:
            raise QueueFull(
                f"The disk of {str(self._disk)!r} has {format_bytes(free)} left; "
                f"{format_bytes(limits.disk_floor)} are kept for jobs that are accepted already.",
                "Make room there, start the stack with a smaller --disk-floor, or elsewhere with --state DIR.",
            )
        if isinstance(owner, KeyHolder):
            self._check_holder(owner, count)

    def held(self) -> int:
        """Bytes on disk and in memory that unfinished jobs hold, embeddings that wait to be used included."""
        sizes = self._store.artifacts.bytes_of
        spare = max(0, sizes["text"] - self._settings.embedding_cache) + max(0, sizes["input"] - KEPT_INPUTS)
        return self.request_bytes + sizes["latents"] + sizes["checkpoint"] + spare

    def free(self) -> int:
        """Bytes left on the disk, as of the last look."""
        now = time.monotonic()
        if now - self._looked >= LOOK_SECONDS:
            self._free, self._looked = self._free_of(self._disk), now
        return self._free

    def _check_holder(self, owner: KeyHolder, count: int) -> None:
        limits, unfinished = self._settings, self._of.get(owner, 0)
        if unfinished + count > limits.client_jobs:
            raise QueueFull(
                f"The client {owner.name!r} has {unfinished} of at most {limits.client_jobs} unfinished jobs; "
                f"{count} more don't fit.",
                "Wait for some to finish, or cancel some.",
            )
        if (left := self._bucket(owner).left()) < count:
            raise QueueFull(
                f"The client {owner.name!r} may submit {limits.client_rate:g} jobs a second; {count} more come too "
                "soon.",
                f"Try again in {(count - left) / limits.client_rate:.0f} seconds.",
            )

    def _bucket(self, owner: KeyHolder) -> TokenBucket:
        rate = self._settings.client_rate
        return self._buckets.setdefault(owner.name, TokenBucket(rate, burst=rate * 60))

    def spend(self, count: int, owner: Principal) -> None:
        """Count so many of a client's jobs as let in; the local user has no rate to keep to."""
        if isinstance(owner, KeyHolder):
            self._bucket(owner).take(count)
