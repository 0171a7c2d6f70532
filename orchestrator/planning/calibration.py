"""What a stack has seen of its model: workspace in bytes, and seconds a pass on each kind of GPU."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from orchestrator.job import ModelKey
from orchestrator.memory.task_keys import pace_key, workspace_key
from orchestrator.planning.hardware import Machine
from orchestrator.planning.prediction import Terms
from orchestrator.settings import StackConfig
from orchestrator.state_folder import StackFolder
from orchestrator.storage.database import peek
from protocol.errors import TriptychError
from protocol.job import Recipe
from protocol.model_profile import ModelFigures
from protocol.stages import STAGES, Stage


@dataclass(frozen=True, slots=True)
class Experience:
    workspaces: Mapping[str, int] = field(default_factory=dict)  # bytes, by `workspace_key`
    paces: Mapping[str, float] = field(default_factory=dict)  # seconds a step, by `pace_key`

    def of(self, machine: Machine, figures: ModelFigures, speedups: tuple[str, ...]) -> Machine:
        """The machine with the speeds that were measured on its cards, with these speedups and this size."""
        recipe = figures.recipe.model_copy(update={"speedups": speedups})
        cards = [replace(card, measured=self._measured(card.name, figures, recipe)) for card in machine.cards]
        return replace(machine, cards=tuple(cards))

    def _measured(self, card: str, figures: ModelFigures, recipe: Recipe) -> dict[Stage, float]:
        found: dict[Stage, float] = {}
        for stage in figures.stages:
            if seconds := self.paces.get(pace_key(stage.stage, recipe, card)):
                steps = recipe.steps if stage.stage == "denoise" else 1
                found[stage.stage] = stage.flop * stage.passes / steps / seconds
        return found

    def terms(self, config: StackConfig, figures: ModelFigures) -> Terms:
        recipe = figures.recipe.model_copy(update={"speedups": config.speedups()})
        keys = {stage: workspace_key(stage, ModelKey.of_recipe(recipe), recipe) for stage in STAGES}
        seen = {stage: self.workspaces[key] for stage, key in keys.items() if key in self.workspaces}
        return Terms(config.compile, config.patience, seen)


def experience_in(folder: StackFolder) -> Experience:
    """What the stack in a folder has seen; nothing where there is none, or none that can be read."""
    if not folder.database.exists():
        return Experience()
    try:
        workspaces = dict(peek(folder.database, "SELECT key, bytes FROM workspaces"))
        return Experience(workspaces, dict(peek(folder.database, "SELECT key, seconds FROM paces")))
    except TriptychError:
        return Experience()
