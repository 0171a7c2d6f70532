"""Connections to the orchestrator: one for each caller that has something to ask, kept for a while."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from protocol.client.async_client import AsyncClient

IDLE_SECONDS = 60.0  # that a connection is kept without use


@dataclass(slots=True)
class Connection:
    client: AsyncClient
    users: int = 0  # requests that use it now
    since: float = field(default_factory=time.monotonic)  # when it was last used


class StackLink:
    """The orchestrator at an endpoint. It may be away for a while: questions wait for it, or end with NoStack."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self._connections: dict[str, Connection] = {}
        self._sweeper: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def acting_for(self, key: str) -> AsyncIterator[AsyncClient]:
        """A client on behalf of a key's holder, by the key's name; of this machine's user where that is empty."""
        connection = self._connections.get(key)
        if connection is None or connection.client.broken:
            connection = self._connections[key] = Connection(AsyncClient(endpoint=self.endpoint, owner=key))
            await connection.client.__aenter__()
        connection.users += 1
        try:
            yield connection.client
        finally:
            connection.users -= 1
            connection.since = time.monotonic()

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Close connections that nobody uses any more, and all of them at the end."""
        self._sweeper = asyncio.create_task(self._sweep())
        try:
            yield
        finally:
            self._sweeper.cancel()
            for connection in self._connections.values():
                await connection.client.close()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(IDLE_SECONDS / 2)
            limit = time.monotonic() - IDLE_SECONDS
            for key, connection in list(self._connections.items()):
                if not connection.users and connection.since < limit:
                    del self._connections[key]
                    await connection.client.close()
