"""A worker's session with the orchestrator: hello, ready, one task, its progress, its result, and a beat a second.

If the orchestrator falls silent, the worker makes a new socket and says hello again as a new incarnation. The task in
its executor goes on meanwhile: it says so, and which; a result that was not yet committed goes with it.
"""

import logging
import signal
import time
from types import FrameType
from typing import Any

import zmq

from protocol import wire
from protocol.curve_keys import PeerKey
from protocol.errors import TriptychError, from_wire
from protocol.messages.common import Beat, Error, Heartbeat, Message, Welcome
from protocol.messages.worker import (
    TO_WORKER,
    Borrow,
    CancelTask,
    Committed,
    Leased,
    Lent,
    LoraPart,
    Part,
    Ready,
    Result,
    Returned,
    SetLease,
    Task,
    WantPreview,
    WorkerGoodbye,
    WorkerHello,
)
from protocol.sockets import dealer, new_identity, receive, send
from protocol.tensors import Tensor
from workers.runtime.executor import Executor, StartAnew, resident_bytes

log = logging.getLogger(__name__)

SILENCE_SECONDS, SILENT_BEATS = 4.0, 3  # without an answer, after which the link counts as dead
WELCOME_SECONDS = 1.0  # the same for the hello, which may have gone to an orchestrator that was just being killed


class Session:
    def __init__(self, endpoint: str, key: PeerKey | None, hello: WorkerHello, executor: Executor) -> None:
        self._endpoint, self._key, self._hello, self._executor = endpoint, key, hello, executor
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._poller = zmq.Poller()
        self._poller.register(executor.wake, zmq.POLLIN)
        self._beat_seconds = 1.0
        self._heard = self._beaten = 0.0
        self._idle = self._loaded = self._welcome = False
        self._task: Task | None = None  # the current one
        self._ordered = 0  # links made when the last order came
        self._links = 0
        self._ready = Ready()  # all that was told of this worker since it loaded
        self._result: tuple[Result, list[Tensor]] | None = None  # until it is committed
        self._gpu_bytes = 0
        self._stop_reason = ""

    def heed_signals(self) -> None:
        """Stop at SIGTERM or SIGINT; for the main thread only."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        signal.set_wakeup_fd(self._executor.bell.fileno(), warn_on_full_buffer=False)

    def run(self) -> None:
        """Run until it is stopped; raise what loading the stage raised."""
        self._executor.start()
        self._connect()
        while not self._stop_reason:
            self._poller.poll(int(self._beat_seconds * 500))
            self._hear()
            self._tell()
            self._keep_alive()
        log.info("stopping: %s", self._stop_reason)
        self._say(WorkerGoodbye())
        self._close()
        self._context.term()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stop_reason = signal.Signals(number).name

    def stop(self, reason: str) -> None:
        """Stop the session, from any thread."""
        self._stop_reason = reason
        self._executor.ring()

    def fail(self, error: BaseException) -> None:
        """Let `run` raise an error of another thread's."""
        self._executor.fail(error)

    # -- the link -------------------------------------------------------------------------------

    def _connect(self) -> None:
        self._close()
        self._socket = dealer(self._context, self._endpoint, new_identity(), self._key)
        self._poller.register(self._socket, zmq.POLLIN)
        self._heard = self._beaten = time.monotonic()
        self._welcome = False
        self._links += 1
        self._say(self._hello)

    def _close(self) -> None:
        if self._socket is not None:
            self._poller.unregister(self._socket)
            self._socket.close()
            self._socket = None

    @property
    def _silence_seconds(self) -> float:
        return max(SILENCE_SECONDS, SILENT_BEATS * self._beat_seconds)

    def _say(self, message: Message, tensors: list[Tensor] | None = None) -> None:
        """Send, waiting a moment for a link that is only being made; a lost link is for `_keep_alive`."""
        assert self._socket is not None
        if not self._socket.poll(1000, zmq.POLLOUT):
            return
        try:
            send(self._socket, wire.encode(message, tensors or []))
        except zmq.Again:
            log.warning("the link is full; dropping a %s", message.kind)

    def _keep_alive(self) -> None:
        now = time.monotonic()
        if now - self._heard > (self._silence_seconds if self._welcome else WELCOME_SECONDS):
            log.warning("the orchestrator is silent; connecting anew")
            self._connect()
        elif self._welcome and now - self._beaten >= self._beat_seconds:
            self._beaten = now
            self._say(Heartbeat(rss_bytes=resident_bytes(), gpu_bytes=self._gpu_bytes))

    # -- what the orchestrator says -------------------------------------------------------------

    def _hear(self) -> None:
        assert self._socket is not None
        while True:
            try:
                frames = receive(self._socket)
            except zmq.Again:
                return
            self._heard = time.monotonic()
            try:
                envelope = wire.decode(frames, TO_WORKER)
            except TriptychError as error:
                log.error("the orchestrator sent something else: %s", error)
                continue
            self._take(envelope)

    def _take(self, envelope: wire.Envelope) -> None:
        match envelope.message:
            case Welcome(heartbeat_seconds=seconds):
                self._beat_seconds, self._welcome = seconds, True
                self._say_what_is()
            case Task() | SetLease() as order:
                self._idle, self._ordered = False, self._links
                self._task = order if isinstance(order, Task) else None
                self._executor.give(order, envelope.tensors)
            case Borrow() as borrow:
                self._executor.give(borrow, ())
            case Returned(bytes=size):
                leases = tuple(lease.model_copy(update={"bytes": size}) for lease in self._ready.leases)
                self._ready = self._ready.model_copy(update={"lent_bytes": 0, "leases": leases})
                self._executor.returned(size)
            case LoraPart() as part:
                self._executor.lora_part(part, b"".join(bytes(tensor.data) for tensor in envelope.tensors))
            case WantPreview(job=job, attempt=attempt):
                self._executor.want_preview(job, attempt, *envelope.tensors[:1])
            case CancelTask(job=job, attempt=attempt):
                self._executor.cancel(job, attempt)
            case Committed(job=job, attempt=attempt):
                if self._result and (self._result[0].job, self._result[0].attempt) == (job, attempt):
                    self._result = None
            case Error(code="not_found"):
                self._connect()
            case Error(code=code, message=message, hint=hint) if code in ("version", "protocol"):
                raise from_wire(code, message, hint)
            case Beat() | Error():
                pass

    def _say_result(self, result: Result, tensors: list[Tensor]) -> None:
        """Send a result, the parts of its pictures before it."""
        key: dict[str, Any] = {"job": result.job, "stage": result.stage, "attempt": result.attempt}
        first, others = tensors[: len(tensors) - result.parts], tensors[len(tensors) - result.parts :]
        for number, part in enumerate(others, 1):
            self._say(Part(**key, number=number), [part])
        self._say(result, first)

    def _say_what_is(self) -> None:
        """Tell an orchestrator that may know nothing what is held, the current task, and its result if there is one."""
        if not self._loaded:
            return
        task = self._result[0] if self._result else self._task
        if task:
            self._say(self._ready.model_copy(update={"current_task": (task.job, task.stage, task.attempt)}))
        if self._result:
            self._say_result(*self._result)
        if self._idle:
            self._say(self._ready)

    # -- what the executor has done -------------------------------------------------------------

    def _tell(self) -> None:
        try:
            self._executor.wake.recv(4096)
        except BlockingIOError:
            return
        while not self._executor.events.empty():
            event = self._executor.events.get()
            if isinstance(event, StartAnew):
                self._stop_reason = str(event)
                return
            if isinstance(event, BaseException):
                raise event
            message, tensors = event
            match message:
                case Ready():
                    self._idle, self._loaded, self._task = True, True, None
                    self._remember(message, *(name for name in message.model_fields_set if getattr(message, name)))
                case Leased():
                    self._idle = True
                    self._gpu_bytes = sum(component.device_bytes for component in message.residency)
                    self._remember(message, "residency", "context_bytes", "kept_bytes", "leases", "lendable_bytes")
                    if self._ordered != self._links:  # another orchestrator, or one that thinks this worker gone
                        message = self._ready
                case Lent(bytes=lent):
                    self._ready = self._ready.model_copy(update={"lent_bytes": lent})
                case Result() as result:
                    self._result = (result, tensors)
                    self._gpu_bytes = result.peak_bytes
            if self._welcome and isinstance(message, Result):
                self._say_result(message, tensors)
            elif self._welcome:
                self._say(message, tensors)

    def _remember(self, message: Message, *names: str) -> None:
        """Keep fields of a message for the Ready of a later hello."""
        self._ready = self._ready.model_copy(update={name: getattr(message, name) for name in names})
