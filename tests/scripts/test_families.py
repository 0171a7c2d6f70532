"""The classes of the table of families, one by one."""

import pytest

from scripts.families import run
from tests.families import CASES


@pytest.mark.all
@pytest.mark.parametrize("name", CASES)
def test_a_class_gives_the_bits_of_the_plain_pipeline(name: str) -> None:
    how, why = run(name)
    assert how in ("equal", "not run"), why


@pytest.mark.parametrize("name", ["StableDiffusionXLControlNetPipeline", "AmusedInpaintPipeline", "Krea2Pipeline"])
def test_control_images_own_quantizers_and_settings_of_lists(name: str) -> None:
    assert run(name)[0] == "equal"
