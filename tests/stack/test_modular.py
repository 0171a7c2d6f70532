"""A modular pipeline through a whole stack: planned for, described, made of a prompt and of a picture."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ModularPipeline

from tests import tiny_modular
from tests.pictures import noise
from tests.stacks import running_stack
from tests.tiny_videos import frames_of


@pytest.mark.all
def test_a_modular_pipeline_in_little_memory_gives_the_bits_that_it_gives_plainly(state: Path, tmp_path: Path) -> None:
    folder = tiny_modular.flux2_klein(tmp_path / "model")
    pipeline: Any = ModularPipeline.from_pretrained(str(folder))
    pipeline.load_components(dtype=torch.float32)

    def plainly(**given: Any) -> torch.Tensor:
        images = pipeline(
            prompt="a red circle", height=64, width=64, num_inference_steps=4, output="images",
            generator=torch.Generator().manual_seed(3), **given,
        )  # fmt: skip
        return frames_of(type("Output", (), {"images": images}))

    size = {"width": 64, "height": 64, "steps": 4, "seed": 3}
    budget = sum(path.stat().st_size for path in (folder / "transformer").glob("*.safetensors")) * 9 // 10
    with running_stack(state, "--model", str(folder), "--device", "cpu:0", "--budget", f"0={budget}B") as stack:
        assert torch.equal(stack.picture("a red circle", **size)[1], plainly())
        assert torch.equal(
            stack.picture("a red circle", images=noise((64, 64)), **size)[1], plainly(image=noise((64, 64)))
        )
