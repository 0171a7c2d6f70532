"""The front of a door: TCP connections, capped, their bytes passed to and from libzmq's socket behind.

libzmq takes as many connections as there are files, and can't be told to take fewer. Who has proved itself is known by
what libzmq has answered. Where all places are taken, the oldest unproven connection gives way to one that comes, or the
oldest of the address that has the most: it comes again, if it is needed.
"""

import asyncio
import contextlib
import functools
import socket
import threading
import urllib.parse
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass

from protocol.errors import BadRequest
from protocol.sockets import KEEPALIVE_SECONDS

CHUNK = 1 << 18  # bytes read at once
PROVEN_BYTES = {True: 280, False: 70}  # that libzmq has sent once a peer is let in, with CURVE and without
BACKLOG = 256
PAUSE_SECONDS = 0.05
UNTAKEN_MS = 2500  # less than a peer's own, so that its old connection is mostly gone before it comes again


@dataclass(eq=False, slots=True)
class Connection:
    socket: socket.socket
    address: str
    proven: bool = False  # its peer was let in
    task: "asyncio.Task[None] | None" = None


class Front:
    """`guarded`: with CURVE. `turned_away` hears the addresses of those who were not let in.

    `failure` is what has ended it, if anything has.
    """

    def __init__(self, most: int, guarded: bool, turned_away: Callable[[str], None], full: Callable[[], None]) -> None:
        self._most, self._proven_bytes = most, PROVEN_BYTES[guarded]
        self._turned_away, self._full = turned_away, full
        self._open: dict[Connection, None] = {}  # the oldest first
        self.failure: BaseException | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="front")

    def listen(self, endpoint: str, inner: str) -> str:
        """Listen at a TCP endpoint for the socket at a path; return the endpoint, with its port. BadRequest."""
        try:
            listening = listen_at(endpoint)
        except OSError as error:
            raise BadRequest(
                f"Nothing can listen at {endpoint!r}: {error.strerror}.", "Choose another port."
            ) from error
        host, port = listening.getsockname()[:2]
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._accept(listening, inner), self._loop).add_done_callback(self._ended)
        return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"

    def _ended(self, accepting: "Future[None]") -> None:
        if not accepting.cancelled():
            self.failure = accepting.exception()

    async def _accept(self, listening: socket.socket, inner: str) -> None:
        """Take connections one by one, so that there are never more than there may be."""
        while True:
            try:
                taken, (address, *_) = await self._loop.sock_accept(listening)
            except OSError:  # it was gone before it was taken, or other processes have all files
                await asyncio.sleep(PAUSE_SECONDS)
                continue
            if len(self._open) >= self._most:
                self._full()
                await self._end(self._weakest())
            taken.setblocking(False)
            look_for_death(taken)
            connection = Connection(taken, str(address))
            self._open[connection] = None
            connection.task = self._loop.create_task(self._pass(connection, inner))
            connection.task.add_done_callback(functools.partial(self._over, connection))
            await asyncio.sleep(0)  # it begins before another comes

    def _weakest(self) -> Connection:
        """Return the connection that gives way: the oldest unproven one, or the oldest of who has the most."""
        if unproven := next((one for one in self._open if not one.proven), None):
            return unproven
        most = Counter(one.address for one in self._open).most_common(1)[0][0]
        return next(one for one in self._open if one.address == most)

    async def _end(self, connection: Connection) -> None:
        assert connection.task is not None
        connection.task.cancel()
        await asyncio.wait([connection.task])
        await asyncio.sleep(0)  # until it is counted as over

    def _over(self, connection: Connection, task: "asyncio.Task[None]") -> None:
        self._open.pop(connection, None)
        connection.socket.close()
        if not connection.proven:
            self._turned_away(connection.address)
        if not task.cancelled():
            task.exception()  # what ends one connection is its own

    async def _pass(self, connection: Connection, inner: str) -> None:
        """Pass a connection's bytes on, both ways, until either side ends it."""
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as behind:
            behind.setblocking(False)
            await self._loop.sock_connect(behind, inner)
            await first_of(self._pump(connection.socket, behind), self._answer(behind, connection))

    async def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        while data := await self._loop.sock_recv(source, CHUNK):
            await self._loop.sock_sendall(sink, data)

    async def _answer(self, behind: socket.socket, connection: Connection) -> None:
        sent = 0
        while not connection.proven and (data := await self._loop.sock_recv(behind, CHUNK)):
            await self._loop.sock_sendall(connection.socket, data)
            sent += len(data)
            connection.proven = sent >= self._proven_bytes
        if connection.proven:
            await self._pump(behind, connection.socket)

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()


async def first_of(*both: Coroutine[None, None, None]) -> None:
    """Run coroutines until the first one is over, and end the others; that a connection is lost is no error."""
    tasks = [asyncio.ensure_future(one) for one in both]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def look_for_death(taken: socket.socket) -> None:
    """Have TCP drop a connection whose other end is gone without a word, in some three seconds."""
    idle = "KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE") else "KEEPALIVE"  # as macOS calls it
    times = {idle: KEEPALIVE_SECONDS, "KEEPINTVL": KEEPALIVE_SECONDS, "KEEPCNT": 2, "USER_TIMEOUT": UNTAKEN_MS}
    with contextlib.suppress(OSError):  # it has gone already
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in times.items():
            if (option := getattr(socket, f"TCP_{name}", None)) is not None:  # not all systems have all of them
                taken.setsockopt(socket.IPPROTO_TCP, option, value)


def listen_at(endpoint: str) -> socket.socket:
    """Return a socket that listens at tcp://HOST:PORT; OSError."""
    address = urllib.parse.urlsplit(endpoint)
    host = "0.0.0.0" if address.hostname in (None, "*") else str(address.hostname)
    found = socket.getaddrinfo(host, address.port, type=socket.SOCK_STREAM)
    family, kind, _, _, where = min(found, key=lambda one: one[0] != socket.AF_INET)  # as libzmq's peers look for it
    listening = socket.socket(family, kind)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.setblocking(False)
    try:
        listening.bind(where)
        listening.listen(BACKLOG)
    except OSError:
        listening.close()
        raise
    return listening
