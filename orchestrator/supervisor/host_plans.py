"""Plans for other hosts: which workers each is to have, by what it says that it has."""

import json
import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from orchestrator.gpu_driver import GpuInfo
from orchestrator.planning.calibration import Measurements, measurements_in
from orchestrator.planning.stack_plan import PlannedModel, plan_each
from orchestrator.settings import HostConfig, StackConfig
from orchestrator.state_folder import StackFolder
from orchestrator.supervisor.worker_specs import worker_spec
from orchestrator.version import VERSION
from protocol.errors import Conflict, TriptychError
from protocol.host import HostFacts, library_versions
from protocol.messages.supervisor import HostPlanned
from protocol.worker_spec import WorkerSpec

log = logging.getLogger(__name__)

MOST_SAID = 1000  # characters of a reason


@dataclass(slots=True)
class PlannedHost:
    """A host, the models that it is planned for (None: not yet), and what was last said of it."""

    facts: HostFacts
    wanted: tuple[str, ...]  # names of the models that it was to be planned for
    models: tuple[PlannedModel, ...] | TriptychError | None = None
    said: object = None  # that decides what is to be said


class HostPlans:
    """`models` gives the stack's models, `is_awake` tells of one by name whether it has workers, `prefix_of` how the
    names of those begin.

    Planning looks at files for seconds, in a thread; `ring` wakes the loop when it is over.
    """

    def __init__(
        self,
        folder: StackFolder,
        models: Callable[[], Sequence[PlannedModel]],
        is_awake: Callable[[str], bool],
        prefix_of: Callable[[str], str],
        ring: Callable[[], None],
    ) -> None:
        self._folder, self._models, self._is_awake, self._ring = folder, models, is_awake, ring
        self._prefix_of = prefix_of
        self._hosts: dict[str, PlannedHost] = {}
        self._found: queue.SimpleQueue[tuple[PlannedHost, tuple[PlannedModel, ...] | TriptychError]] = (
            queue.SimpleQueue()
        )

    def joined(self, name: str, facts: HostFacts) -> None:
        """Plan for a host that has come, unless that was done; what comes of it is among the `answers`."""
        known = self._hosts.get(name)
        if known and known.facts == facts and not isinstance(known.models, TriptychError):
            known.said = None  # whoever asks doesn't know
        else:
            self._plan(name, facts)

    def answers(self) -> Iterator[HostPlanned]:
        """Yield what is to be said of hosts: new plans, and changes by models that come, go, wake or rest."""
        while not self._found.empty():
            host, models = self._found.get()
            host.models = models
        names = tuple(model.name for model in self._models())
        for name, host in list(self._hosts.items()):
            if host.models is None:
                continue
            if host.wanted != names and not isinstance(host.models, TriptychError):
                self._plan(name, host.facts)
                continue
            state = host.models if isinstance(host.models, TriptychError) else tuple(filter(self._is_awake, names))
            if state != host.said:
                host.said = state
                yield self._answer(name, host)

    def _plan(self, name: str, facts: HostFacts) -> None:
        """Plan a host anew; the plans of models that it has already stay as they are."""
        models, known = tuple(self._models()), self._hosts.get(name)
        before = known.models if known and known.facts == facts and isinstance(known.models, tuple) else ()
        host = self._hosts[name] = PlannedHost(facts, tuple(model.name for model in models))
        host.said = known.said if before and known else None
        arguments = name, host, models, before
        threading.Thread(target=self._find, args=arguments, daemon=True, name=f"plan {name}").start()

    def _find(
        self, name: str, host: PlannedHost, models: Sequence[PlannedModel], before: Sequence[PlannedModel]
    ) -> None:
        found: tuple[PlannedModel, ...] | TriptychError
        try:
            there = {model.name: model for model in before}
            new = [model for model in models if model.name not in there]
            found = plan_for(name, host.facts, new, self._folder) if new else ()
            there |= {model.name: model for model in found}
            found = tuple(there[model.name] for model in models if model.name in there)
        except TriptychError as error:
            found = tuple(before) or error  # a host that works goes on without the model that is new
            if before:
                log.warning("%s runs no new model: %s", name, error)
        except Exception as error:
            log.exception("%s can't be planned for", name)
            found = TriptychError(f"{name} can't be planned for: {error}")
        self._found.put((host, found))
        self._ring()

    def _answer(self, name: str, host: PlannedHost) -> HostPlanned:
        if isinstance(host.models, TriptychError):
            error = host.models
            return HostPlanned(
                host=name, code=error.code, reason=error.message[:MOST_SAID], hint=error.hint[:MOST_SAID]
            )
        models = host.models or ()
        gpus = {index: account for model in models for index, account in model.plan.accounts.items()}
        awake = [model for model in models if self._is_awake(model.name)]
        workers = tuple(spec for model in awake for spec in specs_for(name, model, self._prefix_of(model.name)))
        told = json.dumps({index: account.model_dump(mode="json") for index, account in gpus.items()})
        return HostPlanned(host=name, workers=workers, gpus=told)


def plan_for(
    name: str, facts: HostFacts, models: Sequence[PlannedModel], folder: StackFolder
) -> tuple[PlannedModel, ...]:
    """Plan the stack's models on another host. Conflict where its pictures could have other bits; what
    plans raise, where none of them can run there."""
    check_equal(name, facts)
    own = models[0].config.hosts.get(name, HostConfig())
    here = [model for model in models if own.models is None or model.name in own.models]
    gpus = [GpuInfo(g.index, g.name, g.total_bytes, g.free_bytes, "", g.link) for g in facts.gpus]
    configs = {model.name: on_host(name, facts, model) for model in here}
    if not configs:
        return ()
    planned, refusals = plan_what_fits(name, configs, gpus, measurements_in(folder), facts.cores)
    if not planned:
        raise refusals[0]
    here = [model for model in here if model.name in {there.name for there in planned}]
    for there, stack in zip(planned, here, strict=True):
        if there.plan.speedups != stack.plan.speedups:
            given = ", ".join(there.plan.speedups) or "none"
            raise Conflict(
                f"On {name} {there.name} would be run with other speedups ({given}) than on the stack's own host "
                f"({', '.join(stack.plan.speedups) or 'none'}), and give other bits.",
                f"Say how it is to be placed: --placement replicas, or [hosts.{name}] in the configuration.",
            )
    return planned


def plan_what_fits(
    host: str, configs: dict[str, StackConfig], gpus: Sequence[GpuInfo], measurements: Measurements, cores: int
) -> tuple[tuple[PlannedModel, ...], list[TriptychError]]:
    """Plan models on another host, without those that can't run there; return why those can't, too."""
    refusals: list[TriptychError] = []
    fit: dict[str, StackConfig] = {}
    for name, config in configs.items():
        try:
            plan_each({name: config}, gpus, measurements, cores)
            fit[name] = config
        except TriptychError as error:
            log.warning("%s can't run %s: %s", host, name, error)
            refusals.append(error)
    return plan_each(fit, gpus, measurements, cores) if fit else (), refusals


def check_equal(name: str, facts: HostFacts) -> None:
    """Raise Conflict where a host has another version of what a picture's bits depend on."""
    for called, theirs, ours in (
        ("Triptych", facts.version, VERSION), ("the libraries", facts.versions, library_versions())
    ):  # fmt: skip
        if theirs != ours:
            raise Conflict(
                f"{name} has another version of {called} ({theirs}) than the stack's host ({ours}): bits could differ.",
                "Install the same there: pip install -c constraints.txt, as on the stack's host.",
            )


def on_host(name: str, facts: HostFacts, model: PlannedModel) -> StackConfig:
    """Return a model's configuration on another host, such that its pictures are equal."""
    config = model.config.on_host(name, facts.memory_bytes, model.plan.dtype)
    parallel = any("parallel=" in speedup for speedup in model.plan.speedups)
    if config.placement == "auto" and config.compile and not parallel:
        return config.model_copy(update={"placement": "replicas"})
    return config


def specs_for(host: str, model: PlannedModel, prefix: str) -> Iterator[WorkerSpec]:
    """Yield the workers of a model on another host."""
    numbers: Counter[str] = Counter()
    for post in model.plan.posts:
        numbers[post.stage] += 1
        name = f"{prefix}{post.stage}-{numbers[post.stage]}@{host}"
        yield worker_spec(model, post, name).model_copy(update={"same_revision": True})
