"""The supervisor's link to the orchestrator: tells what runs and what has ended, and takes orders."""

import errno
import logging
import os
import time
from collections.abc import Iterator, Sequence

import zmq

from protocol import wire
from protocol.errors import TriptychError
from protocol.messages.common import Message
from protocol.messages.supervisor import TO_SUPERVISOR, Processes, RestingModel, SupervisorHello
from protocol.sockets import dealer, new_identity, receive, send
from protocol.views import ProcessView

log = logging.getLogger(__name__)

HELLO_SECONDS = 1.0  # the supervisor says hello again and again: the orchestrator may be a new one


class OrchestratorLink:
    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket: zmq.Socket[bytes] | None = None
        self._said_hello = 0.0  # monotonic seconds
        self._ended: list[int] = []  # process numbers that the orchestrator was not told of yet
        self._resting: tuple[RestingModel, ...] = ()  # models, as last told
        self._stopped: list[int] = []  # of them, those that stood still by a signal, which no task can have ended

    def ended(self, pid: int) -> None:
        self._ended.append(pid)

    def stopped(self, pid: int) -> None:
        self._stopped.append(pid)

    def hello_again(self) -> None:
        """Say hello at once, since another orchestrator comes."""
        self._said_hello = 0.0

    def tell(self, views: Sequence[ProcessView], resting: tuple[RestingModel, ...] = ()) -> None:
        """Say hello with all processes and the models that rest: once a second, or at once where something changed."""
        now = time.monotonic()
        if not self._ended and resting == self._resting and now - self._said_hello < HELLO_SECONDS:
            return
        self._said_hello = now
        if self.socket is None:
            self.socket = dealer(self._context, self._endpoint, new_identity())
        ended, stopped = tuple(self._ended), tuple(pid for pid in self._stopped if pid in self._ended)
        told = Processes(processes=tuple(views), exited_pids=ended, stopped_pids=stopped, resting=resting)
        if self._say(SupervisorHello(pid=os.getpid())) and self._say(told):
            self._resting = resting
            self._stopped = [pid for pid in self._stopped if pid not in ended]
            self._ended.clear()
        else:
            self._said_hello = 0.0  # nobody listens there yet

    def say(self, message: Message) -> None:
        """Say something of which the orchestrator asks again if it is lost."""
        if self.socket is not None:
            self._say(message)

    def hear(self) -> Iterator[Message]:
        """Yield what the orchestrator has said since the last call."""
        while self.socket is not None:
            try:
                yield wire.decode(receive(self.socket), TO_SUPERVISOR).message
            except zmq.Again:
                return
            except TriptychError as error:
                log.error("the orchestrator sent something else: %s", error)

    def close(self) -> None:
        if self.socket is not None:
            self.socket.close(linger=0)
        self._context.term()

    def _say(self, message: Message) -> bool:
        assert self.socket is not None
        try:
            send(self.socket, wire.encode(message))
        except zmq.ZMQError as error:
            if error.errno != errno.EAGAIN:
                raise
            return False
        return True
