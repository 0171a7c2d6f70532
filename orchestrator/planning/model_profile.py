"""A model's figures, asked of a process of its own, since they take torch and the model's classes to find."""

import json
import logging
import subprocess
import sys

from orchestrator.settings import StackConfig
from protocol.errors import TriptychError, from_wire
from protocol.model_profile import ModelProfile

log = logging.getLogger(__name__)


class NoProfile(TriptychError):
    """A model that doesn't run on shapes alone: nothing can be planned for it."""


def find_profile(config: StackConfig, dtype: str) -> ModelProfile:
    """Find the profile of the pictures that a configuration is planned for; it takes seconds the first time.

    Raises:
        ModelMissing, BadRequest, DoesNotFit: there is no such model, or it makes no such pictures.
        NoFigures: anything else.
    """
    arguments = [config.model, "--dtype", dtype]
    for name in ("revision", "width", "height", "steps"):
        if (value := getattr(config, name)) is not None:
            arguments += [f"--{name}", str(value)]
    done = subprocess.run(
        [sys.executable, "-m", "workers.profile.measure", *arguments], capture_output=True, check=False
    )
    if done.returncode == 0:
        return ModelProfile.model_validate_json(done.stdout)
    last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["nothing was said"]
    try:
        told = json.loads(last[0])
        error = from_wire(told["code"], told["message"], told["hint"])
    except (ValueError, KeyError, TypeError):
        raise NoProfile(f"{config.model!r} can't be planned for: {last[0][:500]}") from None
    raise error
