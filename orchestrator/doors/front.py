"""The front of a door: TCP connections, capped, their bytes passed to and from libzmq's socket behind.

libzmq takes as many connections as there are files, and can't be told to take fewer. Who has proved itself is known by
what libzmq has answered. Where all places are taken, the oldest unproven connection gives way.
"""

import asyncio
import socket
import threading
import urllib.parse
from collections.abc import Callable, Coroutine

from protocol.errors import BadRequest

CHUNK = 1 << 18  # bytes read at once
PROVEN_BYTES = {True: 280, False: 70}  # that libzmq has sent once a peer is let in, with CURVE and without
BACKLOG = 256
PAUSE_SECONDS = 0.05


class Front:
    """`guarded`: with CURVE. `turned_away` hears the addresses of those who were not let in."""

    def __init__(self, most: int, guarded: bool, turned_away: Callable[[str], None], full: Callable[[], None]) -> None:
        self._most, self._proven_bytes = most, PROVEN_BYTES[guarded]
        self._turned_away, self._full = turned_away, full
        self._unproven: dict[asyncio.Task[None], None] = {}  # connections, the oldest first
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
        asyncio.run_coroutine_threadsafe(self._accept(listening, inner), self._loop)
        return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"

    async def _accept(self, listening: socket.socket, inner: str) -> None:
        """Take connections one by one, so that there are never more than there may be."""
        passing: set[asyncio.Task[None]] = set()
        while True:
            try:
                connection, _ = await self._loop.sock_accept(listening)
            except OSError:  # it was gone before it was taken, or other processes have all files
                await asyncio.sleep(PAUSE_SECONDS)
                continue
            if len(passing) >= self._most:
                self._full()
                if not self._unproven:
                    connection.close()
                    continue
                oldest = next(iter(self._unproven))
                oldest.cancel()
                await asyncio.wait([oldest])
            task = self._loop.create_task(self._pass(connection, inner))
            self._unproven[task] = None
            passing.add(task)
            task.add_done_callback(passing.discard)

    async def _pass(self, connection: socket.socket, inner: str) -> None:
        """Pass a connection's bytes on, both ways, until either side ends it."""
        this, address = asyncio.current_task(), "?"
        assert this is not None
        with connection, socket.socket(socket.AF_UNIX) as behind:
            try:
                address = str(connection.getpeername()[0])
                connection.setblocking(False)
                behind.setblocking(False)
                await self._loop.sock_connect(behind, inner)
                await first_of(self._pump(connection, behind), self._answer(behind, connection, this))
            except OSError:  # it is gone already
                pass
            finally:
                if this in self._unproven:
                    del self._unproven[this]
                    self._turned_away(address)

    async def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        while data := await self._loop.sock_recv(source, CHUNK):
            await self._loop.sock_sendall(sink, data)

    async def _answer(self, behind: socket.socket, connection: socket.socket, this: "asyncio.Task[None]") -> None:
        sent = 0
        while this in self._unproven and (data := await self._loop.sock_recv(behind, CHUNK)):
            await self._loop.sock_sendall(connection, data)
            sent += len(data)
            if sent >= self._proven_bytes:
                del self._unproven[this]
        await self._pump(behind, connection)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        if self._thread.is_alive():
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


def listen_at(endpoint: str) -> socket.socket:
    """Return a socket that listens at tcp://HOST:PORT; OSError."""
    address = urllib.parse.urlsplit(endpoint)
    host = "0.0.0.0" if address.hostname in (None, "*") else str(address.hostname)
    family, kind, _, _, where = socket.getaddrinfo(host, address.port, type=socket.SOCK_STREAM)[0]
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
