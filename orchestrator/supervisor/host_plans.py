"""Plans for other hosts: which workers each is to have, by what it says that it has."""

import json
import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from orchestrator.gpu_driver import GpuInfo
from orchestrator.planning.calibration import measurements_in
from orchestrator.planning.stack_plan import PlannedModel, plan_each
from orchestrator.settings import HostConfig, StackConfig
from orchestrator.state_folder import StackFolder
from orchestrator.supervisor.worker_specs import worker_spec
from orchestrator.version import VERSION
from protocol.errors import BadRequest, Conflict, TriptychError
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
    """`models` gives the stack's models, `is_awake` tells of one by name whether it has workers.

    Planning looks at files for seconds, in a thread; `ring` wakes the loop when it is over.
    """

    def __init__(
        self,
        folder: StackFolder,
        models: Callable[[], Sequence[PlannedModel]],
        is_awake: Callable[[str], bool],
        ring: Callable[[], None],
    ) -> None:
        self._folder, self._models, self._is_awake, self._ring = folder, models, is_awake, ring
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
        models = tuple(self._models())
        host = self._hosts[name] = PlannedHost(facts, tuple(model.name for model in models))
        threading.Thread(target=self._find, args=(name, host, models), daemon=True, name=f"plan {name}").start()

    def _find(self, name: str, host: PlannedHost, models: Sequence[PlannedModel]) -> None:
        found: tuple[PlannedModel, ...] | TriptychError
        try:
            found = plan_for(name, host.facts, models, self._folder)
        except TriptychError as error:
            found = error
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
        gpus = models[0].plan.accounts if models else {}
        awake = [model for model in models if self._is_awake(model.name)]
        workers = tuple(spec for model in awake for spec in specs_for(name, model, several=len(models) > 1))
        told = json.dumps({index: account.model_dump(mode="json") for index, account in gpus.items()})
        return HostPlanned(host=name, workers=workers, gpus=told)


def plan_for(
    name: str, facts: HostFacts, models: Sequence[PlannedModel], folder: StackFolder
) -> tuple[PlannedModel, ...]:
    """Plan the stack's models on another host. Conflict where its pictures could have other bits; what plans raise."""
    check_equal(name, facts)
    own = models[0].config.hosts.get(name, HostConfig())
    here = [model for model in models if own.models is None or model.name in own.models]
    if own.models is not None and (unknown := set(own.models) - {model.name for model in models}):
        raise BadRequest(f"The host {name} is to run {min(unknown)!r}, which is no model of the stack's.")
    gpus = [GpuInfo(g.index, g.name, g.total_bytes, g.free_bytes, "", g.link) for g in facts.gpus]
    configs = {model.name: on_host(name, facts, model) for model in here}
    if not configs:
        return ()
    planned = plan_each(configs, gpus, measurements_in(folder))
    for there, stack in zip(planned, here, strict=True):
        if there.plan.speedups != stack.plan.speedups:
            given = ", ".join(there.plan.speedups) or "none"
            raise Conflict(
                f"On {name} {there.name} would be run with other speedups ({given}) than on the stack's own host "
                f"({', '.join(stack.plan.speedups) or 'none'}), and give other bits.",
                f"Say how it is to be placed: --placement replicas, or [hosts.{name}] in the configuration.",
            )
    return planned


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


def specs_for(host: str, model: PlannedModel, several: bool) -> Iterator[WorkerSpec]:
    """Yield the workers of a model on another host."""
    numbers: Counter[str] = Counter()
    for post in model.plan.posts:
        numbers[post.stage] += 1
        prefix = f"{model.name}-" if several else ""
        name = f"{prefix}{post.stage}-{numbers[post.stage]}@{host}"
        yield worker_spec(model, post, name).model_copy(update={"same_revision": True})
