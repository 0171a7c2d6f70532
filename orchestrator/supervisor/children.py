"""The processes of one stack: the orchestrator, the fork server, the describer, and the workers of each stage."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from orchestrator.access import KeyFolder
from orchestrator.planning.placement import Post
from orchestrator.planning.stack_plan import StackPlan
from orchestrator.pulse import PULSE, PulseWatch
from orchestrator.settings import DoorSpec, JobSettings, OrchestratorSettings, OrchestratorSpec, StackConfig
from orchestrator.state_folder import StackFolder
from orchestrator.supervisor.child import Child, Process
from orchestrator.supervisor.fork_server import ForkServer
from protocol.curve_keys import Role
from protocol.stages import STAGES, Stage
from protocol.views import ProcessView
from protocol.worker_spec import DescriberSpec, WorkerSpec

GRACE_SECONDS = 8.0  # from asking a process to stop to killing it


class Children:
    """`lifeline` is the read end of the pipe by which they notice that the supervisor has ended."""

    def __init__(
        self, folder: StackFolder, config: StackConfig, plan: StackPlan, lifeline: int, forks: ForkServer
    ) -> None:
        self._folder, self._config, self._plan, self._lifeline, self.forks = folder, config, plan, lifeline, forks
        self._endpoints = folder.local_endpoints()
        self._guarded = KeyFolder(folder.keys).exists  # as of the stack's start, for all of its processes
        self.orchestrator = self._child("orchestrator", "orchestrator.server", self._orchestrator_spec())
        self.pulse = PulseWatch()
        self.orchestrator.descriptors = (self.pulse.descriptor,)
        self.orchestrator.environment[PULSE] = str(self.pulse.descriptor)
        self.doors = [self._door(role) for role, _ in config.remote()]
        self.describer = self._child("describer", "workers.runtime", self._describer_spec(), forked=True)
        self.describer.essential = True
        self.workers: dict[Stage, list[Child]] = {stage: [] for stage in STAGES}
        for post in plan.posts:
            self._add(post, len(self.workers[post.stage]) + 1)
        self.leaving: list[tuple[Child, float]] = []  # scaled away or restarted, and when to kill

    def __iter__(self) -> Iterator[Child]:
        yield from (self.orchestrator, self.forks.child, *self.doors, self.describer)
        for stage in STAGES:
            yield from self.workers[stage]

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
        config, plan = self._config, self._plan
        keep_alive = {stage: seconds for stage in STAGES if (seconds := config.stage(stage).keep_alive) is not None}
        given = {name: getattr(config, name) for name in JobSettings.model_fields}
        settings = OrchestratorSettings(
            **given, fixed=plan.fixed(), keep_alive=keep_alive, gpus=plan.accounts, describer=True
        )
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

    def _door(self, role: Role) -> Child:
        spec = DoorSpec(
            state=self._folder.path, role=role, inside=self._folder.door_endpoint(role), guarded=self._guarded
        )
        door = self._child(f"door-{role}", "orchestrator.doors", spec)
        door.essential = True
        return door

    def _describer_spec(self) -> DescriberSpec:
        stages = tuple(stage for stage in STAGES if any(post.stage == stage for post in self._plan.posts))
        folder = self._config.lora_folder
        return DescriberSpec(
            endpoint=self._endpoints.workers, model=self._config.model_spec(),
            dtype=self._plan.dtype, stages=stages, speedups=self._plan.speedups,
            loras=str(self._folder.loras.resolve()), lora_folder=folder and str(Path(folder).expanduser().resolve()),
            lora_aliases=tuple(self._config.loras.items()),
        )  # fmt: skip

    def _worker_spec(self, post: Post, name: str) -> WorkerSpec:
        config = self._config
        return WorkerSpec(
            stage=post.stage, name=name, endpoint=self._endpoints.workers, model=config.model_spec(),
            description=self._plan.description, device=post.device, dtype=self._plan.dtype,
            visible_gpus=post.gpus if post.gpus and post.device == "cuda" else None,
            leased_gpus=post.gpus if post.leased else (), max_memory=post.memory, workspace=post.workspace or None,
            cut=post.cut, jobs=post.jobs, speedups=self._plan.speedups,
            checkpoint_seconds=config.checkpoint if post.stage == "denoise" and config.keep else None,
            cpu_lock=str(self._folder.cpu_lock), locked_bytes=post.locked, loras=str(self._folder.loras.resolve()),
        )  # fmt: skip

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

    def start_due(self, started: Callable[[Child], None]) -> None:
        """Start what is to run and doesn't, when its time has come; kill what was to end and hasn't."""
        now = time.monotonic()
        self.forks.listen()
        self.forks.child.proven |= self.forks.ready
        for child in self:
            if child.state == "waiting" and child.wanted and now >= child.start_at:
                if child.forked and self.forks.starting:
                    continue  # it is there sooner than a process that imports everything by itself
                child.start(self._spawn)
                started(child)
        self.forks.keep_twin()
        for child, kill_at in self.leaving:
            if now >= kill_at:
                child.kill()

    def next_due(self) -> float | None:
        """Monotonic seconds when `start_due` has something to do."""
        held = self.forks.starting
        due = [c.start_at for c in self if c.state == "waiting" and c.wanted and not (c.forked and held)]
        return min(due + [at for _, at in self.leaving], default=None)

    def _spawn(self, child: Child, report: int) -> Process | None:
        """Start a child by the fork server, which is itself followed by its twin; None: it has to start anew."""
        if child is self.forks.child:
            return self.forks.succeed()
        return self.forks.spawn(child, report) if child.forked else None

    def _add(self, post: Post, number: int) -> None:
        name = f"{post.stage}-{number}"
        forked = not self._config.stage(post.stage).quantize  # whose library can't be imported before a fork
        child = self._child(name, "workers.runtime", self._worker_spec(post, name), forked=forked)
        self.workers[post.stage].append(child)

    def scale(self, stage: Stage, count: int) -> None:
        """Let a stage have so many workers from now on."""
        children = self.workers[stage]
        while len(children) > count:
            self._dismiss(children.pop())
        taken = {child.name for child in children}
        free = (n for n in range(1, 1 << 20) if f"{stage}-{n}" not in taken)
        while len(children) < count:
            number = next(free)
            self._add(self._plan.post(stage, number - 1), number)

    def restart(self, name: str) -> bool:
        """End a worker's process in good order, so that another is started; False where there is no such worker."""
        found = [child for child in self if child.stage and child.name == name]
        for child in found:
            child.wanted, child.failures, child.start_at = True, 0, 0.0
            self._dismiss(child)
        return bool(found)

    def _dismiss(self, child: Child) -> None:
        child.terminate()
        if child.process is not None:
            self.leaving.append((child, time.monotonic() + GRACE_SECONDS))

    def prove(self, pids: tuple[int, ...]) -> None:
        """Mark processes as proven, since the orchestrator says that they work."""
        for child in self:
            if child.process is not None and child.process.pid in pids:
                child.proven = child.ever_proven = True
