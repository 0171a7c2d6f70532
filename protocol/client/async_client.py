"""The asyncio client: the same as Client, for many jobs at once in one event loop.

async with AsyncClient() as client:
    job = await client.submit("a large red circle")
    async for event in client.events([job.id]): ...
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import zmq
import zmq.asyncio

from protocol.client.endpoints import no_answer, reach
from protocol.client.exchange import (
    CONNECT_SECONDS,
    PATIENCE_SECONDS,
    REPEATABLE,
    RESEND_SECONDS,
    Exchange,
    chunks,
    located,
    raise_unless_done,
    request_of,
)
from protocol.errors import NoStack, TriptychError, WaitTimeout
from protocol.job import ENDED, Job, JobRequest, JobState
from protocol.messages.client import (
    Cancel,
    Collected,
    CollectGarbage,
    Drain,
    FetchPictures,
    GetJobs,
    GetStack,
    GetWorkers,
    JobEvent,
    Jobs,
    Question,
    Restart,
    Retry,
    Scale,
    Stack,
    Submit,
    Watch,
    Workers,
)
from protocol.messages.common import MAX_JOBS, MOST_LISTED
from protocol.sockets import dealer
from protocol.stages import Stage
from protocol.wire import Envelope

if TYPE_CHECKING:
    from PIL.Image import Image


class AsyncClient:
    """As Client, with every method awaited. Use it as an async context manager."""

    def __init__(self, state: str | Path | None = None, endpoint: str | None = None, timeout: float = 10.0) -> None:
        self._where, self._key = (endpoint, None) if endpoint else reach(Path(state) if state else None)
        self._timeout = timeout
        self._conversation = Exchange()
        self._answers: dict[int, asyncio.Future[Envelope]] = {}
        self._answered = False
        self._listeners: set[asyncio.Queue[JobEvent]] = set()
        self._context = zmq.asyncio.Context()
        self._socket: Any = dealer(self._context, self._where, self._conversation.identity, self._key)  # type: ignore[arg-type]
        self._reader: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Let go of the connection; jobs go on."""
        if self._reader is not None:
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader
        self._socket.close(linger=0)
        self._context.term()

    async def submit(self, prompt: str | JobRequest, **options: Any) -> Job:
        return (await self.submit_many([request_of(prompt, options)]))[0]

    async def submit_many(self, requests: Sequence[JobRequest], timeout: float | None = None) -> list[Job]:
        accepted: list[Job] = []
        for start, fields in chunks(requests):
            with located(start, accepted):
                answer = await self._ask(Submit, timeout=timeout, **fields)
            if isinstance(answer.message, Jobs):
                accepted += answer.message.jobs
        return accepted

    async def job(self, job_id: str) -> Job:
        return (await self._jobs(GetJobs, jobs=(job_id,)))[0]

    async def jobs(self, states: Sequence[JobState] = (), limit: int = 100) -> list[Job]:
        found: list[Job] = []
        while len(found) < limit:
            before, size = found[-1].number if found else 0, min(MOST_LISTED, limit - len(found))
            more = await self._jobs(GetJobs, states=tuple(states), limit=size, before=before)
            found += more
            if len(more) < size:
                break
        return found

    async def cancel(self, *job_ids: str) -> list[Job]:
        return await self._jobs(Cancel, jobs=job_ids)

    async def retry(self, *job_ids: str) -> list[Job]:
        return await self._jobs(Retry, jobs=job_ids)

    async def wait(self, job_id: str, timeout: float | None = None) -> Job:
        async for _ in self.events([job_id], timeout):
            pass
        return raise_unless_done(await self.job(job_id))

    async def pictures(self, job_id: str) -> "list[Image]":
        from protocol.client.png import to_images

        return to_images((await self._ask(FetchPictures, job=job_id)).tensors[0])

    async def events(self, job_ids: Sequence[str], timeout: float | None = None) -> AsyncIterator[JobEvent]:
        """What moves in these jobs, until all have ended; WaitTimeout after `timeout` seconds without that."""
        queue: asyncio.Queue[JobEvent] = asyncio.Queue()
        self._listeners.add(queue)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout if timeout is not None else None
        try:
            await self._watch(job_ids)
            open_jobs = set(job_ids)
            while open_jobs:
                pause = RESEND_SECONDS if deadline is None else min(RESEND_SECONDS, max(0.0, deadline - loop.time()))
                try:
                    event = await asyncio.wait_for(queue.get(), pause)
                except TimeoutError:
                    if deadline is not None and loop.time() >= deadline:
                        raise WaitTimeout("The jobs are not finished yet; they go on.", "Wait longer.") from None
                    await self._watch(sorted(open_jobs))
                    continue
                if event.job in open_jobs:
                    if event.state in ENDED:
                        open_jobs.discard(event.job)
                    yield event
        finally:
            self._listeners.discard(queue)

    async def stack(self) -> Stack:
        message = (await self._ask(GetStack)).message
        assert isinstance(message, Stack)
        return message

    async def workers(self) -> Workers:
        message = (await self._ask(GetWorkers)).message
        assert isinstance(message, Workers)
        return message

    async def restart(self, stage: Stage) -> None:
        await self._ask(Restart, stage=stage)

    async def scale(self, stage: Stage, count: int) -> None:
        await self._ask(Scale, stage=stage, count=count)

    async def drain(self, stage: Stage, on: bool = True) -> None:
        await self._ask(Drain, stage=stage, on=on)

    async def collect_garbage(self, older: int) -> tuple[int, int]:
        jobs = size = 0
        while True:
            message = (await self._ask(CollectGarbage, older=older)).message
            assert isinstance(message, Collected)
            if not message.jobs:
                return jobs, size
            jobs, size = jobs + message.jobs, size + message.bytes

    # -- the wire -------------------------------------------------------------------------------

    async def _watch(self, job_ids: Sequence[str]) -> None:
        for start in range(0, len(job_ids), MAX_JOBS):
            await self._ask(Watch, timeout=PATIENCE_SECONDS, jobs=tuple(job_ids[start : start + MAX_JOBS]))

    async def _jobs(self, cls: type[Question], timeout: float | None = None, **fields: Any) -> list[Job]:
        message = (await self._ask(cls, timeout, **fields)).message
        assert isinstance(message, Jobs)
        return list(message.jobs)

    async def _ask(self, cls: type[Question], timeout: float | None = None, **fields: Any) -> Envelope:
        number, frames = self._conversation.ask(cls, **fields)
        loop = asyncio.get_running_loop()
        limit = loop.time() + (timeout or self._timeout)
        answer: asyncio.Future[Envelope] = loop.create_future()
        self._answers[number] = answer
        try:
            while (left := limit - loop.time()) > 0:
                if not await self._socket.poll(
                    (left if self._answered else min(left, CONNECT_SECONDS)) * 1000, zmq.POLLOUT
                ):
                    raise no_answer(self._where, self._key)
                await self._socket.send_multipart(frames)
                pause = min(left, RESEND_SECONDS) if cls in REPEATABLE else left
                if (await asyncio.wait([answer], timeout=pause))[0]:
                    return self._conversation.checked(answer.result())
            raise NoStack(f"The stack at {self._where} gives no answer.", "See 'triptych logs orchestrator'.")
        finally:
            self._answers.pop(number, None)

    async def _read(self) -> None:
        while True:
            frames = await self._socket.recv_multipart()
            try:
                envelope = self._conversation.read(frames)
            except TriptychError as error:
                self._fail_all(error)
                continue
            self._answered = True
            if isinstance(envelope.message, JobEvent):
                for queue in self._listeners:
                    queue.put_nowait(envelope.message)
                continue
            answer = self._answers.get(self._conversation.number_of(envelope))
            if answer is not None and not answer.done():
                answer.set_result(envelope)

    def _fail_all(self, error: Exception) -> None:
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(error)
