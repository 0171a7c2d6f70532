"""Requests become jobs: judged by the model of this run and by what there is room for, all of a submission or none."""

import secrets
import time
from collections import OrderedDict
from collections.abc import Sequence

from orchestrator.dispatch.job_queue import JobQueue
from orchestrator.dispatch.leasing import Leasing
from orchestrator.dispatch.quotas import Quotas
from orchestrator.job import LiveJob
from orchestrator.storage.job_store import Store
from protocol.errors import Conflict, NotFound, TriptychError
from protocol.job import JobRequest, Recipe
from protocol.messages.describer import DescriberHello
from protocol.messages.worker import WorkerHello
from protocol.model import ModelDescription
from protocol.recipe import resolve, text_key, texts_to_count


class Tokens:
    """How many tokens texts have, as the describer has counted; the last ones."""

    def __init__(self, most: int = 4096) -> None:
        self._most = most
        self._counts: OrderedDict[str, int] = OrderedDict()

    def __contains__(self, text: str) -> bool:
        return text in self._counts

    def count(self, text: str) -> int:
        """0 where nobody has counted, in a stack without a describer."""
        return self._counts.get(text, 0)

    def learn(self, texts: Sequence[str], counts: Sequence[int]) -> None:
        for text, count in zip(texts, counts, strict=True):
            self._counts[text] = count
            self._counts.move_to_end(text)
        while len(self._counts) > max(self._most, len(texts)):
            self._counts.popitem(last=False)

    def forget(self) -> None:
        self._counts.clear()


class Admission:
    def __init__(self, store: Store, job_queue: JobQueue, quotas: Quotas, leasing: Leasing) -> None:
        self._store, self._job_queue, self._quotas, self._leasing = store, job_queue, quotas, leasing
        self.model: ModelDescription | None = None  # of this run
        self.dtype = ""
        self.speedups: tuple[str, ...] = ()
        self.tokens = Tokens()

    def learn_model(self, hello: WorkerHello | DescriberHello) -> None:
        """Requests are judged by the model of whoever came last."""
        if (hello.model, hello.dtype) != (self.model, self.dtype):
            self._store.remember_model(hello.model)
            self.tokens.forget()
        self.model, self.dtype, self.speedups = hello.model, hello.dtype, hello.speedups

    def uncounted(self, requests: Sequence[JobRequest]) -> list[str]:
        """Texts of which the describer must say how many tokens they have, before the requests can be judged."""
        if self.model is None:
            return []
        texts = [text for request in requests for text in texts_to_count(request, self.model)]
        return [text for text in dict.fromkeys(texts) if text not in self.tokens]

    def admit(self, requests: tuple[JobRequest, ...], owner: str) -> tuple[list[LiveJob], list[LiveJob]]:
        """The requests' jobs, and those of them that are new; those that are here already count as accepted.

        `owner` is the name of the client's key; empty for this machine's own user.
        """
        named, fresh, recipes = self._settle(requests, owner)
        self._quotas.check(fresh, owner)
        self._quotas.spend(len(fresh), owner)
        new = [self._create(request, recipe, owner) for request, recipe in zip(fresh, recipes, strict=True)]
        made = iter(new)
        return [known or next(made) for known in named], new

    def judge(self, requests: tuple[JobRequest, ...], owner: str, earlier: int) -> None:
        """Raise what `admit` would, if so many `earlier` ones had come before them."""
        _, fresh, _ = self._settle(requests, owner)
        self._quotas.check(fresh, owner, earlier)

    def _settle(
        self, requests: tuple[JobRequest, ...], owner: str
    ) -> tuple[list[LiveJob | None], list[JobRequest], list[Recipe]]:
        """The jobs that are here already, None for others; those others, and their recipes."""
        if self.model is None:
            raise NotFound("No worker has joined yet, so the model is not known.")
        named = [self._known(request, owner) for request in requests]
        fresh = [request for request, known in zip(requests, named, strict=True) if known is None]
        ids = [request.id for request in fresh if request.id is not None]
        if len(set(ids)) < len(ids):
            raise Conflict("The same job id is given twice.", "Give each job an id of its own, or none.")
        recipes: list[Recipe] = []
        for item, request in enumerate(requests):
            if named[item] is not None:
                continue
            try:
                recipes.append(resolve(request, self.model, self.dtype, self.tokens.count, self.speedups))
                self._leasing.refuse_what_never_fits(recipes[-1], self.model)
            except TriptychError as error:
                error.item = item
                raise
        return named, fresh, recipes

    def _known(self, request: JobRequest, owner: str) -> LiveJob | None:
        job = self._job_queue.find(request.id) if request.id else None
        if job and (job.request != request.model_dump_json() or job.owner != owner):
            raise Conflict(f"The job id {job.id!r} is taken by a different job.", "Choose another, or give none.")
        return job

    def _create(self, request: JobRequest, recipe: Recipe, owner: str) -> LiveJob:
        job = LiveJob(
            id=request.id or secrets.token_hex(6),
            number=self._store.next_number(),
            priority=request.priority,
            recipe=recipe,
            text_key=text_key(recipe),
            request=request.model_dump_json(),
            created=time.time(),
            owner=owner,
        )
        self._store.insert(job)
        return job
