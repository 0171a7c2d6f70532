"""The synchronous Python client: a thin portal to the calls, over a socket that blocks.

from triptych import Client

with Client() as client:
    job = client.submit("a large red circle", seed=1)
    client.pictures(client.wait(job.id).id)[0].save("circle.png")
"""

import contextlib
import time
from collections import deque
from collections.abc import Container, Coroutine, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import zmq

from protocol.client.calls import Calls
from protocol.client.endpoints import no_answer, reach
from protocol.client.exchange import CONNECT_SECONDS, REPEATABLE, RESEND_SECONDS, Exchange
from protocol.client.lora_files import LoraFile
from protocol.curve_keys import PeerKey
from protocol.errors import NoStack
from protocol.job import Job, JobRequest, JobState
from protocol.lora import LoraInfo
from protocol.messages.client import JobEvent, Preview, Question, Stack, Workers
from protocol.metrics import Metric
from protocol.model_spec import ModelSpec
from protocol.sockets import dealer, receive, send
from protocol.stages import Stage
from protocol.tensors import Tensor
from protocol.views import HostView, ModelView, Placing
from protocol.wire import Envelope

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")


class BlockingLink:
    """A link whose coroutines never give way: each blocks until it has what it wants."""

    def __init__(self, where: str, key: PeerKey | None, timeout: float) -> None:
        self._where, self._key, self._timeout = where, key, timeout
        self._exchange = Exchange()
        self._answered = False
        self._events: deque[JobEvent] = deque()  # that came while an answer was waited for
        self._listening: Container[str] = ()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = dealer(self._context, where, self._exchange.identity, key)

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()

    async def ask(
        self, cls: type[Question], timeout: float | None, tensors: Sequence[Tensor] = (), **fields: Any
    ) -> Envelope:
        number, frames = self._exchange.ask(cls, tensors, **fields)
        limit = time.monotonic() + (timeout or self._timeout)
        while (now := time.monotonic()) < limit:
            connected_by = limit if self._answered else min(limit, now + CONNECT_SECONDS)
            if not self._socket.poll(milliseconds(connected_by), zmq.POLLOUT):
                raise no_answer(self._where, self._key)
            send(self._socket, frames)
            again = min(limit, now + RESEND_SECONDS) if cls in REPEATABLE else limit
            while envelope := self._receive(again):
                self._answered = True
                if self._exchange.number_of(envelope) in (number, 0):
                    return self._exchange.checked(envelope)
        raise NoStack(f"The stack at {self._where} gives no answer.", "See 'triptych logs orchestrator'.")

    def _receive(self, limit: float) -> Envelope | None:
        """The next answer; events that come before it are kept. None after `limit` (monotonic seconds)."""
        while self._socket.poll(milliseconds(limit), zmq.POLLIN):
            envelope = self._exchange.read(receive(self._socket))
            if not isinstance(envelope.message, JobEvent):
                return envelope
            self._events.append(envelope.message)
        return None

    def keep(self, jobs: Sequence[str]) -> None:
        """Do nothing: all events are kept here, and they come only of jobs that are watched."""

    @contextlib.contextmanager
    def listen(self, jobs: Container[str]) -> Iterator["BlockingLink"]:
        self._listening = jobs
        yield self

    async def next(self, limit: float) -> JobEvent | None:
        while True:
            while self._events:
                if (event := self._events.popleft()).job in self._listening:
                    return event
            if not self._socket.poll(milliseconds(limit), zmq.POLLIN):
                return None
            envelope = self._exchange.read(receive(self._socket))
            if isinstance(envelope.message, JobEvent):
                self._events.append(envelope.message)


def run(call: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never gives way, to its end."""
    try:
        call.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    raise AssertionError("a blocking link gave way")


class Client:
    """A connection to a running stack. Not for several threads at once: give each its own.

    Each method is the one of `Calls` (and so of AsyncClient) by the same name.

    Args:
        state: the stack's folder, or the file of a key for a remote stack; the user's default stack if neither this
            nor `endpoint` is given.
        endpoint: the clients' endpoint itself, such as tcp://127.0.0.1:5555.
        timeout: seconds to wait for an answer.

    Raises:
        NoStack: nothing runs there. Every method may raise it, and VersionMismatch.
    """

    def __init__(self, state: str | Path | None = None, endpoint: str | None = None, timeout: float = 10.0) -> None:
        where, key = (endpoint, None) if endpoint else reach(Path(state) if state else None)
        self._link = BlockingLink(where, key, timeout)
        self._calls = Calls(self._link)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connection; jobs go on."""
        self._link.close()

    def submit(self, prompt: str | JobRequest, **options: Any) -> Job:
        """Accept one job, on disk when this returns. `options` are JobRequest's fields; BadRequest, DoesNotFit.

        `images`, `mask`, `control` and `ip_image` may be paths, the bytes of files, or Pillow images; `video` a path,
        or frames as Pillow images. `videos` are several, by the names of the pipeline's call. `loras` may be texts,
        NAME[@WEIGHT], with aliases or paths of files.
        """
        return run(self._calls.submit(prompt, **options))

    def submit_many(
        self,
        requests: Sequence[JobRequest],
        timeout: float | None = None,
        watch: bool = False,
        pictures: Sequence[Tensor] = (),
    ) -> list[Job]:
        """Accept many jobs, all or none. With `watch`, `events` of these jobs misses nothing.

        `pictures` are those that the requests name by their digests, as `picture_of` makes them.
        """
        return run(self._calls.submit_many(requests, timeout, watch, pictures))

    def send_lora(self, file: LoraFile) -> None:
        """Send a LoRA's file, as `loras_of` finds it, unless the stack has it: jobs name it by its digest."""
        run(self._calls.send_lora(file))

    def loras(self, model: str | None = None) -> list[LoraInfo]:
        """The LoRAs that have a name in the stack, of its default model or another; NotFound."""
        return run(self._calls.loras(model))

    def hosts(self) -> list[HostView]:
        """The hosts of the stack beside its own."""
        return run(self._calls.hosts())

    def place_on_host(self, host: str, placing: Placing) -> None:
        """Give a host nothing new to do (cordoned), nor let it keep its workers (drained), or let it work. NotFound."""
        run(self._calls.place_on_host(host, placing))

    def models(self) -> list[ModelView]:
        """The stack's models that are known, the default one first."""
        return run(self._calls.models())

    def add_model(self, name: str, spec: ModelSpec, timeout: float | None = None) -> None:
        """Add a model to the running stack; it may have to be looked at for long first. ModelMissing, DoesNotFit, …"""
        run(self._calls.add_model(name, spec, timeout))

    def remove_model(self, name: str) -> None:
        """Remove a model from the running stack. NotFound, Conflict while it has unfinished jobs."""
        run(self._calls.remove_model(name))

    def load_model(self, model: str, load: bool = True) -> None:
        """Start a model's workers; or, with `load` False, end them until a job asks for it. NotFound, Conflict."""
        run(self._calls.load_model(model, load))

    def job(self, job_id: str) -> Job:
        """Return a job as it stands; NotFound."""
        return run(self._calls.job(job_id))

    def jobs(self, states: Sequence[JobState] = (), limit: int = 100) -> list[Job]:
        """The newest jobs, newest first."""
        return run(self._calls.jobs(states, limit))

    def cancel(self, *job_ids: str) -> list[Job]:
        """End jobs; a worker that has the task of one stops at its next step."""
        return run(self._calls.cancel(*job_ids))

    def retry(self, *job_ids: str) -> list[Job]:
        """Run failed or cancelled jobs again, from their last finished stage; Conflict for others."""
        return run(self._calls.retry(*job_ids))

    def wait(self, job_id: str, timeout: float | None = None) -> Job:
        """The job once it is done; JobFailed, JobCancelled, or WaitTimeout while it goes on."""
        return run(self._calls.wait(job_id, timeout))

    def pictures(self, job_id: str) -> "list[Image]":
        """The pictures of a finished job as Pillow images; NotFound."""
        return run(self._calls.pictures(job_id))

    def raw_pictures(self, job_id: str) -> tuple[Job, Tensor]:
        """The job, and its pictures, or the frames of its videos in order, as uint8 (n, height, width, 3)."""
        return run(self._calls.raw_pictures(job_id))

    def preview(self, job_id: str) -> Preview:
        """How a job's picture will look, as far as a worker can tell; whoever asks again has newer ones made."""
        return run(self._calls.preview(job_id))

    def results(self, job_id: str) -> tuple[Job, list[Tensor]]:
        """The job, and all that it made: parts of its `pictures`, and the `sound` of videos; see Pictures."""
        return run(self._calls.results(job_id))

    def events(self, job_ids: Sequence[str], timeout: float | None = None) -> Iterator[JobEvent]:
        """Yield what moves in these jobs, until all have ended; WaitTimeout after `timeout` seconds without that."""
        events = aiter(self._calls.events(job_ids, timeout))
        try:
            with contextlib.suppress(StopAsyncIteration):
                while True:
                    yield run(anext(events))  # type: ignore[arg-type]
        finally:
            run(events.aclose())  # type: ignore[attr-defined]

    def stack(self) -> Stack:
        """Version, model and counts."""
        return run(self._calls.stack())

    def metrics(self) -> list[Metric]:
        """Return what was counted since the orchestrator was started; Forbidden for keys."""
        return run(self._calls.metrics())

    def workers(self) -> Workers:
        """The registered workers, and the processes that the supervisor keeps."""
        return run(self._calls.workers())

    def restart(self, stage: Stage) -> None:
        """Replace a stage's workers, one after the other; the tasks that they have go on elsewhere."""
        run(self._calls.restart(stage))

    def scale(self, stage: Stage, count: int, model: str | None = None) -> None:
        """Keep `count` workers of a stage from now on, of the default model or another."""
        run(self._calls.scale(stage, count, model))

    def drain(self, stage: Stage, on: bool = True) -> None:
        """Give a stage's workers nothing more to do, or, with `on` False, again."""
        run(self._calls.drain(stage, on))

    def collect_garbage(self, older: int) -> tuple[int, int]:
        """Remove jobs that ended more than so many seconds ago, with their pictures: how many, and bytes on disk."""
        return run(self._calls.collect_garbage(older))


def milliseconds(limit: float) -> int:
    """Return the milliseconds from now to a moment of the monotonic clock."""
    return max(0, int((limit - time.monotonic()) * 1000) + 1)
