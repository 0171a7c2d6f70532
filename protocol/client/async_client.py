"""The asyncio client.

from triptych import AsyncClient

async with AsyncClient() as client:
    job = await client.submit("a large red circle", seed=1)
    (await client.pictures((await client.wait(job.id)).id))[0].save("circle.png")
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import zmq
import zmq.asyncio

from protocol.client.calls import Calls
from protocol.client.endpoints import no_answer, reach
from protocol.client.exchange import CONNECT_SECONDS, REPEATABLE, RESEND_SECONDS, Exchange
from protocol.errors import NoStack, TriptychError
from protocol.messages.client import JobEvent, Question
from protocol.sockets import dealer
from protocol.tensors import Tensor
from protocol.wire import Envelope

MOST_KEPT = 10_000  # events that nobody listens to yet


class AsyncInbox:
    """Events of some jobs, as they come."""

    def __init__(self, jobs: Container[str]) -> None:
        self.jobs = jobs
        self.events: asyncio.Queue[JobEvent] = asyncio.Queue()

    async def next(self, limit: float) -> JobEvent | None:
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(self.events.get(), max(0.0, limit - time.monotonic()))
        return None


class AsyncLink:
    """A socket, read by a task of its own; many questions and listeners may be open at once."""

    def __init__(self, where: str, key: Any, timeout: float, owner: str) -> None:
        self._where, self._key, self._timeout = where, key, timeout
        self._exchange = Exchange(owner)
        self._answers: dict[int, asyncio.Future[Envelope]] = {}
        self._answered = False
        self._inboxes: set[AsyncInbox] = set()
        self._kept: set[str] = set()  # jobs whose events are kept until somebody listens
        self._backlog: deque[JobEvent] = deque(maxlen=MOST_KEPT)
        self._context = zmq.asyncio.Context()
        self._socket: Any = dealer(self._context, where, self._exchange.identity, key)  # type: ignore[arg-type]
        self._reader: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._reader = asyncio.create_task(self._read())

    @property
    def broken(self) -> bool:
        """Return whether nothing is read any more, so that another connection is needed."""
        return self._reader is not None and self._reader.done()

    async def close(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):  # which has been told, or will be
                await self._reader
        self._socket.close(linger=0)
        self._context.term()

    async def ask(
        self, cls: type[Question], timeout: float | None, tensors: Sequence[Tensor] = (), **fields: Any
    ) -> Envelope:
        number, frames = self._exchange.ask(cls, tensors, **fields)
        limit = time.monotonic() + (timeout or self._timeout)
        answer: asyncio.Future[Envelope] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        try:
            while (left := limit - time.monotonic()) > 0:
                reachable = left if self._answered else min(left, CONNECT_SECONDS)
                if not await self._socket.poll(reachable * 1000, zmq.POLLOUT):
                    raise no_answer(self._where, self._key)
                await self._socket.send_multipart(frames)
                pause = min(left, RESEND_SECONDS) if cls in REPEATABLE else left
                if (await asyncio.wait([answer], timeout=pause))[0]:
                    return self._exchange.checked(answer.result())
            raise NoStack(f"The stack at {self._where} gives no answer.", "See 'triptych logs orchestrator'.")
        finally:
            self._answers.pop(number, None)

    def keep(self, jobs: Sequence[str]) -> None:
        self._kept.update(jobs)

    @contextlib.contextmanager
    def listen(self, jobs: Container[str]) -> Iterator[AsyncInbox]:
        inbox = AsyncInbox(jobs)
        for event in [event for event in self._backlog if event.job in jobs]:
            self._backlog.remove(event)
            inbox.events.put_nowait(event)
        self._kept = {job for job in self._kept if job not in jobs}
        self._inboxes.add(inbox)
        try:
            yield inbox
        finally:
            self._inboxes.discard(inbox)

    async def _read(self) -> None:
        while True:
            frames = await self._socket.recv_multipart()
            try:
                envelope = self._exchange.read(frames)
            except TriptychError as error:
                for answer in self._answers.values():
                    if not answer.done():
                        answer.set_exception(error)
                continue
            self._answered = True
            if isinstance(envelope.message, JobEvent):
                self._deliver(envelope.message)
                continue
            number = self._exchange.number_of(envelope)
            for asked, answer in self._answers.items():
                if number in (asked, 0) and not answer.done():  # 0: the stack could not even read the question
                    answer.set_result(envelope)

    def _deliver(self, event: JobEvent) -> None:
        inboxes = [inbox for inbox in self._inboxes if event.job in inbox.jobs]
        for inbox in inboxes:
            inbox.events.put_nowait(event)
        if not inboxes and event.job in self._kept:
            self._backlog.append(event)


class AsyncClient(Calls):
    """A client like Client, with every method awaited. Use it as an async context manager.

    With `owner`, a stack's own user acts for the holder of the key of that name, whose jobs alone are seen.
    """

    def __init__(
        self,
        state: str | Path | None = None,
        endpoint: str | None = None,
        timeout: float = 10.0,
        owner: str = "",
    ) -> None:
        where, key = (endpoint, None) if endpoint else reach(Path(state) if state else None)
        self._async_link = AsyncLink(where, key, timeout, owner)
        super().__init__(self._async_link)

    async def __aenter__(self) -> Self:
        self._async_link.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def broken(self) -> bool:
        """Return whether the connection is of no use any more."""
        return self._async_link.broken

    async def close(self) -> None:
        """Let go of the connection; jobs go on."""
        await self._async_link.close()
