"""The page in a headless Chromium: what a person does with it, what they see, and whether everybody can use it."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.stack.http.test_openai import png
from tests.stack.http.test_restarts import pid_of
from tests.stacks import RunningStack, running_stack

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium")
if CHROMIUM:
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import Browser, Page, Request, expect, sync_playwright

PROMPT = "a large red circle"
PATIENCE = 60_000  # milliseconds


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    with running_stack(tmp_path_factory.mktemp("page"), "--http", "127.0.0.1:0") as stack:
        yield stack


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(demo: RunningStack, browser: "Browser") -> "Iterator[Page]":
    """The page, in which no script may fail, and which may ask no other host for anything."""
    faults: list[str] = []
    context = browser.new_context()
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    page.on("pageerror", lambda error: faults.append(str(error)))

    def note(request: Request) -> None:
        if not request.url.startswith((demo.http, "blob:", "data:")):
            faults.append(request.url)

    page.on("request", note)
    page.goto(demo.http)
    page.wait_for_selector("#model")
    yield page
    context.close()
    assert faults == []


def make(page: "Page", **fields: object) -> None:
    for name, value in fields.items():
        page.fill(f"[name={name}]", str(value))
    page.press("#prompt", "Control+Enter")


def test_a_picture_is_made_looked_at_and_made_again(page: "Page", demo: RunningStack) -> None:
    make(page, prompt=PROMPT, seed=7)
    page.wait_for_selector("#newest img")
    job = demo.client.jobs(limit=1)[0]
    assert (job.recipe.prompt, job.recipe.seed) == (PROMPT, 7)
    page.fill("#prompt", "")
    page.locator("#newest button").first.click()
    expect(page.locator("#recipe")).to_contain_text(PROMPT)
    page.click("#again")
    assert page.input_value("#prompt") == PROMPT
    assert page.input_value("[name=seed]") == "7"
    page.locator("#newest button").first.click()
    page.click("#vary")
    assert page.input_value("[name=seed]") == ""


def test_a_job_is_watched_cancelled_and_survives_a_reload(page: "Page", demo: RunningStack) -> None:
    make(page, prompt="a slow star", steps=1000)
    row = page.locator("#queue li", has_text="a slow star")
    expect(row).to_contain_text("of 1000", timeout=PATIENCE)
    page.reload()
    expect(row).to_contain_text("of 1000", timeout=PATIENCE)
    row.get_by_role("button").click()
    expect(row).to_have_count(0, timeout=PATIENCE)
    assert demo.client.jobs(limit=1)[0].state == "cancelled"


@pytest.mark.all
def test_the_orchestrator_may_be_started_anew_meanwhile(page: "Page", demo: RunningStack) -> None:
    os.kill(pid_of(demo, "orchestrator"), signal.SIGKILL)
    make(page, prompt="a blue ring after a restart")
    expect(page.locator("#newest img").first).to_have_attribute("alt", "a blue ring after a restart", timeout=PATIENCE)
    assert sum(job.recipe.prompt == "a blue ring after a restart" for job in demo.client.jobs()) == 1


@pytest.mark.all
def test_a_part_is_painted_anew(page: "Page", demo: RunningStack, tmp_path: Path) -> None:
    file = tmp_path / "in.png"
    file.write_bytes(png(Image.fromarray(np.full((128, 128, 3), (20, 120, 200), "uint8"))))
    page.set_input_files("#image-file", file)
    page.locator("#canvas").scroll_into_view_if_needed()
    box = page.locator("#canvas").bounding_box()
    assert box
    page.mouse.move(box["x"] + 20, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 60, box["y"] + 60)
    page.mouse.up()
    make(page, prompt="a red star in a picture", strength=0.9)
    expect(page.locator("#newest img").first).to_have_attribute("alt", "a red star in a picture", timeout=PATIENCE)
    job = demo.client.jobs(limit=1)[0]
    assert job.recipe.images
    assert job.recipe.mask


@pytest.mark.all
def test_a_recipe_is_read_and_a_lora_chosen(page: "Page", demo: RunningStack, tmp_path: Path) -> None:
    made = demo.client.wait(demo.client.submit("a green square", seed=11, steps=5, loras=["night@0.5"]).id)
    file = tmp_path / "made.png"
    from protocol.client.picture_files import metadata_of, save_picture

    save_picture(demo.client.pictures(made.id)[0], file, metadata_of(made.recipe, made.id, 0))
    page.set_input_files("#recipe-file", file)
    expect(page.locator("#prompt")).to_have_value("a green square")
    assert (page.input_value("[name=seed]"), page.input_value("[name=steps]")) == ("11", "5")
    expect(page.locator("#loras-chosen")).to_contain_text("night")


@pytest.mark.all
def test_what_cannot_be_right_is_said(page: "Page") -> None:
    page.fill("[name=width]", "4096")
    page.fill("[name=height]", "4096")
    make(page, prompt=PROMPT)
    expect(page.locator("#fault")).to_contain_text("too large")


def serious(page: "Page", view: str) -> list[tuple[str, str]]:
    """Return axe's serious faults of a view."""
    found = Axe().run(page).response["violations"]
    return [(view, fault["id"]) for fault in found if fault["impact"] in ("serious", "critical")]


@pytest.mark.parametrize(
    ("scheme", "width"),
    [
        ("light", 390),
        *(pytest.param(*place, marks=pytest.mark.all) for place in (("light", 1440), ("dark", 390), ("dark", 1440))),
    ],
)
def test_everybody_can_use_it(demo: RunningStack, browser: "Browser", scheme: str, width: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.goto(demo.http)
    page.wait_for_selector("#newest img")
    faults = []
    for view in ("gallery", "stack", "make"):
        page.click(f"nav a[data-view={view}]")
        page.wait_for_selector(f"#{view}:not([hidden])")
        page.wait_for_selector({"gallery": "#pictures img", "stack": "#workers td", "make": "#newest img"}[view])
        assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing is cut off at the side
        faults += serious(page, view)
    page.locator("#newest button").first.click()
    faults += [
        ("detail", f["id"]) for f in Axe().run(page).response["violations"] if f["impact"] in ("serious", "critical")
    ]
    context.close()
    assert faults == []
