"""The synchronous Python client.

from triptych import Client

with Client() as client:
    job = client.submit("a large red circle", seed=1)
    client.pictures(client.wait(job.id).id)[0].save("circle.png")
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import zmq

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
from protocol.errors import NoStack, WaitTimeout
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
    Pictures,
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
from protocol.sockets import dealer, receive, send
from protocol.stages import Stage
from protocol.tensors import Tensor
from protocol.wire import Envelope

if TYPE_CHECKING:
    from PIL.Image import Image


class Client:
    """A connection to a running stack. Not for several threads at once: give each its own.

    Args:
        state: the stack's folder, or the file of a key for a remote stack; the user's default stack if neither this
            nor `endpoint` is given.
        endpoint: the clients' endpoint itself, such as tcp://127.0.0.1:5555.
        timeout: seconds to wait for an answer.

    Raises:
        NoStack: nothing runs there. Every method may raise it, and VersionMismatch.
    """

    def __init__(self, state: str | Path | None = None, endpoint: str | None = None, timeout: float = 10.0) -> None:
        self._where, self._key = (endpoint, None) if endpoint else reach(Path(state) if state else None)
        self._timeout = timeout
        self._conversation = Exchange()
        self._answered = False
        self._events: deque[JobEvent] = deque()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = dealer(self._context, self._where, self._conversation.identity, self._key)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connection; jobs go on."""
        self._socket.close(linger=0)
        self._context.term()

    # -- jobs -----------------------------------------------------------------------------------

    def submit(self, prompt: str | JobRequest, **options: Any) -> Job:
        """Accept one job, on disk when this returns. `options` are JobRequest's fields; BadRequest, DoesNotFit."""
        return self.submit_many([request_of(prompt, options)])[0]

    def submit_many(
        self, requests: Sequence[JobRequest], timeout: float | None = None, watch: bool = False
    ) -> list[Job]:
        """Accept many jobs, all or none. Waits for the stack to know its model.

        With `watch`, `events` of these jobs misses nothing of what happens before it is called. An error's `item` says
        which request is at fault.
        """
        accepted: list[Job] = []
        for start, fields in chunks(requests):
            with located(start, accepted):
                answer = self._ask(Submit, timeout=timeout, watch=watch, **fields)
            if isinstance(answer.message, Jobs):
                accepted += answer.message.jobs
        return accepted

    def job(self, job_id: str) -> Job:
        """How a job stands; NotFound."""
        return self._jobs(GetJobs, jobs=(job_id,))[0]

    def jobs(self, states: Sequence[JobState] = (), limit: int = 100) -> list[Job]:
        """The newest jobs, newest first."""
        found: list[Job] = []
        while len(found) < limit:
            before, size = found[-1].number if found else 0, min(MOST_LISTED, limit - len(found))
            more = self._jobs(GetJobs, states=tuple(states), limit=size, before=before)
            found += more
            if len(more) < size:
                break
        return found

    def cancel(self, *job_ids: str) -> list[Job]:
        """End jobs; one that a worker has in hand stops at its next step."""
        return self._in_parts(Cancel, job_ids)

    def retry(self, *job_ids: str) -> list[Job]:
        """Run failed or cancelled jobs again, from their last finished stage; Conflict for others."""
        return self._in_parts(Retry, job_ids)

    def wait(self, job_id: str, timeout: float | None = None) -> Job:
        """The job once it is done; JobFailed, JobCancelled, or WaitTimeout while it goes on."""
        for _ in self.events([job_id], timeout):
            pass
        return raise_unless_done(self.job(job_id))

    def pictures(self, job_id: str) -> "list[Image]":
        """The pictures of a finished job as Pillow images; NotFound."""
        from protocol.client.png import to_images

        return to_images(self.raw_pictures(job_id)[1])

    def raw_pictures(self, job_id: str) -> tuple[Job, Tensor]:
        """The job, and its pictures as uint8 (n, height, width, 3)."""
        answer = self._ask(FetchPictures, job=job_id)
        assert isinstance(answer.message, Pictures)
        return answer.message.job, answer.tensors[0]

    def events(self, job_ids: Sequence[str], timeout: float | None = None) -> Iterator[JobEvent]:
        """What moves in these jobs, until all have ended; WaitTimeout after `timeout` seconds without that."""
        self._watch(job_ids)
        open_jobs = set(job_ids)
        deadline = time.monotonic() + timeout if timeout is not None else None
        while open_jobs:
            event = self._next_event(deadline)
            if event is None:
                self._watch(sorted(open_jobs))
            elif event.job in open_jobs:
                if event.state in ENDED:
                    open_jobs.discard(event.job)
                yield event

    # -- the stack ------------------------------------------------------------------------------

    def stack(self) -> Stack:
        """Version, model and counts."""
        message = self._ask(GetStack).message
        assert isinstance(message, Stack)
        return message

    def workers(self) -> Workers:
        """The registered workers, and the processes that the supervisor keeps."""
        message = self._ask(GetWorkers).message
        assert isinstance(message, Workers)
        return message

    def restart(self, stage: Stage) -> None:
        """Replace a stage's workers, one after the other; others go on with what they had in hand."""
        self._ask(Restart, stage=stage)

    def scale(self, stage: Stage, count: int) -> None:
        """Keep `count` workers of a stage from now on."""
        self._ask(Scale, stage=stage, count=count)

    def drain(self, stage: Stage, on: bool = True) -> None:
        """Give a stage's workers nothing more to do, or, with `on` False, again."""
        self._ask(Drain, stage=stage, on=on)

    def collect_garbage(self, older: int) -> tuple[int, int]:
        """Remove jobs that ended more than so many seconds ago, with their pictures: how many, and bytes on disk."""
        jobs = size = 0
        while True:
            message = self._ask(CollectGarbage, older=older).message
            assert isinstance(message, Collected)
            if not message.jobs:
                return jobs, size
            jobs, size = jobs + message.jobs, size + message.bytes

    # -- the wire -------------------------------------------------------------------------------

    def _watch(self, job_ids: Sequence[str]) -> None:
        for start in range(0, len(job_ids), MAX_JOBS):
            self._ask(Watch, timeout=PATIENCE_SECONDS, jobs=tuple(job_ids[start : start + MAX_JOBS]))

    def _in_parts(self, cls: type[Question], job_ids: Sequence[str]) -> list[Job]:
        parts = (job_ids[start : start + MAX_JOBS] for start in range(0, len(job_ids), MAX_JOBS))
        return [job for part in parts for job in self._jobs(cls, jobs=tuple(part))]

    def _jobs(self, cls: type[Question], **fields: Any) -> list[Job]:
        message = self._ask(cls, **fields).message
        assert isinstance(message, Jobs)
        return list(message.jobs)

    def _ask(self, cls: type[Question], timeout: float | None = None, **fields: Any) -> Envelope:
        number, frames = self._conversation.ask(cls, **fields)
        limit = time.monotonic() + (timeout or self._timeout)
        while (now := time.monotonic()) < limit:
            connected_by = limit if self._answered else min(limit, now + CONNECT_SECONDS)
            if not self._socket.poll(milliseconds(connected_by), zmq.POLLOUT):
                raise no_answer(self._where, self._key)
            send(self._socket, frames)
            again = min(limit, now + RESEND_SECONDS) if cls in REPEATABLE else limit
            while envelope := self._receive(again):
                self._answered = True
                if self._conversation.number_of(envelope) in (number, 0):
                    return self._conversation.checked(envelope)
        raise NoStack(f"The stack at {self._where} gives no answer.", "See 'triptych logs orchestrator'.")

    def _receive(self, limit: float) -> Envelope | None:
        """The next answer; events that come before it are kept. None after `limit` (monotonic seconds)."""
        while self._socket.poll(milliseconds(limit), zmq.POLLIN):
            envelope = self._conversation.read(receive(self._socket))
            if not isinstance(envelope.message, JobEvent):
                return envelope
            self._events.append(envelope.message)
        return None

    def _next_event(self, deadline: float | None) -> JobEvent | None:
        """The next event; None if there was none for a while. WaitTimeout after the deadline."""
        if not self._events:
            pause = time.monotonic() + RESEND_SECONDS
            limit = pause if deadline is None else min(pause, deadline)
            if self._socket.poll(milliseconds(limit), zmq.POLLIN):
                envelope = self._conversation.read(receive(self._socket))
                if isinstance(envelope.message, JobEvent):
                    self._events.append(envelope.message)
            elif deadline is not None and time.monotonic() >= deadline:
                raise WaitTimeout(
                    "The jobs are not finished yet; they go on.", "Wait longer with --timeout, or: triptych jobs"
                )
        return self._events.popleft() if self._events else None


def milliseconds(limit: float) -> int:
    """From now to a moment of the monotonic clock."""
    return max(0, int((limit - time.monotonic()) * 1000) + 1)
