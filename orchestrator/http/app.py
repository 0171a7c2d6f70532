"""The application: its routes, what guards them, and how errors are told."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from http import HTTPStatus

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from orchestrator.access import AllowedKeys, KeyFolder
from orchestrator.http import a1111, health, jobs, metrics, openai, page, videos
from orchestrator.http.asking import Http
from orchestrator.http.description import described
from orchestrator.http.faults import Refused, tell
from orchestrator.http.guard import Guard, normal
from orchestrator.http.results import Links, Results, file_response
from orchestrator.http.stack import StackLink
from orchestrator.pulse import Pulse
from orchestrator.settings import HttpSpec
from orchestrator.state_folder import StackFolder
from orchestrator.version import VERSION
from protocol.errors import TriptychError

PULSE_SECONDS = 1.0
DESCRIPTION = """Pictures and videos of a Triptych stack.

`/v1` speaks as OpenAI's Images and Videos APIs do, `/sdapi/v1` as AUTOMATIC1111's web UI; `/api` is Triptych's own:
jobs with their events and results, workers, models and LoRAs."""


def create_app(spec: HttpSpec, pulse: Pulse) -> FastAPI:
    """Return the application, whose loop moves a `pulse` while it takes requests."""
    settings = spec.settings
    folder = StackFolder(spec.state)
    http = Http(
        folder.path,
        settings,
        StackLink(spec.endpoint),
        Results(),
        Links.of(folder.keys),
        AllowedKeys(KeyFolder(folder.keys)),
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with http.stack.open():
            beating = asyncio.create_task(beat(pulse))
            yield
            beating.cancel()

    app = FastAPI(
        title="Triptych",
        version=VERSION,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.openapi = lambda: described(app)  # type: ignore[method-assign]
    app.state.http = http
    for kind in (TriptychError, RequestValidationError, ValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, tell)
    for router in (health.router, metrics.router, openai.router, videos.router, jobs.router, a1111.router, page.router):
        app.include_router(router)
    app.add_middleware(Guard, settings=settings, keys=http.keys)
    if settings.http_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=[normal(origin) for origin in settings.http_origins], allow_methods=["*"],
            allow_headers=["*"], expose_headers=["Retry-After", "X-Triptych-Model", "X-Triptych-Step"],
        )  # fmt: skip
    app.add_api_route("/pictures/{job}/{index}.{suffix}", linked, methods=["GET", "HEAD"], include_in_schema=False)
    for path, show in (("/healthz", health.healthz), ("/readyz", health.readyz), ("/", page.page)):
        app.add_api_route(path, show, methods=["HEAD"], include_in_schema=False)
    return app


async def beat(pulse: Pulse) -> None:
    while True:
        pulse.beat()
        await asyncio.sleep(PULSE_SECONDS)


async def linked(
    request: Request, job: str, index: int, suffix: str, expires: int, signature: str, key: str = ""
) -> Response:
    """Send a result by a link that was signed here."""
    http: Http = request.app.state.http
    http.links.check(key, job, index, suffix, expires, signature)
    if key and not http.keys.knows(key):
        raise Refused(HTTPStatus.FORBIDDEN, "Whoever made this link is not let in any more.")
    async with http.stack.acting_for(key) as client:
        file, tag = await http.results.file(client, key, job, index, suffix)
    return file_response(request, file, suffix, tag)
