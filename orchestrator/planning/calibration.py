"""Measurements of a stack's model: workspace in bytes, and seconds a pass on each kind of GPU."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from orchestrator.job import ModelKey
from orchestrator.memory.task_keys import step_key, workspace_key
from orchestrator.planning.hardware import Hardware
from orchestrator.planning.prediction import Terms
from orchestrator.settings import StackConfig
from orchestrator.state_folder import StackFolder
from orchestrator.storage.database import peek
from protocol.errors import TriptychError
from protocol.job import Recipe
from protocol.model_profile import ModelProfile
from protocol.stages import STAGES, Stage


@dataclass(frozen=True, slots=True)
class Measurements:
    workspaces: Mapping[str, int] = field(default_factory=dict)  # bytes, by `workspace_key`
    step_seconds: Mapping[str, float] = field(default_factory=dict)  # seconds a step, by `step_key`

    def of(self, hardware: Hardware, profile: ModelProfile, speedups: tuple[str, ...]) -> Hardware:
        """The machine with the speeds that were measured on its cards, with these speedups and this size."""
        recipe = profile.recipe.model_copy(update={"speedups": speedups})
        cards = [replace(card, measured=self._measured(card.name, profile, recipe)) for card in hardware.cards]
        return replace(hardware, cards=tuple(cards))

    def _measured(self, card: str, profile: ModelProfile, recipe: Recipe) -> dict[Stage, float]:
        found: dict[Stage, float] = {}
        for stage in profile.stages:
            if seconds := self.step_seconds.get(step_key(stage.stage, recipe, card)):
                steps = recipe.steps if stage.stage == "denoise" else 1
                found[stage.stage] = stage.flop * stage.passes / steps / seconds
        return found

    def terms(self, config: StackConfig, profile: ModelProfile) -> Terms:
        recipe = profile.recipe.model_copy(update={"speedups": config.speedups()})
        keys = {stage: workspace_key(stage, ModelKey.of_recipe(recipe), recipe) for stage in STAGES}
        seen = {stage: self.workspaces[key] for stage, key in keys.items() if key in self.workspaces}
        return Terms(config.compile, config.patience, seen, config.cuda_graphs)


def measurements_in(folder: StackFolder) -> Measurements:
    """Read the measurements of the stack in a folder; none where there is none, or none that can be read."""
    if not folder.database.exists():
        return Measurements()
    try:
        workspaces = dict(peek(folder.database, "SELECT key, bytes FROM workspaces"))
        return Measurements(workspaces, dict(peek(folder.database, "SELECT key, seconds FROM paces")))
    except TriptychError:
        return Measurements()
