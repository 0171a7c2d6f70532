"""The page at /, and the few things that it needs beside the APIs: its files, and the stack's logs."""

from http import HTTPStatus
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import FileResponse
from pydantic import BaseModel

from orchestrator.http.asking import Caller, Who
from orchestrator.http.faults import Refused
from orchestrator.state_folder import StackFolder
from protocol.errors import Forbidden, NotFound

router = APIRouter()
HERE = Path(__file__).with_name("static")
FILES = {path.name: path for path in HERE.iterdir()}  # the only ones that are sent
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' blob: data:; "
    "media-src 'self'; connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}
MEDIA = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
MOST_OF_A_LOG = 200_000  # bytes


class Log(BaseModel):
    text: str


@router.get("/", include_in_schema=False)
async def page() -> FileResponse:
    return FileResponse(FILES["index.html"], media_type="text/html", headers=HEADERS)


@router.get("/page/{name}", include_in_schema=False)
async def file(name: str) -> FileResponse:
    if (path := FILES.get(name)) is None:
        raise Refused(HTTPStatus.NOT_FOUND, "The page has no such file.")
    return FileResponse(path, media_type=MEDIA[path.suffix], headers=HEADERS)


def logs_of(who: Caller) -> dict[str, Path]:
    """Return the files of the processes' logs by name; Forbidden for keys."""
    if who.key:
        raise Forbidden("A client's key is not for logs.", "Read them on the stack's own host: triptych logs")
    return {path.stem: path for path in sorted(StackFolder(who.http.state).logs.glob("*.log"))}


@router.get("/api/logs", tags=["Triptych"])
async def logs(who: Who) -> list[str]:
    """List the processes that have a log. For the stack's own user."""
    return list(logs_of(who))


@router.get("/api/logs/{name}", tags=["Triptych"])
async def log(name: str, who: Who, most: Annotated[int, Query(ge=1, le=MOST_OF_A_LOG)] = 20_000) -> Log:
    """Show the end of a process's log. For the stack's own user."""
    if (path := logs_of(who).get(name)) is None:
        raise NotFound(f"No process {name[:100]!r} has a log.", "GET /api/logs lists those that have one.")
    with path.open("rb") as opened:
        opened.seek(max(0, path.stat().st_size - most))
        return Log(text=opened.read().decode(errors="replace"))
