"""The HTTP process's parts that need no stack: errors by path, links, fields, and answers where no stack is."""

import asyncio
import io
import json
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from PIL import Image

from orchestrator.http.a1111 import parsed, without_loras
from orchestrator.http.app import create_app
from orchestrator.http.asking import check_pixels, file_of, id_of, loras_of, size_of, spread
from orchestrator.http.faults import BadField, Refused, body_of, headers_of, status_of
from orchestrator.http.impatient import Impatient
from orchestrator.http.openai import steps_for
from orchestrator.http.results import Links, Results
from orchestrator.pulse import Pulse
from orchestrator.settings import HttpSettings, HttpSpec, Quality
from protocol.client.input_pictures import video_of
from protocol.errors import BY_CODE, BadRequest, NoStack, QueueFull
from protocol.job import MAX_SEED, JobRequest
from tests.orchestrator.http.models import model_view


def test_every_error_has_a_status_and_a_form_by_path() -> None:
    for kind in BY_CODE.values():
        error = kind("It went wrong.", "Do this.")
        assert 400 <= status_of(error) < 600
        assert body_of(error, "/v1/x")["error"]["message"] == "It went wrong. Do this."
        assert body_of(error, "/sdapi/v1/x")["detail"] == "It went wrong. Do this."
        assert body_of(error, "/api/x")["error"]["hint"] == "Do this."
    assert (status_of(QueueFull("")), headers_of(QueueFull(""))) == (429, {"Retry-After": "5"})
    assert (status_of(NoStack("")), headers_of(NoStack(""))) == (503, {"Retry-After": "2"})


def test_a_link_lets_out_that_one_file_for_a_while(tmp_path: Path) -> None:
    links = Links.of(tmp_path / "keys")
    path = links.path("alice", "j", 0, "png")
    query = dict(httpx.QueryParams(path.partition("?")[2]))
    expires, signature = int(query["expires"]), query["signature"]
    Links.of(tmp_path / "keys").check("alice", "j", 0, "png", expires, signature)  # also after a restart
    for key, job, index, suffix, until in (
        ("bob", "j", 0, "png", expires), ("alice", "i", 0, "png", expires), ("alice", "j", 1, "png", expires),
        ("alice", "j", 0, "webp", expires), ("alice", "j", 0, "png", expires + 1),
    ):  # fmt: skip
        with pytest.raises(Refused, match="not made here"):
            links.check(key, job, index, suffix, until, signature)
    with pytest.raises(Refused, match="not made here"):
        links.check("alice", "j", 0, "png", expires, "é")
    old = dict(httpx.QueryParams(links.path("alice", "j", 0, "png", now=0.0).partition("?")[2]))
    with pytest.raises(Refused, match="too old"):
        links.check("alice", "j", 0, "png", int(old["expires"]), old["signature"])


@pytest.mark.parametrize(("text", "size"), [("auto", (None, None)), ("64x32", (64, 32))])
def test_sizes(text: str, size: tuple[int | None, int | None]) -> None:
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "64", "64x", "x64", "-1x2", "1e3x10", "64 x 64", "123456x1"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(BadField):
        size_of(text)


def test_files_of_fields() -> None:
    assert file_of("aGk=", "image") == file_of("data:image/png;base64,aGk=", "image") == b"hi"
    for text in ("http://example.com/a.png", "aGk", "data:image/png;base64,!!"):
        with pytest.raises(BadField):
            file_of(text, "image")


def test_loras_are_names_and_never_paths() -> None:
    assert [(lora.name, lora.weight) for lora in loras_of(["ink@0.5", "night"])] == [("ink", 0.5), ("night", 1.0)]
    for text in ("../ink", "/etc/passwd", "ink@much", "ink@inf", ""):
        with pytest.raises(BadRequest):
            loras_of([text])
    assert without_loras("a <lora:ink:0.5> cat <lora:night>") == ("a  cat", ["ink@0.5", "night@1"])
    assert without_loras("a < b") == ("a < b", [])


def test_several_pictures_are_one_job_or_several() -> None:
    request = JobRequest(prompt="a", seed=5, id="j")
    (one,) = spread(request, 3, model_view(several=True))
    assert one.num_images == 3
    many = spread(request, 3, model_view(several=False))
    assert [(job.id, job.seed, job.num_images) for job in many] == [("j-0", 5, 1), ("j-1", 6, 1), ("j-2", 7, 1)]


def test_ids_come_from_what_names_a_request() -> None:
    assert id_of("mine", "key") == "mine"
    assert id_of(None, "key") == id_of(None, "key") != id_of(None, "other")
    assert id_of(None, None) != id_of(None, None)


def test_quality_is_a_part_of_the_models_own_steps() -> None:
    assert steps_for(model_view(steps=28), Quality(steps=0.5)) == 14
    assert steps_for(model_view(steps=28), None) is None
    assert steps_for(model_view(steps=4), Quality(steps=0.5)) is None  # it has none to spare
    assert steps_for(model_view(steps=4), Quality(steps=2)) == 8


def asked(tmp_path: Path, method: str, path: str, **options: Any) -> httpx.Response:
    """The answer of an application behind which there is no stack."""
    (tmp_path / "keys").mkdir(mode=0o700, exist_ok=True)
    spec = HttpSpec(
        state=tmp_path, endpoint=f"ipc://{tmp_path}/nothing", socket=0, settings=HttpSettings(http="127.0.0.1:1")
    )

    async def once() -> httpx.Response:
        app = create_app(spec, Pulse(None))
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await client.request(method, path, **options)

    return asyncio.run(once())


@pytest.mark.parametrize("path", ["/v1/images/generations", "/sdapi/v1/txt2img", "/api/jobs"])
def test_without_a_stack_it_says_when_to_ask_again(tmp_path: Path, path: str) -> None:
    answer = asked(tmp_path, "POST", path, json={"prompt": "a"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    assert "No stack" in answer.text


def test_it_lives_without_a_stack_and_is_not_ready(tmp_path: Path) -> None:
    assert asked(tmp_path, "GET", "/healthz").status_code == 200
    ready = asked(tmp_path, "GET", "/readyz")
    assert (ready.status_code, "No stack" in ready.json()["reasons"][0]) == (503, True)


def test_a_connection_that_asks_nothing_is_closed_and_one_that_asks_is_not() -> None:
    class Short(Impatient):
        seconds = 0.2

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async def both() -> tuple[bytes, bytes]:
        server = uvicorn.Server(uvicorn.Config(app, http=Short, lifespan="off", log_config=None))
        listening = socket.create_server(("127.0.0.1", 0))
        serving = asyncio.create_task(server.serve([listening]))
        address = listening.getsockname()[:2]
        silent, unused = await asyncio.open_connection(*address)
        asking, out = await asyncio.open_connection(*address)
        request = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
        out.write(request)
        first = await asking.readuntil(b"\r\n\r\n")
        ended = await silent.read()  # comes back once the connection is closed
        out.write(request)
        again = await asking.readuntil(b"\r\n\r\n")
        assert first.split()[1] == again.split()[1] == b"204"
        for writer in (out, unused):
            writer.close()
            await writer.wait_closed()
        server.should_exit = True
        await serving
        return ended, again

    assert asyncio.run(both())[0] == b""


def test_the_description_names_errors_as_they_are_told(tmp_path: Path) -> None:
    found = asked(tmp_path, "GET", "/openapi.json").json()
    assert "422" not in json.dumps(found["paths"])
    assert found["paths"]["/v1/images/generations"]["post"]["responses"]["429"]
    assert found["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"].keys() == {
        "multipart/form-data", "application/json"
    }  # fmt: skip
    assert asked(tmp_path, "GET", "/docs").status_code == 404  # it would load from another host


def test_what_pictures_say_is_read_in_time_that_grows_with_its_length() -> None:
    assert parsed("a\nSteps: 4, Seed: 7, Size: 32x32") == {"Steps": "4", "Seed": "7", "Size": "32x32"}
    assert parsed("a" * 1_000_000) == {}


def test_pictures_are_counted_before_they_are_decoded() -> None:
    file = io.BytesIO()
    Image.new("L", (8192, 8192)).save(file, "PNG")
    check_pixels([file.getvalue()] * 2)
    with pytest.raises(BadRequest, match="pixels together"):
        check_pixels([file.getvalue()] * 3)


@pytest.mark.parametrize(
    "file", [b"ffconcat version 1.0\nfile 'a.mp4'\n", b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\n", b"#EXTM3U\n"]
)
def test_videos_that_would_open_other_files_are_not_tried(file: bytes) -> None:
    with pytest.raises(BadRequest, match="can't be read"):
        video_of(file)


def test_seeds_of_several_jobs_stay_within_what_a_seed_may_be() -> None:
    jobs = spread(JobRequest(prompt="a", seed=MAX_SEED), 2, model_view(several=False))
    assert [job.seed for job in jobs] == [MAX_SEED, 0]


def test_files_are_forgotten_before_they_are_too_many() -> None:
    results = Results()
    for number in range(5):
        results._keep((str(number),), bytes(20 << 20))
    assert len(results._kept) == 3
