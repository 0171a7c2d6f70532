"""A model's profile, asked of a process of its own, since it takes torch and the model's classes to find."""

from pydantic import ValidationError

from orchestrator.settings import StackConfig
from orchestrator.short_process import EndedWithoutAnswer, answer_of
from protocol.errors import TriptychError
from protocol.model_profile import ModelProfile
from protocol.model_spec import PARTS


class NoProfile(TriptychError):
    """A model that doesn't run on shapes alone: nothing can be planned for it."""


def find_profile(config: StackConfig, dtype: str) -> ModelProfile:
    """Find the profile of the pictures that a configuration is planned for; it takes seconds the first time.

    Raises:
        ModelMissing, BadRequest, DoesNotFit: there is no such model, or it makes no such pictures.
        NoProfile: anything else.
    """
    arguments = [config.model, "--dtype", dtype]
    for name in (*PARTS, "width", "height", "steps", "cfg_scale", "frames"):
        if (value := getattr(config, name)) is not None:
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    try:
        return ModelProfile.model_validate_json(answer_of("workers.profile.measure", arguments))
    except (EndedWithoutAnswer, ValidationError) as error:
        raise NoProfile(f"{config.model!r} can't be planned for: {str(error).splitlines()[0]}") from error
