"""Admission of requests as jobs, by the model of this run and what there is room for: all of a submission or none."""

import secrets
import time
from collections.abc import Container, Mapping
from dataclasses import dataclass

from orchestrator.dispatch.catalogue import Catalogue
from orchestrator.dispatch.job_queue import JobQueue
from orchestrator.dispatch.leasing import Leasing
from orchestrator.dispatch.quotas import KEPT_INPUTS, Quotas
from orchestrator.job import LiveJob
from orchestrator.principal import Principal
from orchestrator.storage.job_store import Store
from protocol.errors import BadRequest, Conflict, TriptychError
from protocol.job import JobRequest, Recipe
from protocol.recipe import resolve, text_key
from protocol.tensors import Tensor

Pictures = Mapping[str, Tensor]  # that came along, by their digests


@dataclass(frozen=True, slots=True)
class Either:
    """The union of two containers, to look things up in."""

    one: Container[str]
    other: Container[str]

    def __contains__(self, name: object) -> bool:
        return name in self.one or name in self.other


class Admission:
    def __init__(
        self, store: Store, job_queue: JobQueue, quotas: Quotas, leasing: Leasing, catalogue: Catalogue
    ) -> None:
        self._store, self._job_queue, self._quotas = store, job_queue, quotas
        self._leasing, self._catalogue = leasing, catalogue

    def admit(
        self, requests: tuple[JobRequest, ...], owner: Principal, pictures: Pictures
    ) -> tuple[list[LiveJob], list[LiveJob]]:
        """The requests' jobs, and those of them that are new; those that are here already count as accepted."""
        named, fresh, recipes = self._settle(requests, owner, pictures)
        self._quotas.check(fresh, owner)
        self._quotas.spend(len(fresh), owner)
        self._keep_pictures({digest for recipe in recipes for digest in recipe.pictures}, pictures)
        new = [self._create(request, recipe, owner) for request, recipe in zip(fresh, recipes, strict=True)]
        made = iter(new)
        return [known or next(made) for known in named], new

    def judge(self, requests: tuple[JobRequest, ...], owner: Principal, pictures: Pictures, earlier: int) -> None:
        """Raise what `admit` would, if so many `earlier` ones had come before them."""
        _, fresh, _ = self._settle(requests, owner, pictures)
        self._quotas.check(fresh, owner, earlier)

    def _keep_pictures(self, wanted: set[str], pictures: Pictures) -> None:
        artifacts = self._store.artifacts
        for digest in wanted:
            if artifacts.has("input", digest):
                artifacts.touch("input", digest)
            else:
                artifacts.put("input", digest, (pictures[digest],))
        artifacts.shrink("input", KEPT_INPUTS, spare=Either(self._job_queue.inputs(), wanted))

    def _picture_size(self, request: JobRequest, pictures: Pictures) -> tuple[int, int] | None:
        """Return the (width, height) of the first picture; BadRequest where one isn't here, or is of another kind."""
        shapes = [self._shape(digest, pictures) for digest in request.pictures]
        kinds = [channels for _, _, channels in shapes]
        if kinds != [3] * len(request.images) + [1] * (request.mask is not None):
            raise BadRequest("Pictures have three channels, and masks have one.", "Give them as such.")
        return (shapes[0][1], shapes[0][0]) if shapes else None

    def _shape(self, digest: str, pictures: Pictures) -> tuple[int, ...]:
        kept = () if digest in pictures else self._store.artifacts.get("input", digest)
        if kept is None:
            raise BadRequest("A picture that the job begins from did not come with it.", "Send it along.")
        return (kept[0] if kept else pictures[digest]).shape

    def _settle(
        self, requests: tuple[JobRequest, ...], owner: Principal, pictures: Pictures
    ) -> tuple[list[LiveJob | None], list[JobRequest], list[Recipe]]:
        """The jobs that are here already, None for others; those others, and their recipes."""
        entry = self._catalogue.default()
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
                recipes.append(
                    resolve(
                        request, entry.description, entry.dtype, entry.tokens.count, entry.speedups,
                        self._picture_size(request, pictures),
                    )
                )  # fmt: skip
                self._leasing.refuse_what_never_fits(recipes[-1], entry.description)
            except TriptychError as error:
                error.item = item
                raise
        return named, fresh, recipes

    def _known(self, request: JobRequest, owner: Principal) -> LiveJob | None:
        job = self._job_queue.find(request.id) if request.id else None
        if job and (job.request != request.model_dump_json() or job.owner != owner):
            raise Conflict(f"The job id {job.id!r} is taken by a different job.", "Choose another, or give none.")
        return job

    def _create(self, request: JobRequest, recipe: Recipe, owner: Principal) -> LiveJob:
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
