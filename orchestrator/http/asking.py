"""From a request by HTTP to jobs: what all its APIs have in common."""

import asyncio
import base64
import binascii
import contextlib
import hashlib
import io
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Request
from PIL import Image
from pydantic import BaseModel

from orchestrator.access import AllowedKeys
from orchestrator.http.faults import BadField
from orchestrator.http.results import Links, Results
from orchestrator.http.stack import StackLink
from orchestrator.settings import HttpSettings
from protocol.client.async_client import AsyncClient
from protocol.client.input_pictures import FORMATS, Inputs, alpha_mask_of, picture_of, upright, video_of
from protocol.errors import BadRequest, NoStack, NotFound
from protocol.job import MAX_SEED, Job, JobRequest
from protocol.lora import LORA_NAME, LoraRequest, parse_lora
from protocol.pictures import MAX_PIXELS
from protocol.tensors import Tensor
from protocol.views import ModelView

PATIENCE_SECONDS, POLL_SECONDS = 20.0, 0.1  # for a stack that has just been started, and is looking at its model
MODELS_SECONDS = 1.0  # that what is known of models may be old
AT_ONCE = 2  # requests whose pictures are decoded
MOST_PIXELS = 2 * MAX_PIXELS  # of a request's pictures together
SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
DATA_URL = re.compile(r"data:[\w.+-]+/[\w.+-]+;base64,", re.ASCII)


@dataclass(frozen=True, slots=True)
class Http:
    """All that the routes of one HTTP process share."""

    state: Path  # the stack's folder
    settings: HttpSettings
    stack: StackLink
    results: Results
    links: Links
    keys: AllowedKeys
    decoding: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE))
    models: dict[str, tuple[float, list[ModelView]]] = field(default_factory=dict)  # by key, and when they were asked


@dataclass(frozen=True, slots=True)
class Caller:
    """The maker of a request, and a client that acts for them."""

    key: str  # its name; empty for this machine's user
    client: AsyncClient
    http: Http

    async def models(self, name: str | None = None) -> list[ModelView]:
        """Return the stack's models, the default one first, as of a moment ago; NoStack while none is known yet.

        They are asked for anew where none has the wanted `name`.
        """
        since, models = self.http.models.get(self.key, (0.0, []))
        missing = name is not None and all(name not in (model.name, model.model) for model in models)
        if missing or time.monotonic() - since > MODELS_SECONDS:
            models = await models_of(self.client)
            self.http.models[self.key] = time.monotonic(), models
        return models


async def caller(request: Request) -> Any:
    """Whoever makes a request, while it lasts."""
    http: Http = request.app.state.http
    key: str = request.state.caller
    async with http.stack.acting_for(key) as client:
        yield Caller(key, client, http)


Who = Annotated[Caller, Depends(caller)]  # the parameter of a route that answers its caller


@dataclass(slots=True)
class Wanted:
    """Jobs that are to be submitted, with the pictures that they begin from; `told` is said beside the answer."""

    requests: list[JobRequest]
    pictures: Sequence[Tensor] = ()
    told: list[str] = field(default_factory=list)

    async def submit(self, client: AsyncClient, watch: bool) -> list[Job]:
        """Submit them; `watch` where their events are listened to right away."""
        return await client.submit_many(self.requests, watch=watch, pictures=self.pictures)


async def models_of(client: AsyncClient) -> list[ModelView]:
    """Return the stack's models, the default one first, once one is known; NoStack where that takes long."""
    limit = time.monotonic() + PATIENCE_SECONDS
    while not (models := await client.models()):
        if time.monotonic() > limit:
            raise NoStack("The stack is yet looking at its model.", "Ask again in a moment.")
        await asyncio.sleep(POLL_SECONDS)
    return models


def model_named(models: Sequence[ModelView], name: str | None, told: list[str]) -> ModelView:
    """Return the model of a name. One that isn't here becomes the default one, which is said."""
    found = next((model for model in models if name in (model.name, model.model)), None)
    if found is not None or name is None:
        return found or models[0]
    told.append(f"There is no model {name!r} here: {models[0].name} made this.")
    return models[0]


def model_known(models: Sequence[ModelView], name: str | None) -> ModelView:
    """Return the model of a name, the default one where none is given; NotFound."""
    if name is None:
        return models[0]
    for model in models:
        if model.name == name:
            return model
    raise NotFound(f"There is no model {name[:100]!r}.", f"There are {', '.join(model.name for model in models)}.")


def size_of(text: str) -> tuple[int | None, int | None]:
    """Return width and height of 'WxH' in pixels; None for 'auto', which leaves it to the model."""
    if text == "auto":
        return None, None
    if (found := SIZE.fullmatch(text)) is None:
        raise BadField("size", f"{text[:40]!r} is no size.", "Write WIDTHxHEIGHT in pixels, or auto.")
    return int(found[1]), int(found[2])


def spread(request: JobRequest, count: int, model: ModelView) -> list[JobRequest]:
    """Return jobs that make so many pictures: one, or where a model makes but one at a time, one for each picture."""
    if count == 1 or model.description.several:
        return [request.model_copy(update={"num_images": count})]
    found = []
    for number in range(count):
        update: dict[str, Any] = {"id": f"{request.id}-{number}" if request.id else None}
        if request.seed is not None:
            update["seed"] = (request.seed + number) % (MAX_SEED + 1)
        found.append(request.model_copy(update=update))
    return found


def either_body(form: type[BaseModel]) -> dict[str, Any]:
    """Return what the OpenAPI document says of a body that comes as JSON or as a form."""
    kinds = ("multipart/form-data", "application/json")
    content = {kind: {"schema": form.model_json_schema()} for kind in kinds}
    return {"requestBody": {"required": True, "content": content}}


def id_of(given: str | None, idempotency: str | None) -> str:
    """Return the id of a job: as given, or by the request's Idempotency-Key, or a new one."""
    if given:
        return given
    if idempotency:
        return f"i{hashlib.sha256(idempotency.encode()).hexdigest()[:24]}"
    return secrets.token_hex(8)


def loras_of(texts: Sequence[str]) -> tuple[LoraRequest, ...]:
    """Return LoRAs as NAME[@WEIGHT] names them: aliases of the stack's alone, no paths; BadField."""
    found = []
    for text in texts:
        name, weight = parse_lora(text)
        if LORA_NAME.fullmatch(name) is None:
            raise BadField("loras", f"{text[:100]!r} is no LoRA's name.", "GET /api/loras lists those that there are.")
        found.append(LoraRequest(name=name, weight=weight))
    return tuple(found)


def file_of(text: str, name: str) -> bytes:
    """Return the bytes of a file that a field holds as base64, or as a data URL; BadField."""
    try:
        return base64.b64decode(DATA_URL.sub("", text, count=1), validate=True)
    except (binascii.Error, ValueError):
        raise BadField(name, f"{name} is no base64.", "Send a picture's file as base64, or as a data URL.") from None


async def pixels_of(
    http: Http,
    images: Sequence[bytes],
    mask: bytes | None = None,
    blur: float = 0,
    alpha: bool = False,
    control: bytes | None = None,
    ip_image: bytes | None = None,
    video: bytes | None = None,
) -> Inputs:
    """Return the pixels of files; BadRequest. A mask's clear parts are made anew where `alpha`, and its white ones."""

    def read() -> Inputs:
        check_pixels([*images, *(one for one in (mask, control, ip_image) if one)])
        return Inputs(
            images=tuple(map(picture_of, images)),
            mask=mask_of(mask, blur, alpha) if mask else None,
            control=picture_of(control) if control else None,
            ip_image=picture_of(ip_image) if ip_image else None,
            videos=(("", video_of(video)),) if video else (),
        )

    async with http.decoding:
        return await asyncio.to_thread(read)


def check_pixels(files: Sequence[bytes]) -> None:
    """Raise BadRequest where pictures have too many pixels together, by their headers alone."""
    total = 0
    for file in files:
        unread = contextlib.suppress(
            OSError, ValueError, SyntaxError, Image.DecompressionBombError
        )  # told by who decodes
        with unread, Image.open(io.BytesIO(file), formats=FORMATS) as image:
            total += image.width * image.height
    if total > MOST_PIXELS:
        raise BadRequest(f"The pictures have {total} pixels together.", f"At most {MOST_PIXELS} are taken.")


def mask_of(file: bytes, blur: float, alpha: bool) -> Tensor:
    if alpha and upright(file).has_transparency_data:
        return alpha_mask_of(file, blur)
    return picture_of(file, mask=True, blur=blur)


def check_takes(model: ModelView, image: bool, mask: bool, video: bool = False) -> None:
    """Raise BadRequest where a model makes nothing of a picture, of a mask or of a video."""
    takes = model.description
    if video and takes.of_video is None and not any(name in takes.needs for name in ("video", "videos")):
        raise BadRequest(f"{model.name} makes nothing of videos.", "Send none, or choose another model.")
    if mask and takes.inpaint is None and not takes.control_mask:
        raise BadRequest(f"{model.name} repaints no parts of pictures.", "Send no mask, or choose another model.")
    if image and takes.image is None and takes.inpaint is None:
        raise BadRequest(f"{model.name} makes nothing of pictures.", "Send none, or choose another model.")
