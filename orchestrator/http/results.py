"""Files of what jobs have made: encoded off the event loop, kept for a while, and linked to by signed addresses."""

import asyncio
import base64
import hashlib
import hmac
import io
import re
import secrets
import tempfile
import time
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from fastapi import Request, Response
from PIL import Image

from orchestrator.http.faults import Refused
from protocol.client.async_client import AsyncClient
from protocol.client.picture_files import metadata_of, picture_bytes, to_images
from protocol.client.video_files import save_made, sound_of
from protocol.curve_keys import read_private, write_private
from protocol.errors import BadRequest, NotFound
from protocol.job import Job
from protocol.pictures import pictures_among
from protocol.tensors import Tensor

PICTURES = {"png": "PNG", "jpeg": "JPEG", "jpg": "JPEG", "webp": "WEBP"}  # Pillow's kinds, by suffix
MEDIA = {
    "png": "image/png", "jpeg": "image/jpeg", "jpg": "image/jpeg", "webp": "image/webp", "gif": "image/gif",
    "mp4": "video/mp4", "webm": "video/webm",
}  # fmt: skip
CACHE_BYTES = 64 << 20  # of files that were asked for lately
LINK_SECONDS = 3600  # that a signed link is good for
RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
AT_ONCE = 4  # jobs whose results are fetched and encoded


class Results:
    """Files of jobs' pictures and videos. Encoding one is slow beside all else here, so they are kept."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, ...], bytes] = OrderedDict()
        self._bytes = 0
        self._busy = asyncio.Semaphore(AT_ONCE)

    async def file(
        self, client: AsyncClient, key: str, job_id: str, index: int, suffix: str, quality: int | None = None
    ) -> tuple[bytes, str]:
        """Return the file of one of a job's pictures or videos, counted from 0, and a tag of its own; NotFound.

        `key` tells whose job it is. `quality` is JPEG's and WebP's, from 0 to 100; None: as good as can be.
        """
        job = await client.job(job_id)  # which may be another one by now
        name, tag = name_of(key, job, index, suffix, quality), f"{job.id}-{job.number}-{index}"
        if name not in self._kept or not job.pictures:
            async with self._busy:
                if name in self._kept and job.pictures:  # made meanwhile
                    return self._kept[name], tag
                job, tensors = await client.results(job_id)
                if not 0 <= index < job.recipe.num_images:
                    raise NotFound(f"Job {job_id} has {job.recipe.num_images} results; there is no {index}.")
                file = await asyncio.to_thread(encoded, job, tensors, index, suffix, quality)
            self._keep(name, file)
            return file, tag
        self._kept.move_to_end(name)
        return self._kept[name], tag

    async def files(
        self, client: AsyncClient, key: str, job: Job, suffix: str, quality: int | None = None
    ) -> list[bytes]:
        """Return the files of all that a job has made, in order."""
        names = [name_of(key, job, index, suffix, quality) for index in range(job.recipe.num_images)]
        if not all(name in self._kept for name in names):
            async with self._busy:
                job, tensors = await client.results(job.id)
                files = [await asyncio.to_thread(encoded, job, tensors, i, suffix, quality) for i in range(len(names))]
            for name, file in zip(names, files, strict=True):
                self._keep(name, file)
            return files
        return [self._kept[name] for name in names]

    def _keep(self, name: tuple[str, ...], file: bytes) -> None:
        if name not in self._kept and len(file) <= CACHE_BYTES:
            self._kept[name] = file
            self._bytes += len(file)
        while self._bytes > CACHE_BYTES:
            self._bytes -= len(self._kept.popitem(last=False)[1])


def name_of(key: str, job: Job, index: int, suffix: str, quality: int | None) -> tuple[str, ...]:
    """Return what a file is kept by: a job's number is no other's, though its id may be, once it is forgotten."""
    return key, job.id, str(job.number), str(index), suffix, str(quality)


def encoded(job: Job, tensors: Sequence[Tensor], index: int, suffix: str, quality: int | None) -> bytes:
    """Return the file of one of a job's results, with its whole recipe; BadRequest where the format doesn't fit."""
    images = to_images(pictures_among(tensors))
    metadata = metadata_of(job.recipe, job.id, index, job.records)
    if job.recipe.frames is None:
        if suffix not in PICTURES:
            raise BadRequest(f"Job {job.id} made pictures, no {suffix}.", f"They come as {', '.join(PICTURES)}.")
        return picture_bytes(images[index], PICTURES[suffix], metadata, quality)
    with tempfile.TemporaryDirectory(prefix="triptych-") as folder:
        path = Path(folder, f"video.{suffix}")
        save_made(images, index, path, job.recipe, metadata, sound_of(tensors, index))
        return path.read_bytes()


def enlarged(preview: bytes, size: tuple[int, int], suffix: str) -> bytes:
    """Return a preview, a JPEG file, as a file of another size and format."""
    with Image.open(io.BytesIO(preview), formats=("JPEG",)) as image:
        return picture_bytes(image.convert("RGB").resize(size, Image.Resampling.BICUBIC), PICTURES[suffix], None, 80)


def text_of(file: bytes) -> str:
    return base64.b64encode(file).decode()


def file_answers(kinds: Collection[str]) -> dict[int | str, dict[str, Any]]:
    """Return what the OpenAPI document says of a route that sends files of such media types, see `file_response`."""
    return {
        200: {"content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in kinds}},
        206: {"description": "The range that was asked for."},
        304: {"description": "It is as whoever asks has it."},
        416: {"description": "There is no such range."},
    }


def file_response(request: Request, file: bytes, suffix: str, tag: str) -> Response:
    """Return a file, or the range of it that is asked for."""
    headers = {
        "ETag": f'"{tag}"', "Accept-Ranges": "bytes", "Cache-Control": "private, max-age=60",
        "Content-Disposition": f'inline; filename="{tag}.{suffix}"',
    }  # fmt: skip
    if f'"{tag}"' in request.headers.get("if-none-match", ""):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    wanted = RANGE.fullmatch(request.headers.get("range", ""))
    if wanted is None or wanted[0] == "bytes=-":
        return Response(file, media_type=MEDIA[suffix], headers=headers)
    start, end = wanted[1], wanted[2]
    first = int(start) if start else max(0, len(file) - int(end))
    last = min(int(end), len(file) - 1) if start and end else len(file) - 1
    if start and end and int(start) > int(end):  # no range: it is as if none were asked for
        return Response(file, media_type=MEDIA[suffix], headers=headers)
    if first > last:
        headers["Content-Range"] = f"bytes */{len(file)}"
        return Response(status_code=HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, headers=headers)
    headers["Content-Range"] = f"bytes {first}-{last}/{len(file)}"
    return Response(file[first : last + 1], HTTPStatus.PARTIAL_CONTENT, headers, MEDIA[suffix])


@dataclass(frozen=True, slots=True)
class Links:
    """Addresses of results that need no key, for a while: whoever has one may fetch that file."""

    secret: bytes

    @staticmethod
    def of(folder: Path) -> "Links":
        """The links that are signed by a folder's secret, made when it is first wanted: they outlive this process."""
        path = folder / "links"
        if not path.exists():
            folder.mkdir(mode=0o700, exist_ok=True)
            write_private(path, secrets.token_hex(32))
        return Links(bytes.fromhex(read_private(path)))

    def path(self, key: str, job_id: str, index: int, suffix: str, now: float | None = None) -> str:
        """Return a link's path and query."""
        expires = int((time.time() if now is None else now) + LINK_SECONDS)
        query = {"key": key, "expires": expires, "signature": self._sign(key, job_id, index, suffix, expires)}
        return f"/pictures/{job_id}/{index}.{suffix}?{urlencode(query)}"

    def check(self, key: str, job_id: str, index: int, suffix: str, expires: int, signature: str) -> None:
        """Refuse a link that was not signed here, or is too old."""
        if not hmac.compare_digest(self._sign(key, job_id, index, suffix, expires).encode(), signature.encode()):
            raise Refused(HTTPStatus.FORBIDDEN, "This link was not made here.", "Ask for a new one.")
        if time.time() > expires:
            raise Refused(HTTPStatus.GONE, "This link is too old.", "Ask for a new one.")

    def _sign(self, *parts: object) -> str:
        text = "\n".join(map(str, parts))
        return hmac.new(self.secret, text.encode(), hashlib.sha256).hexdigest()
