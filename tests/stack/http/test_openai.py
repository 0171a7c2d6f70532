"""OpenAI's Images API against a real stack: its own SDK, and requests as Open WebUI and LibreChat make them."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from tests.pictures import noise, plain_of_picture
from tests.stacks import RunningStack
from tests.tiny import plain

SMALL = {"steps": 2}  # of our own fields
PROMPT = "a red circle"


@pytest.fixture
def sdk(served: RunningStack) -> Iterator[openai.OpenAI]:
    with httpx.Client(trust_env=False) as http:
        yield openai.OpenAI(base_url=f"{served.http}/v1", api_key="anything", max_retries=0, http_client=http)


def pixels(text: str | None) -> torch.Tensor:
    """Pictures of a base64 file, uint8 (1, height, width, 3)."""
    assert text
    return torch.from_numpy(np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")).copy())[None]


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_a_generation_has_the_bits_of_the_plain_pipeline(sdk: openai.OpenAI, flux_dev: Path) -> None:
    made = sdk.images.generate(prompt=PROMPT, size="32x32", extra_body={"seed": 3, **SMALL})
    wanted = plain(flux_dev, prompt=PROMPT, seed=3, width=32, height=32, num_inference_steps=2)
    assert made.data
    assert torch.equal(pixels(made.data[0].b64_json), wanted)
    assert (made.size, made.output_format, made.background) == ("32x32", "png", "opaque")
    assert made.usage
    assert made.usage.total_tokens == made.usage.input_tokens + made.usage.output_tokens
    assert [model.id for model in sdk.models.list()] == [made.model_extra["model"]]  # type: ignore[index]


def test_several_pictures_formats_and_links(sdk: openai.OpenAI, web: httpx.Client) -> None:
    made = sdk.images.generate(prompt=PROMPT, n=2, size="32x32", response_format="url", extra_body={"seed": 3, **SMALL})
    links = [picture.url for picture in made.data or []]
    assert len(links) == 2
    for link in links:
        assert link
        found = httpx.get(link, trust_env=False)
        assert (found.status_code, found.headers["content-type"]) == (200, "image/png")
        forged = httpx.get(link.replace("/0.png", "/1.png").replace("signature=", "signature=0"), trust_env=False)
        assert forged.status_code == 403
    jpeg = sdk.images.generate(
        prompt=PROMPT, size="32x32", output_format="jpeg", output_compression=30, extra_body={"seed": 3, **SMALL}
    )
    assert jpeg.data
    assert Image.open(io.BytesIO(base64.b64decode(jpeg.data[0].b64_json or ""))).format == "JPEG"


def test_an_edit_has_the_bits_of_the_plain_pipeline(sdk: openai.OpenAI, flux_dev: Path) -> None:
    image = noise()
    made = sdk.images.edit(
        image=("in.png", png(image)), prompt=PROMPT, size="32x32", extra_body={"seed": 4, "steps": 6, "strength": 0.5}
    )
    wanted = plain_of_picture(
        flux_dev, image, prompt=PROMPT, strength=0.5, seed=4, width=32, height=32, num_inference_steps=6
    )
    assert made.data
    assert torch.equal(pixels(made.data[0].b64_json), wanted)


def test_a_mask_is_what_is_clear_in_it(sdk: openai.OpenAI, served: RunningStack) -> None:
    image = noise()
    mask = image.convert("RGBA")
    clear = Image.new("L", image.size, 255)
    clear.paste(0, (0, 0, image.width // 2, image.height))
    mask.putalpha(clear)
    options = {"seed": 4, "steps": 4, "strength": 0.9}
    made = sdk.images.edit(
        image=("in.png", png(image)), mask=("mask.png", png(mask)), prompt=PROMPT, size="32x32", extra_body=options
    )
    white = Image.eval(clear, lambda value: 255 - value)
    _, wanted = served.picture(PROMPT, images=image, mask=white, width=32, height=32, **options)
    assert made.data
    assert torch.equal(pixels(made.data[0].b64_json), wanted)


def test_a_stream_ends_with_the_whole_picture(sdk: openai.OpenAI) -> None:
    whole = sdk.images.generate(prompt=PROMPT, size="32x32", extra_body={"seed": 3, **SMALL})
    events = list(
        sdk.images.generate(prompt=PROMPT, size="32x32", stream=True, partial_images=0, extra_body={"seed": 3, **SMALL})
    )
    assert events[-1].type == "image_generation.completed"
    assert whole.data
    assert torch.equal(pixels(events[-1].b64_json), pixels(whole.data[0].b64_json))
    assert events[-1].usage.total_tokens == whole.usage.total_tokens


def test_unknown_models_go_to_the_default_one_and_that_is_said(web: httpx.Client) -> None:
    body = {  # as LibreChat sends it, but for the steps
        "model": "gpt-image-1", "prompt": PROMPT, "size": "auto", "quality": "auto", "background": "auto",
        "output_format": "png", "output_compression": 100, "n": 1, "steps": 1,
    }  # fmt: skip
    made = web.post("/v1/images/generations", json=body)
    assert made.status_code == 200, made.text
    assert "gpt-image-1" in made.json()["warnings"][0]
    assert made.headers["x-triptych-model"] == made.json()["model"] == web.get("/v1/models").json()["data"][0]["id"]
    body = {  # as Open WebUI does
        "model": "dall-e-3", "prompt": PROMPT, "n": 1, "size": "32x32", "response_format": "b64_json", "steps": 1,
    }  # fmt: skip
    assert pixels(web.post("/v1/images/generations", json=body).json()["data"][0]["b64_json"]).shape == (1, 32, 32, 3)


def test_edits_as_open_webui_and_librechat_send_them(web: httpx.Client) -> None:
    file = png(noise())
    fields = {"model": "gpt-image-1", "prompt": PROMPT, "n": "1", "size": "32x32", "steps": "2", "seed": "4"}
    one = web.post("/v1/images/edits", data=fields, files={"image": ("a.png", file, "image/png")})
    many = web.post("/v1/images/edits", data=fields, files=[("image[]", ("a.png", file, "image/png"))])
    address = f"data:image/png;base64,{base64.b64encode(file).decode()}"
    numbers = {"n": 1, "steps": 2, "seed": 4}
    as_json = web.post("/v1/images/edits", json={**fields, **numbers, "image": [address]})
    pictures = [answer.json()["data"][0]["b64_json"] for answer in (one, many, as_json)]
    assert torch.equal(pixels(pictures[0]), pixels(pictures[1]))
    assert torch.equal(pixels(pictures[0]), pixels(pictures[2]))


def test_the_same_id_or_idempotency_key_is_the_same_job(web: httpx.Client) -> None:
    body = {"prompt": PROMPT, "size": "32x32", **SMALL}
    headers = {"Idempotency-Key": "once"}
    jobs = [web.post("/v1/images/generations", json=body, headers=headers).json()["jobs"] for _ in range(2)]
    assert jobs[0] == jobs[1]
    other = web.post("/v1/images/generations", json={**body, "prompt": "another"}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "conflict")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": PROMPT, "size": "33x"}, "size"),
        ({"prompt": PROMPT, "n": 11}, "n"),
        ({"prompt": PROMPT, "quality": "best"}, "quality"),
        ({"prompt": PROMPT, "background": "transparent"}, "background"),
        ({"prompt": PROMPT, "output_format": "tiff"}, "output_format"),
        ({"prompt": PROMPT, "loras": ["../etc@1"]}, "loras"),
        ({"size": "32x32"}, "prompt"),
        ({"prompt": PROMPT, "size": "30x30"}, None),
        ({"prompt": PROMPT, "loras": ["a"] * 40}, "loras"),
        ({"prompt": PROMPT, "controlnet": "c" * 300}, "controlnet"),
    ],
)
def test_what_cannot_be_right_is_refused_in_openais_form(web: httpx.Client, body: dict, field: str | None) -> None:
    before = web.get("/api/jobs", params={"limit": 1}).json()
    refused = web.post("/v1/images/generations", json=body)
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", field)
    assert web.get("/api/jobs", params={"limit": 1}).json() == before  # nothing was queued


def test_bodies_that_are_no_requests(web: httpx.Client) -> None:
    kind = {"content-type": "application/json"}
    broken = web.post("/v1/images/generations", content=b"{nothing", headers=kind)
    assert (broken.status_code, "JSON" in broken.json()["error"]["message"]) == (400, True)
    assert web.post("/v1/images/edits", data={"prompt": PROMPT}).json()["error"]["param"] == "image"
    no_picture = web.post("/v1/images/edits", data={"prompt": PROMPT}, files={"image": ("a.png", b"no", "image/png")})
    assert (no_picture.status_code, "read" in no_picture.json()["error"]["message"]) == (400, True)
    assert web.get("/v1/images/nothing").status_code == 404
    assert web.get("/v1/images/generations").status_code == 405
    assert json.loads(web.get("/v1/models/nothing").text)["error"]["code"] == "not_found"
