"""Triptych's own API against a real stack: jobs, their events and results, and the stack itself."""

import base64
import io
import json
from typing import Any

import httpx
import pytest
import torch
from PIL import Image

from tests.pictures import noise
from tests.stack.http.test_openai import pixels, png
from tests.stacks import RunningStack

JOB = {"prompt": "a red circle", "width": 32, "height": 32, "steps": 4, "seed": 1}


def finished(web: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    job = web.post("/api/jobs", json=body)
    assert job.status_code == 201, job.text
    told(web, job.json()["id"])
    found = web.get(f"/api/jobs/{job.json()['id']}").json()
    assert found["state"] == "done"
    return dict(found)


def told(web: httpx.Client, job: str, **headers: str) -> list[dict[str, Any]]:
    """The events of a job, to its end; each with its `id`."""
    found = []
    with web.stream("GET", f"/api/jobs/{job}/events", headers=headers) as events:
        for block in "".join(events.iter_text()).split("\n\n"):
            lines = dict(line.split(": ", 1) for line in block.splitlines() if line and not line.startswith(":"))
            if lines:
                found.append({"id": lines["id"], **json.loads(lines["data"])})
    return found


def test_a_job_is_submitted_followed_and_fetched(web: httpx.Client, served: RunningStack) -> None:
    job = finished(web, {**JOB, "num_images": 2})
    assert job["recipe"]["num_images"] == job["pictures"] == 2
    for index in (0, 1):
        file = web.get(f"/api/jobs/{job['id']}/results/{index}.png")
        assert file.headers["content-type"] == "image/png"
        own = served.pictures(job["id"])[index : index + 1]
        assert torch.equal(pixels(base64.b64encode(file.content).decode()), own)
    webp = web.get(f"/api/jobs/{job['id']}/results/0.webp")
    assert Image.open(io.BytesIO(webp.content)).format == "WEBP"
    assert web.get(f"/api/jobs/{job['id']}/results/2.png").status_code == 404
    assert web.get(f"/api/jobs/{job['id']}/results/0.mp4").status_code == 400
    assert job["id"] in [found["id"] for found in web.get("/api/jobs", params={"state": "done"}).json()]


def test_results_come_in_ranges_and_once(web: httpx.Client) -> None:
    job = finished(web, JOB)
    address = f"/api/jobs/{job['id']}/results/0.png"
    whole = web.get(address)
    for wanted, start, end in (("0-9", 0, 10), ("10-", 10, None), ("-7", -7, None), ("5-100000000", 5, None)):
        part = web.get(address, headers={"Range": f"bytes={wanted}"})
        assert (part.status_code, part.content) == (206, whole.content[start:end])
    assert web.get(address, headers={"Range": f"bytes={len(whole.content)}-"}).status_code == 416
    for odd in (f"bytes={'9' * 5000}-", "bytes=5-2", "bytes=-", "lines=1-2"):
        assert web.get(address, headers={"Range": odd}).status_code == 200
    assert web.head(address).status_code == 200
    assert web.get(address, headers={"If-None-Match": whole.headers["etag"]}).status_code == 304


def test_events_go_on_where_they_were_heard(web: httpx.Client) -> None:
    job = finished(web, JOB)
    events = told(web, job["id"])
    assert [event["id"] for event in events] == ["done"]
    assert web.get(f"/api/jobs/{job['id']}/events", headers={"Last-Event-ID": "done"}).status_code == 204
    assert told(web, job["id"], **{"Last-Event-ID": "denoise-2-0-1"})[-1]["state"] == "done"


def test_the_same_id_is_the_same_job(web: httpx.Client) -> None:
    first, again = (web.post("/api/jobs", json={**JOB, "id": "mine"}) for _ in range(2))
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json()["number"] == again.json()["number"]
    assert web.post("/api/jobs", json={**JOB, "id": "mine", "seed": 2}).status_code == 409


def test_another_job_of_the_same_id_has_pictures_of_its_own(web: httpx.Client, served: RunningStack) -> None:
    first = finished(web, {**JOB, "id": "again"})
    before = web.get("/api/jobs/again/results/0.png")
    served.client.collect_garbage(0)
    assert web.get("/api/jobs/again/results/0.png").status_code == 404
    second = finished(web, {**JOB, "id": "again", "seed": 99})
    after = web.get("/api/jobs/again/results/0.png")
    assert first["number"] != second["number"]
    assert after.content != before.content
    assert after.headers["etag"] != before.headers["etag"]


def test_fields_that_only_a_request_as_a_whole_refuses_are_told(web: httpx.Client) -> None:
    many = {f"a{number}": 1 for number in range(65)}
    for odd in ({"settings": many}, {"controlnet": "c" * 300}, {"seed": 2**63}, {"video": "aGk="}):
        refused = web.post("/api/jobs", json={**JOB, **odd})
        assert (refused.status_code, bool(refused.json()["error"]["message"])) == (400, True), odd


def test_a_job_is_cancelled_and_run_again(web: httpx.Client) -> None:
    job = web.post("/api/jobs", json={**JOB, "steps": 300}).json()["id"]
    assert web.get("/api/queue").json()[-1]["id"] == job
    assert web.post(f"/api/jobs/{job}/cancel").json()["state"] == "cancelled"
    assert told(web, job)[-1]["state"] == "cancelled"
    assert web.post(f"/api/jobs/{job}/retry").json()["state"] == "queued"
    assert web.post(f"/api/jobs/{job}/retry").status_code == 409
    web.post(f"/api/jobs/{job}/cancel")


def test_pictures_to_begin_from_and_recipes(web: httpx.Client, served: RunningStack) -> None:
    image = noise()
    text = base64.b64encode(png(image)).decode()
    body = {**JOB, "images": [text], "strength": 0.5}
    job = finished(web, body)
    options = {name: value for name, value in JOB.items() if name != "prompt"}
    assert torch.equal(
        served.pictures(job["id"]), served.picture("a red circle", images=image, strength=0.5, **options)[1]
    )
    file = web.get(f"/api/jobs/{job['id']}/results/0.png").content
    made = web.post("/api/recipe", json={"image": base64.b64encode(file).decode()}).json()
    assert made["recipe"]["seed"] == 1
    assert web.post("/api/recipe", json={"image": text}).status_code == 400


def test_the_stack_is_shown(web: httpx.Client) -> None:
    stack = web.get("/api/stack").json()
    assert stack["model"]["pipeline"] == "FluxPipeline"
    workers = web.get("/api/workers").json()
    assert {worker["stage"] for worker in workers["workers"]} == {"text", "denoise", "vae"}
    assert "http" in [process["name"] for process in workers["processes"]]
    assert web.get("/api/gpus").json() == []
    (model,) = web.get("/api/models").json()
    assert model["description"]["steps"]
    assert web.get("/api/loras").json() == []
    assert web.get("/healthz").json()["status"] == "ok"
    assert web.get("/readyz").json()["status"] == "ready"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("jobs/nothing", 404),
        ("jobs/..%2f", 404),
        ("jobs?limit=0", 400),
        ("jobs?state=odd", 400),
        ("loras?model=odd", 404),
    ],
)
def test_what_is_not_there(web: httpx.Client, path: str, status: int) -> None:
    answer = web.get(f"/api/{path}")
    assert answer.status_code == status
    assert answer.json()["error"]["message"]
