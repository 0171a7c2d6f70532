"""The stages that a job passes through."""

from typing import Literal

Stage = Literal["text", "denoise", "vae"]
STAGES: tuple[Stage, ...] = ("text", "denoise", "vae")
BEFORE: dict[Stage, Stage] = {"denoise": "text", "vae": "denoise"}  # whose output a stage takes
