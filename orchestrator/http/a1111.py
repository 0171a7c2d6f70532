"""The part of AUTOMATIC1111's API that Open WebUI, SillyTavern and others use: /sdapi/v1."""

import asyncio
import io
import json
import re
import secrets
import time
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from orchestrator.http.asking import (
    Caller,
    Wanted,
    Who,
    check_takes,
    file_of,
    loras_of,
    model_named,
    pixels_of,
    spread,
)
from orchestrator.http.faults import BadField
from orchestrator.http.results import text_of
from orchestrator.http.waiting import answer, done
from protocol.client.input_pictures import Inputs
from protocol.client.picture_files import parameters_text
from protocol.errors import BadRequest
from protocol.job import MAX_IMAGES_IN, UNFINISHED, Job, JobRequest
from protocol.lora import LORA_NAME
from protocol.views import ModelView

router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"])

PREFIX = "sd-"  # of the ids of jobs that come this way
MOST_PICTURES = 16
MOST_TEXT = 20_000  # characters of what a picture says of itself
LORA = re.compile(r"<lora:([^:<>]+)(?::([-+.\d]+))?(?::[^<>]*)?>")  # in a prompt
SAMPLER = "Default"  # the model's own scheduler
chosen: dict[str, str] = {}  # the models that callers have chosen with POST options, by their keys


class Loose(BaseModel):
    """A body of which other fields are let pass: clients send all that AUTOMATIC1111 has."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        """Take what is null as if it were left out, as AUTOMATIC1111 does."""
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


class TextToImage(Loose):
    prompt: Annotated[str, Field(max_length=100_000)] = ""
    negative_prompt: Annotated[str, Field(max_length=100_000)] | None = None
    width: Annotated[int, Field(ge=1, le=2**31)] | None = None
    height: Annotated[int, Field(ge=1, le=2**31)] | None = None
    steps: Annotated[int, Field(ge=1, le=10_000)] | None = None
    cfg_scale: float | None = None
    distilled_cfg_scale: float | None = None
    seed: Annotated[int, Field(ge=-1, le=2**63 - 1)] = -1
    batch_size: Annotated[int, Field(ge=1, le=MOST_PICTURES)] = 1
    n_iter: Annotated[int, Field(ge=1, le=MOST_PICTURES)] = 1
    sampler_name: str | None = None
    scheduler: str | None = None
    override_settings: dict[str, Any] = {}
    send_images: bool = True


class ImageToImage(TextToImage):
    init_images: Annotated[list[str], Field(max_length=MAX_IMAGES_IN)] = []
    mask: str | None = None
    mask_blur: Annotated[float, Field(ge=0, le=1000)] = 4
    inpainting_mask_invert: int = 0
    denoising_strength: Annotated[float, Field(ge=0, le=1)] | None = None


class Made(BaseModel):
    images: list[str]
    parameters: dict[str, Any]
    info: str


class Options(Loose):
    sd_model_checkpoint: str | None = None


class ProgressState(BaseModel):
    skipped: bool = False
    interrupted: bool = False
    job: str = ""
    job_count: int = 0
    job_timestamp: str = "0"
    job_no: int = 0
    sampling_step: int = 0
    sampling_steps: int = 0


class Progress(BaseModel):
    progress: float
    eta_relative: float
    state: ProgressState
    current_image: str | None = None
    textinfo: str | None = None


class PngInfo(Loose):
    image: str


# -- making pictures ----------------------------------------------------------------------------


@router.post("/txt2img", response_model=Made)
async def txt2img(request: Request, given: TextToImage, who: Who) -> Response:
    """Make pictures of a prompt."""
    return await make(request, who, given, Inputs(), None)


@router.post("/img2img", response_model=Made)
async def img2img(request: Request, given: ImageToImage, who: Who) -> Response:
    """Change pictures, or repaint where a mask is white."""
    if not given.init_images:
        raise BadField("init_images", "There is no picture to begin from.", "Send one as base64 in init_images.")
    images = [file_of(image, "init_images") for image in given.init_images]
    mask = file_of(given.mask, "mask") if given.mask else None
    if mask and given.inpainting_mask_invert:
        mask = await asyncio.to_thread(inverted, mask)
    inputs = await pixels_of(who.http, images, mask, given.mask_blur if mask else 0)
    return await make(request, who, given, inputs, given.denoising_strength)


def inverted(mask: bytes) -> bytes:
    from PIL import ImageOps

    from protocol.client.input_pictures import upright

    file = io.BytesIO()
    ImageOps.invert(upright(mask).convert("L")).save(file, "PNG")
    return file.getvalue()


async def make(request: Request, who: Caller, given: TextToImage, inputs: Inputs, strength: float | None) -> Response:
    told: list[str] = []
    models = await who.models()
    named = given.override_settings.get("sd_model_checkpoint") or chosen.get(who.key)
    model = model_named(models, named if isinstance(named, str) else None, told)
    if model.video:
        raise BadRequest(f"{model.name} makes videos, no pictures.", "POST /api/jobs makes them.")
    check_takes(model, bool(inputs.images), inputs.mask is not None)
    if given.sampler_name not in (None, SAMPLER) or given.scheduler not in (None, SAMPLER, "Automatic"):
        told.append("The model's own scheduler is used, whatever the sampler.")
    asked = Wanted(spread(job_of(given, model, inputs, strength), count_of(given), model), inputs.tensors, told)
    jobs = await asked.submit(who.client, watch=True)
    return await answer(request, whole(who, given, jobs, model, told))


def count_of(given: TextToImage) -> int:
    count = given.batch_size * given.n_iter
    if count > MOST_PICTURES:
        raise BadField("batch_size", f"{count} pictures are too many.", f"{MOST_PICTURES} may be asked for at once.")
    return count


def job_of(given: TextToImage, model: ModelView, inputs: Inputs, strength: float | None) -> JobRequest:
    """Return the job that is asked for, in the words of the model's own pipeline."""
    takes = model.description
    prompt, loras = without_loras(given.prompt)
    # Clients send a scale to every model, 7 if nobody has chosen one: it is for those that work with true guidance.
    scale = given.cfg_scale if takes.cfg_scale is not None and takes.cfg_scale > 1 else None
    if takes.cfg_scale is not None and given.distilled_cfg_scale is not None:  # whoever sends both knows the difference
        scale = given.cfg_scale
    negative = given.negative_prompt or None
    return JobRequest(
        prompt=prompt, model=model.name or None, width=given.width, height=given.height, steps=given.steps,
        negative_prompt=negative if takes.negative_prompt and (scale or takes.cfg_scale or 0) > 1 else None,
        cfg_scale=scale, guidance=given.distilled_cfg_scale if takes.guidance is not None else None,
        seed=given.seed if given.seed >= 0 else None, strength=strength, loras=loras_of(loras),
        id=f"{PREFIX}{secrets.token_hex(8)}", **inputs.fields,
    )  # fmt: skip


def without_loras(prompt: str) -> tuple[str, list[str]]:
    """Return a prompt without its <lora:NAME:WEIGHT>, and those as NAME@WEIGHT."""
    found = [f"{name.strip()}@{weight or 1}" for name, weight in LORA.findall(prompt)]
    return LORA.sub("", prompt).strip() if found else prompt, found


async def whole(who: Caller, given: TextToImage, jobs: list[Job], model: ModelView, told: list[str]) -> dict[str, Any]:
    await done(who.client, jobs)
    images: list[str] = []
    for job in jobs:
        files = await who.http.results.files(who.client, who.key, job, "png")
        images += map(text_of, files)
    places = [(job, index) for job in jobs for index in range(job.recipe.num_images)]
    recipe = jobs[0].recipe
    info = {
        "prompt": recipe.prompt, "all_prompts": [job.recipe.prompt for job, _ in places],
        "negative_prompt": recipe.negative_prompt or "", "seed": recipe.seed,
        "all_seeds": [job.recipe.seed for job, _ in places], "width": recipe.width, "height": recipe.height,
        "steps": recipe.steps, "cfg_scale": recipe.cfg_scale, "batch_size": len(places), "sampler_name": SAMPLER,
        "sd_model_name": model.name, "sd_model_hash": recipe.revision, "job_timestamp": timestamp(jobs[0]),
        "infotexts": [parameters_text(job.recipe, index) for job, index in places], "comments": told,
        "jobs": [job.id for job in jobs],
    }  # fmt: skip
    parameters = given.model_dump(exclude={"init_images", "mask", "override_settings"})
    return {"images": images if given.send_images else [], "parameters": parameters, "info": json.dumps(info)}


def timestamp(job: Job) -> str:
    return time.strftime("%Y%m%d%H%M%S", time.gmtime(job.created))


# -- what goes on -------------------------------------------------------------------------------


@router.get("/progress")
async def progress(who: Who, skip_current_image: bool = False) -> Progress:
    """Show how far the caller's pictures are that were asked for this way."""
    unfinished = [job for job in await who.client.jobs(UNFINISHED) if job.id.startswith(PREFIX)]
    if not unfinished:
        return Progress(progress=0.0, eta_relative=0.0, state=ProgressState())
    oldest = unfinished[-1]
    share = min(1.0, oldest.step / max(1, oldest.recipe.steps)) * 0.95
    spent = time.time() - oldest.created
    state = ProgressState(
        job=oldest.id, job_count=len(unfinished), job_timestamp=timestamp(oldest), sampling_step=oldest.step,
        sampling_steps=oldest.recipe.steps,
    )  # fmt: skip
    file = b"" if skip_current_image else (await who.client.preview(oldest.id)).file
    left = spent / share - spent if share else 0.0
    return Progress(progress=share, eta_relative=left, state=state, current_image=text_of(file) if file else None)


@router.post("/interrupt")
async def interrupt(who: Who) -> dict[str, Any]:
    """Cancel the caller's unfinished jobs that were asked for this way."""
    found = [job.id for job in await who.client.jobs(UNFINISHED, 1000) if job.id.startswith(PREFIX)]
    if found:
        await who.client.cancel(*found)
    return {}


@router.post("/skip")
async def skip(who: Who) -> dict[str, Any]:
    """Cancel, as interrupt does."""
    return await interrupt(who)


@router.post("/png-info")
async def png_info(given: PngInfo) -> dict[str, Any]:
    """Show the parameters that a picture file carries."""
    text = await asyncio.to_thread(parameters_in, file_of(given.image, "image"))
    return {"info": text, "items": {"parameters": text} if text else {}, "parameters": parsed(text)}


def parsed(text: str) -> dict[str, str]:
    """Return the settings of a parameters text, by their names."""
    pairs = (part.partition(": ") for part in text.rpartition("\n")[2].split(", "))
    return {name.strip(): value.strip() for name, colon, value in pairs if colon}


def parameters_in(file: bytes) -> str:
    """Return the parameters text that a picture carries, as far as one is read; BadField."""
    try:
        with Image.open(io.BytesIO(file), formats=("PNG", "JPEG", "WEBP")) as picture:
            return str(picture.info.get("parameters", ""))[:MOST_TEXT]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise BadField("image", "This can't be read as a picture.", "Send a PNG as base64.") from None


# -- what there is ------------------------------------------------------------------------------


@router.get("/options")
async def options(who: Who) -> dict[str, Any]:
    """Show the options that clients look at."""
    models = await who.models()
    model = model_named(models, chosen.get(who.key), [])
    return {
        "sd_model_checkpoint": model.name, "sd_checkpoint_hash": model.revision, "samples_format": "png",
        "sd_vae": "Automatic", "CLIP_stop_at_last_layers": 1,
    }  # fmt: skip


@router.post("/options")
async def set_options(given: Options, who: Who) -> None:
    """Choose the model of the caller's pictures to come; other options are let pass."""
    name = given.sd_model_checkpoint
    if name is None:
        return
    for model in await who.models(name):
        if name == model.name:
            chosen[who.key] = model.name
            return
    raise BadField("sd_model_checkpoint", f"There is no model {name[:100]!r}.", "GET /sdapi/v1/sd-models lists them.")


@router.get("/sd-models")
async def sd_models(who: Who) -> list[dict[str, Any]]:
    """List the stack's models."""
    return [
        {"title": m.name, "model_name": m.name, "hash": m.revision[:10], "sha256": None, "filename": m.name,
         "config": None} for m in await who.models()
    ]  # fmt: skip


@router.get("/loras")
async def loras(who: Who) -> list[dict[str, Any]]:
    """List the LoRAs that prompts can name as <lora:NAME:WEIGHT>."""
    return [
        {
            "name": lora.name,
            "alias": lora.name,
            "path": lora.name,
            "metadata": {"ss_tag_frequency": {}, "triggers": lora.triggers},
        }
        for lora in await who.client.loras()
        if LORA_NAME.fullmatch(lora.name)
    ]


FIXED: Mapping[str, Any] = {
    "samplers": [{"name": SAMPLER, "aliases": [], "options": {}}],
    "schedulers": [
        {"name": "automatic", "label": "Automatic", "aliases": None, "default_rho": -1.0, "need_inner_model": False}
    ],
    "upscalers": [{"name": "None", "model_name": None, "model_path": None, "model_url": None, "scale": 1.0}],
    "latent-upscale-modes": [],
    "sd-vae": [],
    "sd-modules": [],
    "hypernetworks": [],
    "face-restorers": [],
    "prompt-styles": [],
    "scripts": {"txt2img": [], "img2img": []},
    "script-info": [],
    "embeddings": {"loaded": {}, "skipped": {}},
    "cmd-flags": {},
}


def fixed(name: str, value: Any) -> None:
    """Add a route for a list that is always the same."""

    async def show(who: Who) -> Any:
        return value

    router.add_api_route(f"/{name}", show, summary=f"List {name.replace('-', ' ')}.", name=name)


for _name, _value in FIXED.items():
    fixed(_name, _value)
