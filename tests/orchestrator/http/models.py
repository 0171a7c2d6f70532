"""A model as the HTTP process knows it."""

from typing import Any

from protocol.model import ModelDescription
from protocol.views import ModelView


def model_view(name: str = "m", **description: Any) -> ModelView:
    fields: dict[str, Any] = {
        "model": name, "revision": "r", "pipeline": "FluxPipeline", "size_multiple": 16, "width": 32, "height": 32,
        "max_pixels": 1 << 20, "steps": 28, "guidance": 3.5, "cfg_scale": 1.0, "negative_prompt": True,
        "max_sequence_length": 512, "max_sequence_limit": 512, **description,
    }  # fmt: skip
    return ModelView(
        name=name, model=name, revision="r", pipeline="FluxPipeline", dtype="float32", speedups=(), video=False,
        description=ModelDescription(**fields), default=True, resting=False, reason="", jobs=0,
    )  # fmt: skip
