"""Stages of several models that compute with the same: a worker of one of them does the tasks of all."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from orchestrator.job import ModelKey
from orchestrator.scheduling.snapshot import Place
from protocol.stages import Stage


class CommonStages:
    """The stages that models have in common, by the digests in their descriptions; any other stage is a model's own.

    Nothing is shared while there are workers of other hosts or of keys' holders: these may have some of the models
    alone, and other devices.
    """

    def __init__(self, elsewhere: Callable[[], bool] = lambda: False) -> None:
        """`elsewhere` says whether there are workers of other hosts or of keys' holders."""
        self._elsewhere = elsewhere
        self._places: Mapping[Place, Place] = {}
        self._models: Mapping[Place, tuple[ModelKey, ...]] = {}

    def learn(self, models: Iterable[tuple[ModelKey, Sequence[tuple[Stage, str]]]]) -> None:
        """Take in all models of the stack, with the digest of each stage that may be shared."""
        alike: dict[object, dict[Place, None]] = defaultdict(dict)  # two names may be of one model
        for model, digests in models:
            for stage, digest in digests:
                own = tuple(speedup for speedup in model.speedups if speedup.startswith(f"{stage}:"))
                alike[stage, digest, model.dtype, own][stage, model] = None
        groups = [[*group] for group in alike.values() if len(group) > 1]
        self._places = {place: group[0] for group in groups for place in group}
        self._models = {group[0]: tuple(model for _, model in group) for group in groups}

    @property
    def places(self) -> Mapping[Place, Place]:
        """Return, for each place that is shared, the one that stands for all that share it."""
        return self._places if self._places and not self._elsewhere() else {}

    def place(self, stage: Stage, model: ModelKey) -> Place:
        """Return the place that stands for all models that share a model's stage."""
        own = stage, model
        return self.places.get(own, own) if self._places else own

    def models(self, stage: Stage, model: ModelKey) -> tuple[ModelKey, ...]:
        """Return the models that share a model's stage, itself included."""
        own = (model,)
        return self._models.get(self.place(stage, model), own) if self.places else own
