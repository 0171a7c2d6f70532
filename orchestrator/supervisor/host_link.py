"""The link of a host's agent to the orchestrator of its stack, over TCP with the host's key."""

import logging
import time
from collections.abc import Iterator

import zmq

from protocol import wire
from protocol.curve_keys import PeerKey
from protocol.errors import TriptychError
from protocol.messages.common import Message, Welcome
from protocol.messages.host import TO_HOST
from protocol.sockets import dealer, new_identity, receive, send

log = logging.getLogger(__name__)

SILENCE_SECONDS = 4.0  # without an answer, after which the link counts as dead
WELCOME_SECONDS = 2.0  # the same for the hello


class HostLink:
    """A new socket is made whenever the orchestrator has been silent for too long, and the agent says hello again."""

    def __init__(self, key: PeerKey) -> None:
        self._key, self.endpoint = key, key.endpoint
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._connect()
        self.welcome = False
        self._anew = True  # a hello is due
        self._heard = self._last_word = time.monotonic()

    def _connect(self) -> "zmq.Socket[bytes]":
        return dealer(self._context, self.endpoint, new_identity(), self._key)

    def renew_if_silent(self) -> bool:
        """Return whether a hello is to be said: at first, and over a new socket where the old one's peer is silent."""
        now = time.monotonic()
        if now - self._heard > (SILENCE_SECONDS if self.welcome else WELCOME_SECONDS):
            self.begin_anew()
        if not self._anew or not self.socket.poll(0, zmq.POLLOUT):
            return False
        self._anew = False
        return True

    def begin_anew(self) -> None:
        self.socket.close(linger=0)
        self.socket = self._connect()
        self.welcome, self._anew, self._heard = False, True, time.monotonic()

    def silent_for(self) -> float:
        """Return the seconds since the orchestrator's last word."""
        return time.monotonic() - self._last_word

    def say(self, message: Message) -> bool:
        """Send a message without waiting; return False where it can't be sent now."""
        try:
            send(self.socket, wire.encode(message))
        except zmq.Again:
            return False
        return True

    def hear(self) -> Iterator[Message]:
        """Yield what the orchestrator has said since the last call."""
        while True:
            try:
                frames = receive(self.socket)
            except zmq.Again:
                return
            self._heard = self._last_word = time.monotonic()
            try:
                message = wire.decode(frames, TO_HOST).message
            except TriptychError as error:
                log.error("the orchestrator sent something else: %s", error)
                continue
            self.welcome |= isinstance(message, Welcome)
            yield message

    def close(self) -> None:
        self.socket.close()  # it may take a moment to send the last words
        self._context.term()
