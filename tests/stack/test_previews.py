"""Previews through a whole stack: learned of jobs that somebody looks at, shown from then on, with the same bits."""

import io
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from protocol.client.client import Client
from tests.stacks import RunningStack, running_stack, triptych
from tests.tiny import plain

JOB = {"width": 32, "height": 32, "steps": 60}
PATIENCE = 90.0  # seconds


def looked_at(client: Client, seed: int) -> tuple[str, dict[int, bytes]]:
    """Submit a job and look at it to its end: its previews by step."""
    job, found = client.submit("a red circle", seed=seed, **JOB), {}
    deadline = time.monotonic() + PATIENCE
    while client.job(job.id).finished is None and time.monotonic() < deadline:
        preview = client.preview(job.id)
        if preview.file:
            found[preview.step] = preview.file
        time.sleep(0.02)
    return job.id, found


def is_gray(file: bytes) -> bool:
    pixels = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"), dtype=int)
    return bool((pixels.max(axis=2) - pixels.min(axis=2) <= 2).all())


@pytest.fixture(scope="module")
def shown(flux_dev: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    with running_stack(
        tmp_path_factory.mktemp("p"), "--model", str(flux_dev), "--device", "cpu", "--http", "127.0.0.1:0"
    ) as stack:
        _, first = looked_at(stack.client, 1)  # colors are learned of it
        assert first
        assert all(is_gray(file) for file in first.values())
        yield stack


def test_jobs_that_somebody_looks_at_are_drawn_with_the_same_bits(shown: RunningStack, flux_dev: Path) -> None:
    job, found = looked_at(shown.client, 2)
    assert found
    assert all(0 < step <= 60 for step in found)
    assert Image.open(io.BytesIO(next(iter(found.values())))).format == "JPEG"
    assert not all(map(is_gray, found.values()))
    wanted = plain(flux_dev, prompt="a red circle", seed=2, width=32, height=32, num_inference_steps=60)
    assert torch.equal(shown.pictures(job), wanted)
    assert shown.client.preview(job).file == b""  # it has a picture now


@pytest.mark.all
def test_openais_partial_images(shown: RunningStack) -> None:
    with httpx.Client(trust_env=False) as http:
        sdk = openai.OpenAI(base_url=f"{shown.http}/v1", api_key="any", max_retries=0, http_client=http)
        events = list(
            sdk.images.generate(
                prompt="a red circle", size="32x32", stream=True, partial_images=2, extra_body={"steps": 120, "seed": 5}
            )
        )
    kinds = [event.type for event in events]
    assert kinds[-1] == "image_generation.completed"
    assert 1 <= kinds.count("image_generation.partial_image") <= 2
    assert [event.partial_image_index for event in events[:-1]] == list(range(len(events) - 1))


@pytest.mark.all
def test_the_command_line_writes_them(shown: RunningStack, tmp_path: Path) -> None:
    arguments = ("--steps", "120", "--width", "32", "--height", "32", "--preview-dir", str(tmp_path / "p"), "--preview")
    done = triptych("submit", "a red circle", *arguments, "-o", str(tmp_path / "a.png"), folder=shown.folder)
    assert done.returncode == 0, done.stderr
    assert [path.suffix for path in (tmp_path / "p").iterdir()][:1] == [".jpg"]
