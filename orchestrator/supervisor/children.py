"""The processes of one stack: the orchestrator, the fork server, describers, doors, HTTP, and each stage's workers."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from orchestrator.access import KeyFolder
from orchestrator.planning.placement import Post
from orchestrator.planning.stack_plan import PlannedModel
from orchestrator.pulse import PULSE, PulseWatch
from orchestrator.settings import (
    DoorSpec,
    JobSettings,
    ModelSettings,
    OrchestratorSettings,
    OrchestratorSpec,
    StackConfig,
)
from orchestrator.state_folder import StackFolder
from orchestrator.supervisor.child import Child
from orchestrator.supervisor.fork_server import ForkServer
from orchestrator.supervisor.http_process import HttpProcess, HttpSocket
from orchestrator.supervisor.process_keeper import ProcessKeeper
from orchestrator.supervisor.ray_process import RayProcess
from orchestrator.supervisor.worker_specs import may_be_forked, worker_spec
from protocol.curve_keys import DoorRole
from protocol.errors import DoesNotFit
from protocol.messages.supervisor import RestingModel
from protocol.model_spec import ModelSpec
from protocol.stages import STAGES, Stage
from protocol.views import ProcessView
from protocol.worker_spec import DescriberSpec, WorkerSpec

NEXT_TIME = "Start the stack with it: triptych up --model …"
Team = tuple[str, Stage]  # a model's workers of a stage


class Children:
    """`lifeline` is the read end of the pipe by which they notice that the supervisor has ended.

    The workers of the default model are started at once, those of others when they are asked for.
    """

    def __init__(
        self,
        folder: StackFolder,
        config: StackConfig,
        models: Sequence[PlannedModel],
        lifeline: int,
        forks: ForkServer,
        listening: HttpSocket | None = None,
    ) -> None:
        self._folder, self._config, self._lifeline, self.forks = folder, config, lifeline, forks
        self._models = {model.name: model for model in models}
        self.default = models[0].name
        self._several = len(models) > 1  # as the stack began
        self.worked: set[str] = set()  # models whose workers have ever worked, or were told to rest
        self._endpoints = folder.local_endpoints()
        self._guarded = KeyFolder(folder.keys).exists  # as of the stack's start, for all of its processes
        self.orchestrator = self._child("orchestrator", "orchestrator.server", self._orchestrator_spec())
        self.pulse = PulseWatch()
        self.orchestrator.descriptors = (self.pulse.descriptor,)
        self.orchestrator.environment[PULSE] = str(self.pulse.descriptor)
        self.doors = [self._door(role) for role, _ in config.remote()]
        self.http = HttpProcess(listening, folder, self._endpoints.clients, lifeline) if listening else None
        self.ray = RayProcess(config, folder, lifeline) if config.ray else None
        self.describers = [self._describer(model) for model in models]
        self.workers: dict[Team, list[Child]] = {(name, stage): [] for name in self._models for stage in STAGES}
        self._resting = {  # numbers of workers by stage, of models that rest
            model.name: {stage: sum(post.stage == stage for post in model.plan.posts) for stage in STAGES}
            for model in models
        }
        self._failed: dict[str, str] = {}  # why workers of models that rest could not be started
        self.keeper = ProcessKeeper(forks, lambda: self)
        self.wake(self.default)

    def __iter__(self) -> Iterator[Child]:
        yield from (self.orchestrator, self.forks.child, *self.doors, *self.describers)
        if self.http:
            yield self.http.child
        if self.ray:
            yield self.ray.child
        for team in self.workers.values():
            yield from team

    @property
    def endpoint(self) -> str:
        """The endpoint where the orchestrator listens for workers and for the supervisor."""
        return self._endpoints.workers

    def of_process(self, pid: int) -> list[Child]:
        return [child for child in self if child.process is not None and child.process.pid == pid]

    def views(self) -> tuple[ProcessView, ...]:
        return tuple((self.forks if child is self.forks.child else child).view() for child in self)

    # -- what each is started with --------------------------------------------------------------

    def _orchestrator_spec(self) -> OrchestratorSpec:
        config = self._config
        given = {name: getattr(config, name) for name in JobSettings.model_fields}
        settings = OrchestratorSettings(
            **given, models=tuple(map(settings_of, self._models.values())),
            gpus=self._models[self.default].plan.accounts, describer=True,
        )  # fmt: skip
        clients, workers = self._endpoints.clients, self._endpoints.workers
        doors = {role: self._folder.door_endpoint(role) for role, _ in config.remote()}
        return OrchestratorSpec(
            state=self._folder.path,
            clients=clients,
            workers=workers,
            doors=doors,
            guarded=self._guarded,
            settings=settings,
        )

    def _door(self, role: DoorRole) -> Child:
        spec = DoorSpec(
            state=self._folder.path, role=role, inside=self._folder.door_endpoint(role), guarded=self._guarded
        )
        door = self._child(f"door-{role}", "orchestrator.doors", spec)
        door.essential = True
        return door

    def _describer(self, model: PlannedModel) -> Child:
        config, plan = model.config, model.plan
        stages = tuple(stage for stage in STAGES if any(post.stage == stage for post in plan.posts))
        kinds = {stage: {post.device for post in plan.posts if post.stage == stage} for stage in stages}
        folder = config.lora_folder
        spec = DescriberSpec(
            name=model.name, endpoint=self._endpoints.workers, model=config.model_spec(), dtype=plan.dtype,
            devices=tuple((stage, " ".join(sorted(devices))) for stage, devices in kinds.items()),
            stages=stages, speedups=plan.speedups, loras=str(self._folder.loras.resolve()),
            lora_folder=folder and str(Path(folder).expanduser().resolve()), lora_aliases=tuple(config.loras.items()),
        )  # fmt: skip
        child = self._child(f"{self.prefix_of(model.name)}describer", "workers.runtime", spec, forked=True)
        child.essential, child.model = True, model.name
        return child

    def prefix_of(self, model: str) -> str:
        """Return what the names of a model's processes begin with; nothing for a stack's only model."""
        return f"{model}-" if self._several or model != self.default else ""

    def _worker_spec(self, model: PlannedModel, post: Post, name: str) -> WorkerSpec:
        return worker_spec(model, post, name).model_copy(
            update={
                "endpoint": self._endpoints.workers,
                "cpu_lock": str(self._folder.cpu_lock),
                "loras": str(self._folder.loras.resolve()),
            }
        )

    def _child(
        self,
        name: str,
        module: str,
        spec: OrchestratorSpec | DoorSpec | DescriberSpec | WorkerSpec,
        forked: bool = False,
    ) -> Child:
        stage = spec.stage if isinstance(spec, WorkerSpec) else None
        log = self._folder.log(name)
        return Child(name, stage, ["-m", module], spec.model_dump_json(), log, self._lifeline, forked=forked)

    # -- starting and ending --------------------------------------------------------------------

    def _add(self, model: PlannedModel, post: Post, number: int) -> None:
        name = f"{self.prefix_of(model.name)}{post.stage}-{number}"
        spec = self._worker_spec(model, post, name)
        child = self._child(name, "workers.runtime", spec, forked=may_be_forked(spec))
        child.model = model.name
        self.workers[model.name, post.stage].append(child)

    def scale(self, model: str, stage: Stage, count: int) -> None:
        """Let a model have so many workers of a stage from now on."""
        if model in self._resting:
            self._resting[model][stage] = count
            return
        planned, children = self._models[model], self.workers[model, stage]
        while len(children) > count:
            self.keeper.dismiss(children.pop())
        start = len(self.prefix_of(model)) + len(stage) + 1
        taken = {int(child.name[start:]) for child in children}
        free = (n for n in range(1, 1 << 20) if n not in taken)
        while len(children) < count:
            number = next(free)
            self._add(planned, planned.plan.post(stage, number - 1), number)

    def knows(self, model: str) -> bool:
        return model in self._models

    def is_awake(self, model: str) -> bool:
        """Return whether a model has workers, or is to have them."""
        return model in self._models and model not in self._resting

    @property
    def models(self) -> tuple[PlannedModel, ...]:
        return tuple(self._models.values())

    def spec_of(self, model: str) -> ModelSpec | None:
        return self._models[model].config.model_spec() if model in self._models else None

    def add(self, model: PlannedModel) -> ModelSettings:
        """Take in a model that comes to the running stack, and rests; return what the orchestrator has to know of it.

        DoesNotFit where it would use GPUs that the stack does not lease.
        """
        leased = self._models[self.default].plan.accounts.keys()
        if other := sorted({gpu for post in model.plan.posts for gpu in post.gpus} - leased):
            raise DoesNotFit(f"{model.name} would use GPU {other[0]}, which this stack leaves alone.", NEXT_TIME)
        if any(post.kept for post in model.plan.posts):
            raise DoesNotFit(f"{model.name} would keep GPU memory that this stack has lent already.", NEXT_TIME)
        self._models[model.name] = model
        self.workers |= {(model.name, stage): [] for stage in STAGES}
        self._resting[model.name] = {stage: sum(post.stage == stage for post in model.plan.posts) for stage in STAGES}
        self.describers.append(self._describer(model))
        self.orchestrator.spec = self._orchestrator_spec().model_dump_json()  # for when it is started again
        return settings_of(model)

    def remove(self, model: str) -> None:
        """End all processes of a model in good order, and forget it."""
        self.rest(model)
        for describer in [child for child in self.describers if child.model == model]:
            self.describers.remove(describer)
            self.keeper.dismiss(describer)
        for stage in STAGES:
            del self.workers[model, stage]
        self._resting.pop(model, None)
        self._failed.pop(model, None)
        del self._models[model]
        self.orchestrator.spec = self._orchestrator_spec().model_dump_json()

    @property
    def resting(self) -> tuple[RestingModel, ...]:
        """The models that have no processes but their describers, until they are asked for."""
        return tuple(RestingModel(name=name, reason=self._failed.get(name, "")) for name in self._resting)

    def wake(self, model: str) -> bool:
        """Let a model's workers be started; return whether it rested."""
        counts = self._resting.pop(model, None)
        self._failed.pop(model, None)
        for stage, count in (counts or {}).items():
            self.scale(model, stage, count)
        return counts is not None

    def rest(self, model: str, reason: str = "") -> bool:
        """End a model's workers in good order, for a `reason` where they can't work; return whether it had any."""
        if model in self._resting:
            return False
        counts = {stage: len(self.workers[model, stage]) for stage in STAGES}
        for stage in STAGES:
            self.scale(model, stage, 0)
        self._resting[model] = counts
        self.worked.add(model)
        if reason:
            self._failed[model] = reason
        return True

    def restart(self, name: str) -> bool:
        """End a worker's process in good order, so that another is started; False where there is no such worker."""
        found = [child for child in self if child.stage and child.name == name]
        for child in found:
            self.keeper.restart(child)
        return bool(found)

    def prove(self, pids: tuple[int, ...]) -> None:
        """Mark processes as proven, since the orchestrator says that they work."""
        for child in self:
            if child.process is not None and child.process.pid in pids:
                child.proven = child.ever_proven = True
                if child.stage:
                    self.worked.add(child.model)


def settings_of(model: PlannedModel) -> ModelSettings:
    """Return what the orchestrator has to know of a model."""
    config = model.config
    kept = {stage: seconds for stage in STAGES if (seconds := config.stage(stage).keep_alive) is not None}
    return ModelSettings(
        name=model.name,
        model=config.model,
        chosen=model.chosen,
        fixed=model.plan.fixed(),
        keep_alive=kept,
        rest_after=config.rest_after,
    )
