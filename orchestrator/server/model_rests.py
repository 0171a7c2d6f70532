"""Which models have workers: one that a job asks for is woken, one without a job for long may rest."""

import time
from collections.abc import Callable, Sequence

from orchestrator.dispatch.catalogue import CatalogueEntry
from orchestrator.dispatch.engine import Engine
from orchestrator.job import ModelKey
from orchestrator.server.supervisor_link import SupervisorLink
from protocol.errors import Conflict
from protocol.messages.supervisor import RestingModel

ASK_AGAIN_SECONDS = 1.0


class ModelRests:
    def __init__(self, engine: Engine, supervisor: SupervisorLink, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._supervisor, self._clock = engine, supervisor, clock
        self._resting: set[str] = set()  # by name, as the supervisor has told
        self._asked: dict[str, float] = {}  # monotonic seconds when a model that rests was last asked for
        self._used: dict[str, float] = {}  # monotonic seconds when it last had a job
        self._reasons: dict[str, str] = {}  # why those that rest could not be started, by name
        self._heard = False  # from a supervisor

    def rests(self, entry: CatalogueEntry) -> bool:
        """Return whether a model has no workers, as the supervisor has told, which tells it later than they come."""
        return entry.name in self._resting and not any(worker.model == entry.key for worker in self._engine.fleet)

    def reason(self, name: str) -> str:
        """Return why a model's workers could not be started; empty where they could."""
        return self._reasons.get(name, "")

    def told(self, resting: Sequence[RestingModel]) -> None:
        """Take in which models rest; jobs of one whose workers could not be started fail for that reason."""
        now, before = {model.name for model in resting}, self._resting
        self._resting, self._reasons = now, {model.name: model.reason for model in resting}
        self._asked = {name: at for name, at in self._asked.items() if name in now}
        for model in resting:
            if model.reason and model.name not in before and self._heard:
                self._fail_jobs(model)
        self._heard = True  # before that a reason may be an old one

    def _fail_jobs(self, model: RestingModel) -> None:
        for entry in [entry for entry in self._engine.catalogue.entries if entry.name == model.name]:
            self._engine.fail_waiting(entry.key, f"{model.name} can't be run: {model.reason}")

    def see_to_it(self) -> None:
        """Wake models that have jobs, and let those rest that have had none for long."""
        now = self._clock()
        for entry in self._engine.catalogue.entries:
            name, after = entry.name, self._engine.catalogue.models[entry.name].rest_after
            if self._jobs(entry):
                self._used[name] = now
                if name in self._resting:
                    self._ask(name)
            elif self._loads(entry):
                self._used[name] = now
            elif after is not None and name not in self._resting and now - self._used.setdefault(name, now) >= after:
                self._used[name] = now  # if it isn't done by then, it is told again
                self._supervisor.wake(name, rest=True)

    def let_rest(self, models: list[ModelKey]) -> None:
        """End the workers of models whose memory others need, unless they have jobs by now; empties the list."""
        while models:
            key = models.pop()
            for entry in [entry for entry in self._engine.catalogue.entries if entry.key == key]:
                if not self._jobs(entry) and entry.name not in self._resting:
                    self._supervisor.wake(entry.name, rest=True)

    def _ask(self, name: str) -> None:
        now = self._clock()
        if now - self._asked.get(name, -ASK_AGAIN_SECONDS) >= ASK_AGAIN_SECONDS:
            self._asked[name] = now
            self._supervisor.wake(name)

    def _loads(self, entry: CatalogueEntry) -> bool:
        """Return whether a model's workers are yet to come, or to load."""
        states = [worker.state for worker in self._engine.fleet if worker.model == entry.key]
        return not states or "loading" in states

    def _jobs(self, entry: CatalogueEntry) -> int:
        return self._engine.job_queue.by_model[entry.key]

    def load(self, model: str) -> None:
        """Start a model's workers, as a person wants; NotFound."""
        name = self._engine.catalogue.name(model)
        self._used[name] = self._clock()
        self._supervisor.wake(name)

    def unload(self, model: str) -> None:
        """End a model's workers, as a person wants; NotFound, Conflict while it has jobs."""
        name = self.check_unused(model)
        if name not in self._resting:
            self._supervisor.wake(name, rest=True)

    def check_unused(self, model: str) -> str:
        """Return a model's name; NotFound, Conflict while it has jobs."""
        entry = self._engine.catalogue.entry(model)
        if count := self._jobs(entry):
            jobs = "an unfinished job" if count == 1 else f"{count} unfinished jobs"
            raise Conflict(f"{entry.name} has {jobs}.", "Wait for their end, or cancel them.")
        return entry.name
