"""OpenAI's Videos API against a real stack."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from orchestrator.http.videos import frames_for
from protocol.model import VideoTask
from tests import tiny_videos
from tests.stacks import RunningStack, running_stack
from tests.tiny import save


@pytest.mark.parametrize(("seconds", "frames"), [(None, None), (1.0, 17), (0.01, 1), (1.3, 21), (1e3, 33)])
def test_seconds_become_frames_that_a_model_can_make(seconds: float | None, frames: int | None) -> None:
    task = VideoTask(frames=9, multiple=4, fps=16.0, max_frames=33)
    assert frames_for(task, seconds, 16.0) == frames


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    model = save(tiny_videos.wan(), tmp_path_factory.mktemp("wan"))
    with (
        tempfile.TemporaryDirectory(prefix="tt-") as folder,
        running_stack(Path(folder), "--model", str(model), "--device", "cpu", "--http", "127.0.0.1:0") as stack,
    ):
        yield stack


@pytest.mark.all
def test_a_video_is_submitted_looked_at_and_fetched(wan: RunningStack) -> None:
    with httpx.Client(base_url=wan.http, timeout=60, trust_env=False) as web:
        made = web.post("/v1/videos", data={"prompt": "a wave", "size": "32x32", "steps": "2", "id": "wave"})
        assert made.status_code == 200, made.text
        assert (made.json()["id"], made.json()["object"]) == ("wave", "video")
        wan.client.wait("wave", 120)
        video = web.get("/v1/videos/wave").json()
        assert (video["status"], video["progress"], video["error"]) == ("completed", 100, None)
        file = web.get("/v1/videos/wave/content")
        assert (file.headers["content-type"], file.content[4:8]) == ("video/mp4", b"ftyp")
        assert [one["id"] for one in web.get("/v1/videos").json()["data"]] == ["wave"]
        long = web.post("/v1/videos", json={"prompt": "a wave", "size": "32x32", "steps": 500}).json()["id"]
        assert web.delete(f"/v1/videos/{long}").json()["deleted"] is True
        assert web.get(f"/v1/videos/{long}").json()["status"] == "failed"
        assert web.get("/v1/videos/nothing").status_code == 404
        refused = web.post("/v1/images/generations", json={"prompt": "a"})
        assert (refused.status_code, "/v1/videos" in refused.json()["error"]["message"]) == (400, True)


def test_a_model_of_pictures_makes_none(web: httpx.Client) -> None:
    refused = web.post("/v1/videos", json={"prompt": "a"})
    assert (refused.status_code, "makes pictures" in refused.json()["error"]["message"]) == (400, True)
