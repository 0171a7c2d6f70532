"""Numbering questions, and telling answers from events, for both clients. No sockets in here."""

import contextlib
import itertools
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from protocol import wire
from protocol.client.input_pictures import Inputs, picture_of, video_of
from protocol.errors import BadRequest, JobCancelled, JobFailed, TriptychError, from_wire
from protocol.job import Job, JobRequest
from protocol.messages.client import (
    TO_CLIENT,
    AddModel,
    Cancel,
    Drain,
    FetchPictures,
    GetJobs,
    GetLoras,
    GetMetrics,
    GetModels,
    GetPreview,
    GetStack,
    GetWorkers,
    JobEvent,
    LoadModel,
    OfferLora,
    PutLora,
    Question,
    Scale,
    Submit,
    Watch,
)
from protocol.messages.common import MAX_JOBS, Error
from protocol.sockets import new_identity
from protocol.tensors import Buffer, Tensor

MOST_PICTURES = 64  # in one question
CONNECT_SECONDS = 2.0  # for the first contact; a stack that has answered before is waited for
RESEND_SECONDS = 2.0  # without an answer or news, ask again: a question in flight dies with the orchestrator
PATIENCE_SECONDS = 30.0  # how long an orchestrator may be away, as while it is restarted


# Asking these twice is harmless: jobs carry ids, and the rest only looks or names a wanted state.
REPEATABLE = (
    Submit,
    Watch,
    GetJobs,
    FetchPictures,
    GetPreview,
    Cancel,
    GetWorkers,
    GetStack,
    GetMetrics,
    Scale,
    Drain,
    GetLoras,
    GetModels,
    LoadModel,
    AddModel,
    OfferLora,
    PutLora,
)


class Exchange:
    """Pairs questions with answers by number. `owner` names the key on whose behalf this machine's user asks."""

    def __init__(self, owner: str = "") -> None:
        self.identity = new_identity()
        self._owner = owner
        self._numbers = itertools.count(1)

    def ask(self, cls: type[Question], tensors: Sequence[Tensor] = (), **fields: Any) -> tuple[int, list[Buffer]]:
        """A question's number and frames; BadRequest where its fields can't be right."""
        number = next(self._numbers)
        try:
            return number, wire.encode(cls(request=number, owner=self._owner, **fields), tensors)
        except ValidationError as error:
            fault = error.errors(include_url=False, include_context=False)[0]
            what = "a job's id" if fault["loc"][:1] in (("jobs",), ("job",)) else ".".join(map(str, fault["loc"]))
            raise BadRequest(
                f"{fault['input']!r} can't be {what}.", "'triptych jobs' lists those that there are."
            ) from None

    @staticmethod
    def read(frames: Sequence[Buffer]) -> wire.Envelope:
        """A reply or event; ProtocolError or VersionMismatch if it isn't one."""
        return wire.decode(frames, TO_CLIENT)

    @staticmethod
    def number_of(envelope: wire.Envelope) -> int:
        """The question that an answer belongs to; 0 for an event."""
        return 0 if isinstance(envelope.message, JobEvent) else int(getattr(envelope.message, "request", 0))

    @staticmethod
    def checked(envelope: wire.Envelope) -> wire.Envelope:
        """The answer, or the error that it stands for, raised."""
        if isinstance(envelope.message, Error):
            error = from_wire(envelope.message.code, envelope.message.message, envelope.message.hint)
            error.item = envelope.message.item
            raise error
        return envelope


def request_of(prompt: str | JobRequest, options: dict[str, Any]) -> tuple[JobRequest, list[Tensor]]:
    """A request, and the pictures that it begins from; those are read where they are given by path or as images."""
    if isinstance(prompt, JobRequest):
        return prompt, []
    given = options.pop("images", ())
    single = {name: options.pop(name, None) for name in ("mask", "control", "ip_image")}
    videos = dict(options.pop("videos", {}))
    if (video := options.pop("video", None)) is not None:
        videos = {"": video, **videos}
    inputs = Inputs(
        images=tuple(picture_of(one) for one in (given if isinstance(given, list | tuple) else [given])),
        videos=tuple((name, video_of(one)) for name, one in videos.items()),
        **{name: picture_of(one, mask=name == "mask") for name, one in single.items() if one is not None},
    )
    return JobRequest(prompt=prompt, **options, **inputs.fields), list(inputs.tensors)


def with_ids(requests: Sequence[JobRequest]) -> tuple[JobRequest, ...]:
    """Requests that can be sent twice without harm."""
    return tuple(r if r.id else r.model_copy(update={"id": secrets.token_hex(6)}) for r in requests)


def chunks(requests: Sequence[JobRequest], pictures: Sequence[Tensor] = ()) -> list[tuple[int, dict[str, Any]]]:
    """The questions of one submission, each with how many jobs come before it, and with the pictures of its own jobs.

    Several at once are judged first, all of them, so that none is accepted where one can't be.
    """
    named, by_digest = with_ids(requests), {picture.name: picture for picture in pictures}
    parts = list(in_parts(named, by_digest))
    rounds = (True, False) if len(parts) > 1 else (False,)
    return [
        (start, {"jobs": jobs, "tensors": own, "judge": judge, "earlier": start if judge else 0})
        for judge in rounds
        for start, jobs, own in parts
    ]


def in_parts(
    requests: tuple[JobRequest, ...], pictures: Mapping[str, Tensor]
) -> Iterator[tuple[int, tuple[JobRequest, ...], list[Tensor]]]:
    """Yield requests that fit a message, each part with its start and its pictures."""
    start = 0
    own: dict[str, Tensor] = {}
    for index, request in enumerate(requests):
        more = {digest: pictures[digest] for digest in request.pictures if digest in pictures}
        if index > start and (index - start == MAX_JOBS or len(own | more) > MOST_PICTURES):
            yield start, requests[start:index], list(own.values())
            start, own = index, {}
        own |= more
    yield start, requests[start:], list(own.values())


@contextlib.contextmanager
def located(start: int, accepted: Sequence[Job]) -> Iterator[None]:
    """Raise errors of a part of a submission as those of the whole; what was accepted before is told."""
    try:
        yield
    except TriptychError as error:
        if error.item is not None:
            error.item += start
        if accepted:
            error.hint = (
                f"{error.hint} {len(accepted)} jobs before it were accepted and go on, {accepted[0].id} to "
                f"{accepted[-1].id}."
            ).strip()
        raise


def raise_unless_done(job: Job) -> Job:
    """The job if it is done; JobFailed or JobCancelled with the reason if it ended otherwise."""
    if job.state == "cancelled":
        raise JobCancelled(f"Job {job.id} was cancelled.", f"Run it again: triptych retry {job.id}")
    if job.state == "failed":
        reason = job.reasons[-1] if job.reasons else "no reason was given"
        raise JobFailed(
            f"Job {job.id} failed: {reason}", f"Its log: triptych logs. Run it again: triptych retry {job.id}"
        )
    return job
