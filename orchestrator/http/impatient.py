"""Connections that send no request for long are closed: uvicorn waits for a first one for ever."""

import asyncio

from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEAD_SECONDS = 20.0  # from a connection to its first request's head


class Impatient(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's protocol, with a deadline for the first request."""

    seconds = HEAD_SECONDS

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.loop.call_later(self.seconds, self._close_unless_asked, transport)

    def _close_unless_asked(self, transport: asyncio.Transport) -> None:
        if self.cycle is None:  # no request has begun
            transport.close()
