"""AUTOMATIC1111's API against a real stack: what Open WebUI and SillyTavern send, in their order."""

import base64
import json
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from tests.pictures import noise, plain_of_picture
from tests.stack.http.test_openai import pixels, png
from tests.stacks import RunningStack
from tests.tiny import plain

PROMPT = "a red circle"
JSON = {"content-type": "application/json"}


def text(image: Image.Image) -> str:
    return base64.b64encode(png(image)).decode()


def test_open_webuis_requests_make_the_plain_pipelines_picture(web: httpx.Client, flux_dev: Path) -> None:
    name = web.get("/sdapi/v1/options", auth=("user", "any")).json()["sd_model_checkpoint"]
    titles = [model["title"] for model in web.get("/sdapi/v1/sd-models").json()]
    assert titles == [name]
    assert web.post("/sdapi/v1/options", json={"sd_model_checkpoint": titles[0]}).status_code == 200
    body = {"prompt": PROMPT, "batch_size": 1, "width": 32, "height": 32, "steps": 2, "negative_prompt": "", "seed": 5}
    made = web.post("/sdapi/v1/txt2img", json=body).json()
    wanted = plain(flux_dev, prompt=PROMPT, seed=5, width=32, height=32, num_inference_steps=2)
    assert torch.equal(pixels(made["images"][0]), wanted)
    assert json.loads(made["info"])["all_seeds"] == [5]


def test_sillytaverns_requests(web: httpx.Client) -> None:
    for path in (
        "options",
        "sd-models",
        "samplers",
        "schedulers",
        "upscalers",
        "latent-upscale-modes",
        "sd-vae",
        "loras",
    ):
        assert web.get(f"/sdapi/v1/{path}").status_code == 200, path
    assert web.get("/sdapi/v1/samplers").json()[0]["name"]
    nothing = {"override_settings": None, "n_iter": None, "seed": None, "prompt": PROMPT, "steps": 1}
    assert web.post("/sdapi/v1/txt2img", json={**nothing, "width": 32, "height": 32}).status_code == 200
    for odd in ('{"prompt": "a", "cfg_scale": NaN}', '{"prompt": "a", "denoising_strength": 1e999}'):
        assert web.post("/sdapi/v1/txt2img", content=odd, headers=JSON).status_code in (200, 400)
    body = {
        "sampler_name": "Euler a", "scheduler": "Automatic", "steps": 2, "cfg_scale": 7, "width": 32, "height": 32,
        "restore_faces": False, "enable_hr": False, "hr_upscaler": "Latent", "hr_scale": 2, "hr_additional_modules": [],
        "denoising_strength": 0.7, "hr_second_pass_steps": 0, "seed": -1,
        "override_settings": {"CLIP_stop_at_last_layers": 1}, "override_settings_restore_afterwards": True,
        "clip_skip": 1, "save_images": True, "send_images": True, "do_not_save_grid": False,
        "do_not_save_samples": False, "prompt": PROMPT, "negative_prompt": "blurry", "n_iter": 2,
    }  # fmt: skip
    made = web.post("/sdapi/v1/txt2img", json=body).json()
    assert len(made["images"]) == 2
    info = json.loads(made["info"])
    assert info["cfg_scale"] == 1.0  # this model was distilled: 7 would take twice as long, for another picture
    assert "scheduler" in info["comments"][0]
    assert web.get("/sdapi/v1/progress").json()["state"]["job_count"] == 0


def test_pictures_are_changed_and_parts_repainted(web: httpx.Client, flux_dev: Path, served: RunningStack) -> None:
    image = noise()
    body = {
        "init_images": [text(image)], "prompt": PROMPT, "denoising_strength": 0.5, "seed": 4, "steps": 6, "width": 32,
        "height": 32,
    }  # fmt: skip
    changed = web.post("/sdapi/v1/img2img", json=body).json()
    wanted = plain_of_picture(
        flux_dev, image, prompt=PROMPT, strength=0.5, seed=4, width=32, height=32, num_inference_steps=6
    )
    assert torch.equal(pixels(changed["images"][0]), wanted)
    mask = Image.fromarray(np.pad(np.full((32, 16), 255, "uint8"), ((0, 0), (0, 16))))
    painted = web.post("/sdapi/v1/img2img", json={**body, "mask": text(mask), "mask_blur": 0}).json()
    options = {"strength": 0.5, "seed": 4, "steps": 6, "width": 32, "height": 32}
    assert torch.equal(pixels(painted["images"][0]), served.picture(PROMPT, images=image, mask=mask, **options)[1])
    turned = Image.eval(mask, lambda value: 255 - value)
    inverted = {**body, "mask": text(turned), "mask_blur": 0, "inpainting_mask_invert": 1}
    again = web.post("/sdapi/v1/img2img", json=inverted).json()
    assert torch.equal(pixels(again["images"][0]), pixels(painted["images"][0]))


def test_png_info_reads_what_a_picture_says(web: httpx.Client) -> None:
    made = web.post(
        "/sdapi/v1/txt2img", json={"prompt": PROMPT, "steps": 1, "width": 32, "height": 32, "seed": 9}
    ).json()
    told = web.post("/sdapi/v1/png-info", json={"image": f"data:image/png;base64,{made['images'][0]}"}).json()
    assert told["info"].startswith(PROMPT)
    assert told["parameters"]["Seed"] == "9"
    assert web.post("/sdapi/v1/png-info", json={"image": text(noise())}).json()["info"] == ""


def test_interrupt_cancels_what_came_this_way_alone(web: httpx.Client, served: RunningStack) -> None:
    other = served.client.submit(PROMPT, seed=1, width=32, height=32, steps=300)
    with (
        httpx.Client(base_url=served.http, timeout=0.5, trust_env=False) as impatient,
        pytest.raises(httpx.ReadTimeout),
    ):
        impatient.post("/sdapi/v1/txt2img", json={"prompt": PROMPT, "steps": 300, "width": 32, "height": 32})
    state = web.get("/sdapi/v1/progress").json()["state"]
    assert state["job_count"] == 1  # a client that goes away has cancelled nothing
    assert web.post("/sdapi/v1/interrupt").status_code == 200
    assert served.client.job(state["job"]).state == "cancelled"
    assert served.client.job(other.id).state not in ("cancelled", "failed")
    served.client.cancel(other.id)


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("txt2img", {"prompt": PROMPT, "width": 31, "height": 32}, "31"),
        ("txt2img", {"prompt": PROMPT, "steps": 0}, "steps"),
        ("txt2img", {"prompt": f"{PROMPT} <lora:nothing:0.5>", "width": 32, "height": 32}, "nothing"),
        ("txt2img", {"prompt": PROMPT, "batch_size": 16, "n_iter": 16}, "pictures"),
        ("img2img", {"prompt": PROMPT}, "init_images"),
        ("img2img", {"prompt": PROMPT, "init_images": ["no"]}, "base64"),
        ("options", {"sd_model_checkpoint": "nothing"}, "nothing"),
        ("txt2img", {"prompt": PROMPT + " <lora:a:0.1>" * 40}, "loras"),
        ("img2img", {"prompt": PROMPT, "init_images": ["aGk="] * 17}, "init_images"),
    ],
)
def test_what_cannot_be_right_is_refused_in_their_form(web: httpx.Client, path: str, body: dict, words: str) -> None:
    refused = web.post(f"/sdapi/v1/{path}", json=body)
    assert refused.status_code in (400, 404), refused.text
    assert words in refused.json()["detail"]
