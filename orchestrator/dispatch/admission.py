"""Admission of requests as jobs, by the model of this run and what there is room for: all of a submission or none."""

import secrets
import time
from collections.abc import Container, Mapping
from dataclasses import dataclass

from pydantic import ValidationError

from orchestrator.dispatch.catalogue import Catalogue, CatalogueEntry
from orchestrator.dispatch.job_queue import JobQueue
from orchestrator.dispatch.leasing import Leasing
from orchestrator.dispatch.quotas import KEPT_INPUTS, Quotas
from orchestrator.job import LiveJob
from orchestrator.principal import KeyHolder, Principal, job_id_of, kept_name
from orchestrator.storage.job_store import Store
from protocol.errors import BadRequest, Conflict, DoesNotFit, TriptychError
from protocol.job import JobRequest, Recipe
from protocol.lora import MAX_JOB_BYTES
from protocol.pictures import extent_of, is_of_its_kind
from protocol.recipe import resolve
from protocol.route import Route, Shape, Template, whole_key
from protocol.stages import FIRST
from protocol.tensors import Tensor
from protocol.units import format_bytes

Pictures = Mapping[str, Tensor]  # that came along, by their digests


@dataclass(frozen=True, slots=True)
class Either:
    """The union of two containers, to look things up in."""

    one: Container[str]
    other: Container[str]

    def __contains__(self, name: object) -> bool:
        return name in self.one or name in self.other


class NotLookedAt(Exception):
    """Not an error: the describers must look at these templates first, each with the name of its model."""

    def __init__(self, templates: Mapping[Template, str]) -> None:
        super().__init__(f"{len(templates)} templates")
        self.templates = templates


class Admission:
    def __init__(
        self,
        store: Store,
        job_queue: JobQueue,
        quotas: Quotas,
        leasing: Leasing,
        catalogue: Catalogue,
        looks: bool = False,
        share_cache: bool = False,
    ) -> None:
        """With `looks`, no job is admitted before a describer has looked at its template.

        With `share_cache` all owners share the embeddings of prompts; else those of a key's holder are its own.
        """
        self._share_cache = share_cache
        self._store, self._job_queue, self._quotas = store, job_queue, quotas
        self._leasing, self._catalogue, self._looks = leasing, catalogue, looks

    def admit(
        self, requests: tuple[JobRequest, ...], owner: Principal, pictures: Pictures
    ) -> tuple[list[LiveJob], list[LiveJob]]:
        """The requests' jobs, and those of them that are new; those that are here already count as accepted.

        NotLookedAt where some of their templates are yet unknown.
        """
        named, fresh, settled = self._settle(requests, owner, pictures)
        self._quotas.check(fresh, owner)
        self._quotas.spend(len(fresh), owner)
        self._keep_pictures({digest for recipe, _ in settled for digest in recipe.pictures}, pictures, owner)
        new = [self._create(request, *found, owner) for request, found in zip(fresh, settled, strict=True)]
        made = iter(new)
        return [known or next(made) for known in named], new

    def judge(self, requests: tuple[JobRequest, ...], owner: Principal, pictures: Pictures, earlier: int) -> None:
        """Raise what `admit` would, if so many `earlier` ones had come before them."""
        _, fresh, _ = self._settle(requests, owner, pictures)
        self._quotas.check(fresh, owner, earlier)

    def _keep_pictures(self, wanted: set[str], pictures: Pictures, owner: Principal) -> None:
        artifacts, names = self._store.artifacts, {kept_name(owner, digest): digest for digest in wanted}
        for name, digest in names.items():
            if artifacts.has("input", name):
                artifacts.touch("input", name)
            else:
                artifacts.put("input", name, (pictures[digest],))
        artifacts.shrink("input", KEPT_INPUTS, spare=Either(self._job_queue.inputs(), names))

    def _shapes(self, request: JobRequest, pictures: Pictures, owner: Principal) -> tuple[Shape, ...]:
        """Return the shapes of a request's pictures; BadRequest where one isn't here, or is of another kind."""
        shapes = tuple(self._shape(digest, pictures, owner) for digest in request.pictures)
        if not all(map(is_of_its_kind, request.named_pictures, shapes)):
            raise BadRequest("Pictures have three channels, masks have one, and videos frames.", "Give them as such.")
        return shapes

    def _shape(self, digest: str, pictures: Pictures, owner: Principal) -> Shape:
        if digest in pictures:
            return pictures[digest].shape
        if kept := self._store.artifacts.specs("input", kept_name(owner, digest)):
            return kept[0][2]
        raise BadRequest("A picture that the job begins from did not come with it.", "Send it along.")

    def _settle(
        self, requests: tuple[JobRequest, ...], owner: Principal, pictures: Pictures
    ) -> tuple[list[LiveJob | None], list[JobRequest], list[tuple[Recipe, Template | None]]]:
        """The jobs that are here already, None for others; those others, their recipes and what they are kinds of."""
        named = [self._known(request, owner) for request in requests]
        fresh = [request for request, known in zip(requests, named, strict=True) if known is None]
        ids = [request.id for request in fresh if request.id is not None]
        if len(set(ids)) < len(ids):
            raise Conflict("The same job id is given twice.", "Give each job an id of its own, or none.")
        settled: list[tuple[Recipe, Template | None]] = []
        unknown: dict[Template, str] = {}
        for item, request in enumerate(requests):
            if named[item] is not None:
                continue
            try:
                entry = self._catalogue.entry_for(request)
                shapes = self._shapes(request, pictures, owner)
                recipe = resolve(
                    request, entry.description, entry.dtype, entry.tokens.count, entry.speedups,
                    *extent_of(dict(zip(request.named_pictures, shapes, strict=True))),
                    loras=[entry.loras.of(lora) for lora in request.loras],
                )  # fmt: skip
                check_lora_bytes(request, entry)
                self._leasing.refuse_what_never_fits(recipe, entry.description)
                template = Template.of(recipe, shapes) if self._looks else None
                settled.append((recipe, template))
                if template:
                    if known := entry.routes.get(template):
                        check_route(known.route, entry.description.pipeline)
                    else:
                        unknown[template] = entry.name
            except TriptychError as error:
                error.item = item
                raise
        if unknown:
            raise NotLookedAt(unknown)
        return named, fresh, settled

    def _known(self, request: JobRequest, owner: Principal) -> LiveJob | None:
        job = self._job_queue.find(job_id_of(owner, request.id)) if request.id else None
        if (
            request.id and job is None and isinstance(owner, KeyHolder)
        ):  # an earlier release took ids as they were given
            earlier = self._job_queue.find(request.id)
            job = earlier if earlier and earlier.owner == owner else None
        if job and not (job.owner == owner and is_of(job.request, request)):
            raise Conflict(f"The job id {request.id!r} is taken by a different job.", "Choose another, or give none.")
        return job

    def _create(self, request: JobRequest, recipe: Recipe, template: Template | None, owner: Principal) -> LiveJob:
        known = self._catalogue.entry_for(request).routes.get(template)
        text_key = known.text_key(recipe) if known else whole_key(recipe)
        job = LiveJob(
            id=job_id_of(owner, request.id) if request.id else secrets.token_hex(6),
            number=self._store.next_number(),
            priority=request.priority,
            recipe=recipe,
            text_key=text_key if self._share_cache else kept_name(owner, text_key),
            template=template,
            stage=known.route.first if known else FIRST,
            request=request.model_dump_json(),
            created=time.time(),
            owner=owner,
        )
        self._store.insert(job)
        return job


def is_of(kept: str, request: JobRequest) -> bool:
    """Return whether a job was made of a request, whose JSON is kept; an earlier release's has fewer fields."""
    if kept == request.model_dump_json():
        return True
    try:
        return JobRequest.model_validate_json(kept) == request
    except ValidationError:  # of a later release
        return False


def check_lora_bytes(request: JobRequest, entry: CatalogueEntry) -> None:
    """Raise DoesNotFit where a job names larger LoRAs than are taken together."""
    size = sum(entry.loras.answer(lora).bytes for lora in request.loras)
    if size > MAX_JOB_BYTES:
        most = format_bytes(MAX_JOB_BYTES)
        raise DoesNotFit(f"The job's LoRAs have {format_bytes(size)} together.", f"At most {most} fit: name fewer.")


def check_route(route: Route, pipeline: str) -> None:
    """Raise BadRequest with a pipeline's own reason why it doesn't take a job."""
    if route.refusal:
        raise BadRequest(f"{pipeline} doesn't take this: {route.refusal.rstrip('.')}.", "Change what it names.")
