import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests import tiny
from tests.chance import examples
from tests.stacks import RunningStack, running_stack

settings.register_profile("suite", examples(100))
settings.load_profile("suite")


@pytest.fixture(scope="session")
def flux_dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Flux with distilled guidance, as FLUX.1-dev."""
    return tiny.save(tiny.flux(guidance_embeds=True), tmp_path_factory.mktemp("flux-dev"))


@pytest.fixture(scope="session")
def flux_schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Flux without guidance, as FLUX.1-schnell."""
    return tiny.save(tiny.flux(guidance_embeds=False), tmp_path_factory.mktemp("flux-schnell"))


@pytest.fixture
def state() -> Iterator[Path]:
    """A stack's folder with a short path and nothing in it."""
    with tempfile.TemporaryDirectory(prefix="tt-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def stack(flux_dev: Path) -> Iterator[RunningStack]:
    """One stack on the tiny Flux in float32, shared by tests that leave it as they found it."""
    with (
        tempfile.TemporaryDirectory(prefix="tt-") as folder,
        running_stack(Path(folder), "--model", str(flux_dev), "--device", "cpu") as running,
    ):
        yield running
