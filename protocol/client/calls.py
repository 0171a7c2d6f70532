"""All that a client can do, once: as coroutines over a link, which may be asyncio's or a blocking socket's."""

import time
from collections.abc import AsyncIterator, Container, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from protocol.client.exchange import (
    PATIENCE_SECONDS,
    RESEND_SECONDS,
    chunks,
    located,
    raise_unless_done,
    request_of,
)
from protocol.client.lora_files import GivenLoras, LoraFile, all_text, loras_of
from protocol.errors import BadRequest, WaitTimeout
from protocol.job import ENDED, Job, JobRequest, JobState
from protocol.lora import LORA_PART_BYTES, LoraInfo
from protocol.messages.client import (
    AddModel,
    Cancel,
    Collected,
    CollectGarbage,
    Drain,
    FetchPictures,
    GetHosts,
    GetJobs,
    GetLoras,
    GetMetrics,
    GetModels,
    GetPreview,
    GetStack,
    GetWorkers,
    Hosts,
    JobEvent,
    Jobs,
    LoadModel,
    LoraHere,
    Loras,
    Metrics,
    Models,
    OfferLora,
    Pictures,
    PlaceOnHost,
    Preview,
    PutLora,
    Question,
    RemoveModel,
    Restart,
    Retry,
    Scale,
    Stack,
    Submit,
    Watch,
    Workers,
)
from protocol.messages.common import MAX_JOBS, MOST_LISTED, Message
from protocol.metrics import Metric
from protocol.model_spec import ModelSpec
from protocol.pictures import pictures_among
from protocol.stages import Stage
from protocol.tensors import Tensor
from protocol.views import HostView, ModelView, Placing
from protocol.wire import Envelope

if TYPE_CHECKING:
    from PIL.Image import Image

M = TypeVar("M", bound=Message)
MOST_STALLED = 5  # times that sending a file may begin anew
LONGER = "Wait longer with --timeout, or: triptych jobs"


class Inbox(Protocol):
    async def next(self, limit: float) -> JobEvent | None:
        """The next event of the jobs that are listened to; None after `limit` (monotonic seconds)."""


class Link(Protocol):
    """A connection to a stack."""

    async def ask(
        self, cls: type[Question], timeout: float | None, tensors: Sequence[Tensor] = (), **fields: Any
    ) -> Envelope:
        """The answer to a question; or the error that it stands for, raised. NoStack after `timeout` seconds."""

    def keep(self, jobs: Sequence[str]) -> None:
        """Keep events of these jobs until somebody listens to them."""

    def listen(self, jobs: Container[str]) -> AbstractContextManager[Inbox]:
        """Take the events of these jobs, those that were kept included."""


class Calls:
    def __init__(self, link: Link) -> None:
        self._link = link

    # -- jobs -----------------------------------------------------------------------------------

    async def submit(self, prompt: str | JobRequest, **options: Any) -> Job:
        """Accept one job, on disk when this returns. `options` are JobRequest's fields; BadRequest, DoesNotFit.

        `images`, `mask`, `control` and `ip_image` may be paths, the bytes of files, or Pillow images; `video` a path,
        or frames as Pillow images. `videos` are several, by the names of the pipeline's call. `loras` may be texts,
        NAME[@WEIGHT], with aliases or paths of files.
        """
        given = loras_of(options.pop("loras", ())) if all_text(options.get("loras")) else GivenLoras()
        options |= {"loras": given.requests} if given.requests else {}
        request, pictures = request_of(prompt, options)
        for file in given.files:
            await self.send_lora(file)
        return (await self.submit_many([request], pictures=pictures))[0]

    async def submit_many(
        self,
        requests: Sequence[JobRequest],
        timeout: float | None = None,
        watch: bool = False,
        pictures: Sequence[Tensor] = (),
    ) -> list[Job]:
        """Accept many jobs, all or none. Waits for the stack to know its model.

        `pictures` are those that the requests name by their digests, as `picture_of` makes them.

        With `watch`, `events` of these jobs misses nothing of what happens before it is called. An error's `item` says
        which request is at fault.
        """
        accepted: list[Job] = []
        for start, fields in chunks(requests, pictures):
            if watch:
                self._link.keep([request.id for request in fields["jobs"]])
            with located(start, accepted):
                answer = await self._link.ask(Submit, timeout, watch=watch, **fields)
            if isinstance(answer.message, Jobs):
                accepted += answer.message.jobs
        return accepted

    async def send_lora(self, file: LoraFile) -> None:
        """Send a LoRA's file, unless the stack has it: jobs name it by its digest. BadRequest."""
        have, stalled = await self._here(OfferLora, digest=file.digest, bytes=file.bytes), 0
        with file.path.open("rb") as opened:
            while have < file.bytes:
                before = have
                opened.seek(have)
                part = opened.read(LORA_PART_BYTES)
                if not part:
                    raise BadRequest(f"{str(file.path)!r} has become shorter meanwhile.", "Send it again.")
                tensor = Tensor("part", "uint8", (len(part),), part)
                have = await self._here(PutLora, tensors=[tensor], digest=file.digest, offset=have)
                if have <= before:  # the orchestrator is another one, or has let go of what came
                    stalled += 1
                    if stalled > MOST_STALLED:
                        raise BadRequest(f"The stack does not take {str(file.path)!r}.", "Try again later.")
                    have = await self._here(OfferLora, digest=file.digest, bytes=file.bytes)

    async def _here(self, cls: type[Question], tensors: Sequence[Tensor] = (), **fields: Any) -> int:
        message = (await self._link.ask(cls, None, tensors, **fields)).message
        assert isinstance(message, LoraHere)
        return message.bytes

    async def loras(self, model: str | None = None) -> list[LoraInfo]:
        """The LoRAs that have a name in the stack, of its default model or another; NotFound."""
        return list((await self._message(Loras, GetLoras, model=model)).loras)

    async def models(self) -> list[ModelView]:
        """The stack's models that are known, the default one first."""
        return list((await self._message(Models, GetModels)).models)

    async def add_model(self, name: str, spec: ModelSpec, timeout: float | None = None) -> None:
        """Add a model to the running stack; it may have to be looked at for long first. ModelMissing, DoesNotFit, …"""
        await self._link.ask(AddModel, timeout, model=name, spec=spec)

    async def remove_model(self, name: str) -> None:
        """Remove a model from the running stack. NotFound, Conflict while it has unfinished jobs."""
        await self._link.ask(RemoveModel, None, model=name)

    async def load_model(self, model: str, load: bool = True) -> None:
        """Start a model's workers; or, with `load` False, end them until a job asks for it. NotFound, Conflict."""
        await self._link.ask(LoadModel, None, model=model, load=load)

    async def job(self, job_id: str) -> Job:
        """Return a job as it stands; NotFound."""
        return (await self._jobs(GetJobs, jobs=(job_id,)))[0]

    async def jobs(self, states: Sequence[JobState] = (), limit: int = 100) -> list[Job]:
        """The newest jobs, newest first."""
        found: list[Job] = []
        while len(found) < limit:
            before, size = found[-1].number if found else 0, min(MOST_LISTED, limit - len(found))
            more = await self._jobs(GetJobs, states=tuple(states), limit=size, before=before)
            found += more
            if len(more) < size:
                break
        return found

    async def cancel(self, *job_ids: str) -> list[Job]:
        """End jobs; a worker that has the task of one stops at its next step."""
        return await self._in_parts(Cancel, job_ids)

    async def retry(self, *job_ids: str) -> list[Job]:
        """Run failed or cancelled jobs again, from their last finished stage; Conflict for others."""
        return await self._in_parts(Retry, job_ids)

    async def wait(self, job_id: str, timeout: float | None = None) -> Job:
        """The job once it is done; JobFailed, JobCancelled, or WaitTimeout while it goes on."""
        async for _ in self.events([job_id], timeout):
            pass
        return raise_unless_done(await self.job(job_id))

    async def pictures(self, job_id: str) -> "list[Image]":
        """The pictures of a finished job, or the frames of its videos in order, as Pillow images; NotFound."""
        from protocol.client.picture_files import to_images

        return to_images((await self.raw_pictures(job_id))[1])

    async def raw_pictures(self, job_id: str) -> tuple[Job, Tensor]:
        """The job, and its pictures, or the frames of its videos in order, as uint8 (n, height, width, 3)."""
        job, tensors = await self.results(job_id)
        return job, pictures_among(tensors)

    async def preview(self, job_id: str) -> Preview:
        """How a job's picture will look, as far as a worker can tell; whoever asks again has newer ones made.

        A VAE's first job has none: colors are learned of it.
        """
        return await self._message(Preview, GetPreview, job=job_id)

    async def results(self, job_id: str) -> tuple[Job, list[Tensor]]:
        """The job, and all that it made: parts of its `pictures`, and the `sound` of videos; see Pictures."""
        first = await self._link.ask(FetchPictures, None, job=job_id)
        assert isinstance(first.message, Pictures)
        found = [*first.tensors]
        for number in range(1, first.message.parts):
            found += (await self._link.ask(FetchPictures, None, job=job_id, part=number)).tensors
        return first.message.job, found

    async def events(self, job_ids: Sequence[str], timeout: float | None = None) -> AsyncIterator[JobEvent]:
        """Yield what moves in these jobs, until all have ended; WaitTimeout after `timeout` seconds without that."""
        open_jobs = set(job_ids)
        deadline = time.monotonic() + timeout if timeout is not None else None
        with self._link.listen(frozenset(job_ids)) as inbox:
            await self._watch(job_ids)
            while open_jobs:
                pause = time.monotonic() + RESEND_SECONDS
                event = await inbox.next(pause if deadline is None else min(pause, deadline))
                if event is None:
                    if deadline is not None and time.monotonic() >= deadline:
                        raise WaitTimeout(
                            "The jobs are not finished yet; they go on.",
                            "Wait longer with --timeout, or: triptych jobs",
                        )
                    await self._watch(sorted(open_jobs))
                elif event.job in open_jobs:
                    if event.state in ENDED:
                        open_jobs.discard(event.job)
                    yield event

    # -- the stack ------------------------------------------------------------------------------

    async def stack(self) -> Stack:
        """Version, model and counts."""
        return await self._message(Stack, GetStack)

    async def metrics(self) -> list[Metric]:
        """Return what was counted since the orchestrator was started; Forbidden for keys."""
        return list((await self._message(Metrics, GetMetrics)).metrics)

    async def workers(self) -> Workers:
        """The registered workers, and the processes that the supervisor keeps."""
        return await self._message(Workers, GetWorkers)

    async def restart(self, stage: Stage) -> None:
        """Replace a stage's workers, one after the other; the tasks that they have go on elsewhere."""
        await self._link.ask(Restart, None, stage=stage)

    async def scale(self, stage: Stage, count: int, model: str | None = None) -> None:
        """Keep `count` workers of a stage from now on, of the default model or another."""
        await self._link.ask(Scale, None, stage=stage, count=count, model=model)

    async def drain(self, stage: Stage, on: bool = True) -> None:
        """Give a stage's workers nothing more to do, or, with `on` False, again."""
        await self._link.ask(Drain, None, stage=stage, on=on)

    async def hosts(self) -> list[HostView]:
        """The hosts of the stack beside its own."""
        return list((await self._message(Hosts, GetHosts)).hosts)

    async def place_on_host(self, host: str, placing: Placing) -> None:
        """Give a host nothing new to do (cordoned), nor let it keep its workers (drained), or let it work. NotFound."""
        await self._link.ask(PlaceOnHost, None, host=host, placing=placing)

    async def collect_garbage(self, older: int) -> tuple[int, int]:
        """Remove jobs that ended more than so many seconds ago, with their pictures: how many, and bytes on disk."""
        jobs = size = 0
        while (gone := await self._message(Collected, CollectGarbage, older=older)).jobs:
            jobs, size = jobs + gone.jobs, size + gone.bytes
        return jobs, size

    # -- how it is asked ------------------------------------------------------------------------

    async def _message(self, kind: type[M], cls: type[Question], **fields: Any) -> M:
        message = (await self._link.ask(cls, None, **fields)).message
        assert isinstance(message, kind)
        return message

    async def _jobs(self, cls: type[Question], **fields: Any) -> list[Job]:
        return list((await self._message(Jobs, cls, **fields)).jobs)

    async def _in_parts(self, cls: type[Question], job_ids: Sequence[str]) -> list[Job]:
        found: list[Job] = []
        for start in range(0, len(job_ids), MAX_JOBS):
            found += await self._jobs(cls, jobs=tuple(job_ids[start : start + MAX_JOBS]))
        return found

    async def _watch(self, job_ids: Sequence[str]) -> None:
        for start in range(0, len(job_ids), MAX_JOBS):
            await self._link.ask(Watch, PATIENCE_SECONDS, jobs=tuple(job_ids[start : start + MAX_JOBS]))
