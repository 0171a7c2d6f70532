"""Requests become jobs: judged by the model of this run and by what there is room for, all of a submission or none."""

import secrets
import time

from orchestrator.intake import Intake
from orchestrator.lending import Lending
from orchestrator.live import LiveJob
from orchestrator.roster import Roster
from orchestrator.store import Store
from protocol.errors import Conflict, NotFound
from protocol.jobs import JobRequest, ModelDescription, Recipe
from protocol.messages import WorkerHello
from protocol.recipes import CountTokens, resolve, text_key, token_counter
from protocol.tensors import Tensor


class Reception:
    def __init__(self, store: Store, roster: Roster, intake: Intake, lending: Lending) -> None:
        self._store, self._roster, self._intake, self._lending = store, roster, intake, lending
        self.model: ModelDescription | None = None  # of the workers of this run
        self.dtype = ""
        self.speedups: tuple[str, ...] = ()
        self._count_tokens: CountTokens | None = None

    def learn_model(self, hello: WorkerHello, tokenizer: Tensor | None) -> None:
        """Requests are judged by the model of the worker that came last."""
        model, dtype, self.speedups = hello.model, hello.dtype, hello.speedups
        data = bytes(tokenizer.data) if tokenizer else None
        if model == self.model and dtype == self.dtype and (data is None or self._count_tokens):
            return
        self._store.remember_model(model, data)
        self.model, self.dtype = model, dtype
        self._count_tokens = token_counter(self._store.tokenizer(model.revision))

    def admit(self, requests: tuple[JobRequest, ...], owner: str) -> tuple[list[LiveJob], list[LiveJob]]:
        """The requests' jobs, and those of them that are new; those that are here already count as accepted.

        `owner` is the name of the client's key; empty for this machine's own user.
        """
        model = self.model
        if model is None:
            raise NotFound("No worker has joined yet, so the model is not known.")
        named = [self._known(request, owner) for request in requests]
        fresh = [request for request, known in zip(requests, named, strict=True) if known is None]
        ids = [request.id for request in fresh if request.id is not None]
        if len(set(ids)) < len(ids):
            raise Conflict("The same job id is given twice.", "Give each job an id of its own, or none.")
        self._intake.check(fresh, owner)
        recipes = [resolve(request, model, self.dtype, self._count_tokens, self.speedups) for request in fresh]
        for recipe in recipes:
            self._lending.refuse_what_never_fits(recipe, model)
        new = [self._create(request, recipe, owner) for request, recipe in zip(fresh, recipes, strict=True)]
        made = iter(new)
        return [known or next(made) for known in named], new

    def _known(self, request: JobRequest, owner: str) -> LiveJob | None:
        job = self._roster.find(request.id) if request.id else None
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
