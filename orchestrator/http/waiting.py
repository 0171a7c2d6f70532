"""Answers that take long: as server-sent events, and as JSON whose connection is kept alive meanwhile."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.background import BackgroundTask

from orchestrator.http.faults import body_of, error_of
from protocol.client.async_client import AsyncClient
from protocol.client.exchange import raise_unless_done
from protocol.job import Job

KEEP_ALIVE_SECONDS = 10.0  # without a byte; proxies and clients hang up after 30 and more
FIRST_SECONDS = 20.0  # that an answer may take with its status yet open
SSE = "text/event-stream"
SSE_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


async def done(client: AsyncClient, jobs: list[Job]) -> None:
    """Wait until all jobs are done; JobFailed, JobCancelled for the first that ends otherwise."""
    async for change in client.events([job.id for job in jobs]):
        if change.state in ("failed", "cancelled"):
            raise_unless_done(await client.job(change.job))


async def answer(request: Request, work: Awaitable[Any], headers: dict[str, str] | None = None) -> Response:
    """Answer with the JSON that some work gives. What takes long has its headers sent early, and spaces meanwhile.

    An error after that comes in a body with status 200, since the status is out.
    """
    task = asyncio.ensure_future(work)
    done, _ = await asyncio.wait([task], timeout=FIRST_SECONDS)
    if done:
        return JSONResponse(task.result(), headers=headers)

    async def late() -> AsyncIterator[bytes]:
        while not (await asyncio.wait([task], timeout=KEEP_ALIVE_SECONDS))[0]:
            yield b" "
        try:
            yield json.dumps(task.result()).encode()
        except Exception as error:
            yield json.dumps(body_of(error_of(error), request.url.path)).encode()

    return StreamingResponse(
        late(), media_type="application/json", headers=headers, background=BackgroundTask(end, task)
    )


async def end(task: "asyncio.Future[Any]") -> None:
    """End a task that nobody waits for any more."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await task


def event(data: dict[str, Any], name: str = "", number: str = "") -> bytes:
    """Return a server-sent event."""
    lines = [f"id: {number}\n" if number else "", f"event: {name}\n" if name else ""]
    return f"{''.join(lines)}data: {json.dumps(data)}\n\n".encode()


def stream(
    request: Request, events: AsyncIterator[bytes], fault: Callable[[Exception], bytes] | None = None
) -> StreamingResponse:
    """Send events as they come, and a comment now and then where none do; an error becomes the last event."""
    key = request.state.caller

    async def sending() -> AsyncIterator[bytes]:
        coming: asyncio.Future[bytes] | None = None
        try:
            while True:
                coming = coming or asyncio.ensure_future(anext(events))
                if not (await asyncio.wait([coming], timeout=KEEP_ALIVE_SECONDS))[0]:
                    if key and not request.app.state.http.keys.knows(key):  # it was revoked meanwhile
                        return
                    yield b": waiting\n\n"
                    continue
                try:
                    yield coming.result()
                except StopAsyncIteration:
                    return
                coming = None
        except Exception as error:
            found = error_of(error)
            yield fault(found) if fault else event(body_of(found, request.url.path), "error")
        finally:
            if coming is not None:
                await end(coming)
            await events.aclose()  # type: ignore[attr-defined]

    return StreamingResponse(sending(), media_type=SSE, headers=SSE_HEADERS)
