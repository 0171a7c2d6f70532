"""The classes of the table of families, one by one."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from scripts.families import run
from tests import stages
from tests.families import CASES
from workers.models.devices import Devices
from workers.weights.lockstep import Lockstep, in_lockstep
from workers.weights.residency import Residency


@pytest.mark.all
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept")  # of torch and NumPy, in the scheduler of Helios
@pytest.mark.parametrize("name", CASES)
def test_a_class_gives_the_bits_of_the_plain_pipeline(name: str) -> None:
    how, why = run(name)
    assert how in ("equal", "not run"), why


USED = (  # today, most of all
    "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline",
    "FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxFillPipeline", "FluxKontextPipeline", "Flux2Pipeline",
    "Flux2KleinPipeline", "QwenImagePipeline", "QwenImageEditPipeline", "ZImagePipeline", "ChromaPipeline",
    "Krea2Pipeline", "HiDreamImagePipeline", "SanaPipeline", "WanPipeline", "WanImageToVideoPipeline", "LTXPipeline",
    "LTX2Pipeline", "CogVideoXPipeline", "HunyuanVideo15Pipeline", "WanAnimatePipeline",
    "HunyuanVideoFramepackPipeline",
)  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"}, "guided": {"guided": True}, "killed in the middle": {"killed_at": 2},
}  # fmt: skip


@pytest.mark.all
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", USED)
def test_what_is_used_most_gives_the_bits_of_the_plain_pipeline_in_every_way(name: str, way: str) -> None:
    how, why = run(name, **WAYS[way])
    assert how == "equal", why


class NoRing:
    """Stands for weights that are streamed, where there are none."""

    def shared(self, last: Callable[[], bool]) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


@pytest.mark.all
@pytest.mark.parametrize("name", USED)
def test_a_guided_steps_forwards_in_lockstep_have_the_bits_of_the_plain_pipeline(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Residency.job

    @contextlib.contextmanager
    def job(self: Residency, forwards: Any, in_steps: bool = False, kind: Any = None) -> Iterator[None]:
        with real(self, forwards, kind=kind), contextlib.ExitStack() as stack:
            if in_steps:
                together = in_lockstep(Lockstep(self.row_modules, self.device), self.module, NoRing(), lambda _: True)
                stack.enter_context(together)
            yield

    monkeypatch.setattr(Residency, "job", job)
    monkeypatch.setattr(stages, "Devices", lambda device: Devices(device, {0: 1 << 40}))
    how, why = run(name, guided=True)
    assert how == "equal", why


@pytest.mark.parametrize("name", ["StableDiffusionXLControlNetPipeline", "AmusedInpaintPipeline", "Krea2Pipeline"])
def test_control_images_own_quantizers_and_settings_of_lists(name: str) -> None:
    assert run(name)[0] == "equal"
