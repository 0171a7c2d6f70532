"""Previews of jobs that are denoised: made while somebody looks, each one asked of its worker anew.

The map to colors that a worker needs for them is fitted to a VAE's first job, and to those that somebody has looked at,
and kept by the VAE's digest. Until there is one, previews are gray.
"""

import base64
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.dispatch.fleet import Worker
from orchestrator.dispatch.outbox import Outbox
from orchestrator.job import LiveJob
from orchestrator.storage.job_store import Store
from protocol.messages.worker import PreviewFit, Progress, WantPreview
from protocol.tensors import Tensor

LOOK_SECONDS = 10.0  # after a look, that previews are yet made
ENOUGH_JOBS = 16  # to fit a map to
MOST_TRIES = 3  # at a VAE's first map, while nobody looks
LARGEST_FIT = 1 << 20  # bytes


@dataclass(slots=True)
class Looked:
    """A job that somebody looks at."""

    until: float  # monotonic seconds
    step: int = 0  # of its last preview
    file: bytes = b""  # JPEG
    asked: bool = False  # its worker makes one


class Previews:
    """`vae_of` a job tells its VAE from others."""

    def __init__(self, store: Store, outbox: Outbox, vae_of: Callable[[LiveJob], str]) -> None:
        self._store, self._outbox, self._vae_of = store, outbox, vae_of
        self._looked: dict[str, Looked] = {}
        self._tries: Counter[str] = Counter()  # jobs of which a VAE's first map was to be fitted
        self._fits: dict[str, tuple[int, Tensor | None]] = {}  # jobs and map, by VAE

    def look(self, job: LiveJob) -> Looked:
        """Return a job's last preview, and have more made for a while."""
        until = time.monotonic() + LOOK_SECONDS
        looked = self._looked.setdefault(job.id, Looked(until))
        looked.until = until
        if job.worker and job.stage == "denoise" and not looked.asked:
            self._ask(job, looked)
        return looked

    def _ask(self, job: LiveJob, looked: Looked) -> None:
        _, fit = self._fit(self._vae_of(job))
        if job.worker:
            looked.asked = True
            want = WantPreview(job=job.id, stage=job.stage, attempt=job.attempt)
            self._outbox.to_worker(bytes.fromhex(job.worker), want, () if fit is None else (fit,))

    def learns(self, job: LiveJob) -> bool:
        """Return whether colors are to be learned of a job: they aren't known, or not well and somebody looks at it."""
        if job.stage != "denoise":
            return False
        vae = self._vae_of(job)
        known = self._fit(vae)[0]
        if known == 0 and self._tries[vae] < MOST_TRIES:
            self._tries[vae] += 1
            return True
        return known < ENOUGH_JOBS and job.id in self._looked

    def handed_out(self, job: LiveJob) -> None:
        """Ask for a preview of a job that has just been given to a worker, where somebody looks at it."""
        if job.stage == "denoise" and (looked := self._looked.get(job.id)):
            looked.asked = False
            self._ask(job, looked)

    def came(self, job: LiveJob, progress: Progress) -> None:
        """Keep a preview, and ask for the next one while somebody looks."""
        if (looked := self._looked.get(job.id)) is None:
            return
        looked.step, looked.file, looked.asked = progress.step, progress.preview, False
        if time.monotonic() < looked.until:
            self._ask(job, looked)

    def forget(self, job_id: str) -> None:
        self._looked.pop(job_id, None)

    # -- the map to colors ----------------------------------------------------------------------

    def fitted(self, worker: Worker, job: LiveJob, fit: PreviewFit, tensors: tuple[Tensor, ...]) -> None:
        """Keep a map that was fitted to more jobs than the one that is known; of this machine's own workers alone."""
        if worker.process.key or len(tensors) != 1:
            return
        (tensor,) = tensors
        vae = self._vae_of(job)
        known, _ = self._fit(vae)
        if tensor.dtype != "float32" or len(tensor.shape) != 2 or tensor.nbytes > LARGEST_FIT or fit.jobs < known:
            return
        data = bytes(tensor.data)
        self._fits[vae] = fit.jobs, Tensor("fit", "float32", tensor.shape, data)
        kept = {"jobs": fit.jobs, "shape": tensor.shape, "data": base64.b64encode(data).decode()}
        self._store.set(key_of(vae), json.dumps(kept))

    def _fit(self, vae: str) -> tuple[int, Tensor | None]:
        if vae not in self._fits:
            text = self._store.setting(key_of(vae))
            self._fits[vae] = read_fit(text) if text else (0, None)
        return self._fits[vae]


def key_of(vae: str) -> str:
    return f"preview-fit {vae}"


def read_fit(text: str) -> tuple[int, Tensor | None]:
    kept = json.loads(text)
    data, shape = base64.b64decode(kept["data"]), tuple(kept["shape"])
    return int(kept["jobs"]), Tensor("fit", "float32", shape, data)
