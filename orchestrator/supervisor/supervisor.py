"""Starts the orchestrator and the workers, keeps them running, and stops them all.

Signals and deaths of children wake one loop. Children hold the read end of a pipe whose only writer is this process,
so they end with it even if it is killed.
"""

import contextlib
import errno
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TextIO

import zmq

from orchestrator.config import OrchestratorSettings, StackConfig
from orchestrator.gpu_driver import list_gpus
from orchestrator.planning.calibration import experience_in
from orchestrator.planning.placement import Post
from orchestrator.planning.stack_plan import arrange
from orchestrator.state_folder import StackFolder
from orchestrator.supervisor.child import UNUSABLE, Child, Process
from orchestrator.supervisor.fork_server import ForkServer, Spare
from protocol import wire
from protocol.errors import BadRequest, DoesNotFit, ModelMissing, StateDamaged, StateUnusable, TriptychError
from protocol.messages.common import Beat, Message
from protocol.messages.supervisor import (
    TO_SUPERVISOR,
    KillProcess,
    Processes,
    RestartProcess,
    SetScale,
    SupervisorHello,
)
from protocol.sockets import dealer, new_identity, receive, send
from protocol.stages import STAGES, Stage

log = logging.getLogger(__name__)
log.addHandler(logging.NullHandler())  # a person hears of what matters by notices

GRACE_SECONDS = 8.0  # from asking a process to stop to killing it
STOPPED_SECONDS = 0.5  # that a process may stand still by a signal
DEAF_SECONDS = 10.0  # that the orchestrator may leave the supervisor without an answer
HELLO_SECONDS = 1.0  # the supervisor says hello again and again: the orchestrator may be a new one
BY_EXIT_CODE: dict[int, type[TriptychError]] = {
    cls.exit_code: cls for cls in (BadRequest, ModelMissing, DoesNotFit, StateUnusable, StateDamaged)
}
Notice = Callable[[str], None]


class Supervisor:
    """`notice` gets one line for a person whenever something happens that they may want to know."""

    def __init__(self, folder: StackFolder, config: StackConfig, notice: Notice) -> None:
        """Plans the stack: BadRequest, ModelMissing or DoesNotFit where it can't work."""
        self.folder, self.config, self.notice = folder, config, notice
        raise_file_limit()
        gpus = list_gpus()
        self._dtype = stack_dtype(config, bool(gpus))
        self.arrangement = arrange(config, self._dtype, gpus, experience_in(folder))
        self._lifeline, self._life = os.pipe()
        self._wake, self._bell = socket.socketpair()
        self._wake.setblocking(False)
        self._bell.setblocking(False)
        self._signal = 0
        self._done = False  # what it was for is done
        self._endpoints = folder.local_endpoints()
        self._orchestrator = self._orchestrator_child()
        starter = ForkServer if ForkServer.possible() else Spare
        self._forks = starter(folder.log(starter.name), self._lifeline)
        self._describer = self._describer_child()
        self._workers: dict[Stage, list[Child]] = {stage: [] for stage in STAGES}
        for post in self.arrangement.posts:
            mine = self._workers[post.stage]
            mine.append(self._worker_child(post, len(mine) + 1))
        self._leaving: list[tuple[Child, float]] = []  # scaled away or restarted, and when to kill
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._link: zmq.Socket[bytes] | None = None
        self._said_hello = 0.0
        self._lock: TextIO | None = None
        self._looked_down = 0.0  # monotonic seconds
        self._looked = 0.0  # monotonic seconds of the last look at what hangs
        self._answered = 0.0  # monotonic seconds of the orchestrator's last answer; 0: it has given none yet
        self._noticed: dict[str, str] = {}  # why children ended last, by name: what lasts is said once
        self._dead: list[int] = []
        self._stopped: list[int] = []  # of the dead, those that stood still

    # -- life -----------------------------------------------------------------------------------

    def run(self) -> int:
        """Until a signal, whose number it returns, or `stop()`: 0. Raises what keeps a stage from ever starting."""
        with self._signals(), contextlib.ExitStack() as stack:
            self._lock = stack.enter_context(self.folder.lock("supervisor"))
            try:
                while not (self._signal or self._done):
                    self._look_down(stack)
                    self._start_due()
                    self._wait()
                    self._end_the_hung()
                    self._reap()
                    self._converse()
                    self._refuse_hopeless()
            finally:
                self._shut_down()
        return self._signal

    def _look_down(self, stack: contextlib.ExitStack) -> None:
        """Once a second: logs that have grown long, and the lock, which somebody may have removed with its folder."""
        now = time.monotonic()
        if now - self._looked_down < HELLO_SECONDS:
            return
        self._looked_down = now
        for child in self._children():
            child.rotate_log()
        if self._lock and not os.fstat(self._lock.fileno()).st_nlink:
            self.notice(f"the state folder {self.folder.path} was removed; it is made again")
            self.folder.create()
            self._lock = stack.enter_context(self.folder.lock("supervisor"))

    def stop(self) -> None:
        """End `run`, from any thread."""
        self._done = True
        self._bell.send(b"!")

    def _children(self) -> list[Child]:
        workers = [child for stage in STAGES for child in self._workers[stage]]
        return [self._orchestrator, self._forks.child, self._describer, *workers]

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def remember(number: int, frame: FrameType | None) -> None:
            self._signal = number

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, remember)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)
        yield
        signal.set_wakeup_fd(-1)

    def _start_due(self) -> None:
        now = time.monotonic()
        self._forks.listen()
        self._forks.child.proven |= self._forks.ready
        for child in self._children():
            if child.state == "waiting" and child.wanted and now >= child.start_at:
                if child.forked and self._forks.starting:
                    continue  # it is there sooner than a process that imports everything by itself
                child.start(self._spawn)
                log.info("started %s, process %d", child.name, child.process.pid if child.process else 0)
        self._forks.keep_twin()
        for child, kill_at in self._leaving:
            if now >= kill_at:
                child.kill()

    def _spawn(self, child: Child) -> Process | None:
        """By the fork server, which is itself followed by its twin; None: it has to start anew."""
        if child is self._forks.child:
            return self._forks.succeed()
        return self._forks.spawn(child) if child.forked else None

    def _wait(self) -> None:
        """Until a signal, a child's end, a message, or the next thing that is due."""
        held = self._forks.starting
        due = [c.start_at for c in self._children() if c.state == "waiting" and c.wanted and not (c.forked and held)]
        due += [at for _, at in self._leaving]
        due += [child.stopped + STOPPED_SECONDS for child in self._children() if child.stopped]
        left = min([HELLO_SECONDS, *(max(0.0, at - time.monotonic()) for at in due)])
        poller = zmq.Poller()
        poller.register(self._wake, zmq.POLLIN)
        if self._link is not None:
            poller.register(self._link, zmq.POLLIN)
        if self._forks.link is not None and not self._forks.ready:
            poller.register(self._forks.link, zmq.POLLIN)
        poller.poll(int(left * 1000) + 1)
        with contextlib.suppress(BlockingIOError):
            self._wake.recv(4096)

    def _end_the_hung(self) -> None:
        """What stands still is replaced; what it had in hand goes on elsewhere."""
        now = time.monotonic()
        if now - self._looked > DEAF_SECONDS / 2 and self._answered:
            self._answered = now  # it was this process that stood still
        self._looked = now
        for child in self._children():
            since = child.notice_stop()
            if since is not None and now - since >= STOPPED_SECONDS:
                child.put_down("it was stopped by a signal, and stood still")
                self._stopped.append(child.process.pid if child.process else 0)
        if self._answered and now - self._answered > DEAF_SECONDS and self._orchestrator.state == "running":
            self._orchestrator.put_down(f"it gave no answer for {DEAF_SECONDS:g} s")

    def _reap(self) -> None:
        gone = [child for child, _ in self._leaving]
        for child in [*self._children(), *gone]:
            asked = child.state == "stopping"
            pid = child.reap()
            if pid is None:
                continue
            self._dead.append(pid)
            if not asked:
                log.warning("%s, process %d, ended: %s", child.name, pid, child.reason)
                again = f"starting it again in {child.backoff():g} s" if child.wanted else "it stays down"
                if child.exit_code != UNUSABLE or child.reason != self._noticed.get(child.name):
                    self.notice(f"{child.name} ended ({child.reason}); {again}")
                self._noticed[child.name] = child.reason
            if child is self._orchestrator:
                self._said_hello = self._answered = 0.0
            elif child is self._forks.child:
                self._forks.lost()
        self._leaving = [(child, at) for child, at in self._leaving if child.process is not None]

    def _refuse_hopeless(self) -> None:
        """Raise why a stage can never start, where the settings don't work from the start.

        The describer is heard first: it says what is wrong with a model better than a worker that fails to load it.
        """
        groups = [[self._orchestrator], [self._describer]]
        if self._describer.ever_proven:
            groups += self._workers.values()
        for group in groups:
            needed = group[0] in (self._orchestrator, self._describer) if group else False
            hopeless = [child for child in group if not child.wanted and (needed or not child.ever_proven)]
            if hopeless and len(hopeless) == len(group):
                raise self._why(hopeless[0])

    def _why(self, child: Child) -> TriptychError:
        """What keeps a process from ever working, as an error for a person."""
        if child.exit_code in BY_EXIT_CODE:
            return BY_EXIT_CODE[child.exit_code](last_line(child))
        reason = f"{child.name} can't start: {last_line(child)}"
        hint = "Is there enough memory for it?" if child.exit_code < 0 else ""
        return TriptychError(reason.rstrip(".") + ".", hint)

    def _shut_down(self) -> None:
        """Workers first, so that they hand back what they have; the orchestrator commits and goes last."""
        self.notice("stopping")
        deadline = time.monotonic() + GRACE_SECONDS
        workers = [child for stage in STAGES for child in self._workers[stage]] + [child for child, _ in self._leaving]
        for group in ([*workers, self._describer], [self._orchestrator, self._forks.child]):
            for child in group:
                child.terminate()
            for child in group:
                if child.process is not None:
                    with contextlib.suppress(Exception):
                        child.process.wait(max(0.1, deadline - time.monotonic()))
                child.kill()
            for child in group:
                if child.process is not None:
                    child.process.wait()
        self._forks.close()
        if self._link is not None:
            self._link.close(linger=0)
        self._context.term()
        self.folder.withdraw()
        os.close(self._life)
        os.close(self._lifeline)

    # -- children -------------------------------------------------------------------------------

    def _orchestrator_child(self) -> Child:
        config = self.config
        keep = {stage: seconds for stage in STAGES if (seconds := config.stage(stage).keep_alive) is not None}
        settings = OrchestratorSettings(
            queue_limit=config.queue_limit, queue_bytes=config.queue_bytes, disk_floor=config.disk_floor,
            embedding_cache=config.embedding_cache, keep_pictures=config.keep_pictures, keep_jobs=config.keep_jobs,
            patience=config.patience, fixed=self.arrangement.fixed(), step_seconds=config.step_timeout,
            client_jobs=config.client_jobs, client_rate=config.client_rate, keep=config.keep, listen=config.listen,
            listen_workers=config.listen_workers, keep_alive=keep, gpus=self.arrangement.accounts, describer=True,
        )  # fmt: skip
        arguments = [
            "-m", "orchestrator.cli", "_orchestrate", "--state", str(self.folder.path),
            "--clients", self._endpoints.clients, "--workers", self._endpoints.workers,
            "--settings", settings.model_dump_json(),
        ]  # fmt: skip
        return Child("orchestrator", None, arguments, self.folder.log("orchestrator"), self._lifeline)

    def _describer_child(self) -> Child:
        config = self.config
        stages = [stage for stage in STAGES if any(post.stage == stage for post in self.arrangement.posts)]
        arguments = [
            "-m", "orchestrator.cli", "_describe", "--connect", self._endpoints.workers, "--model", config.model,
            "--dtype", self._dtype, "--stages", ",".join(stages),
        ]  # fmt: skip
        if config.revision is not None:
            arguments += ["--revision", config.revision]
        for speedup in self.arrangement.speedups:
            arguments += ["--speedup", speedup]
        return Child(
            "describer", None, arguments, self.folder.log("describer"), self._lifeline, forked=True, essential=True
        )

    def _worker_child(self, post: Post, number: int) -> Child:
        name = f"{post.stage}-{number}"
        arguments = [
            "-m", "orchestrator.cli", "worker", post.stage, "--connect", self._endpoints.workers, "--name", name,
            "--model", self.config.model, "--dtype", self._dtype, "--turns", str(self.folder.turns),
            *where(post),
        ]  # fmt: skip
        if post.stage == "denoise":
            pause = self.config.checkpoint
            arguments += ["--checkpoint", "off" if pause is None or not self.config.keep else f"{pause:g}"]
        if self.config.revision is not None:
            arguments += ["--revision", self.config.revision]
        for speedup in self.arrangement.speedups:
            arguments += ["--speedup", speedup]
        return Child(name, post.stage, arguments, self.folder.log(name), self._lifeline, forked=True)

    def _scale(self, stage: Stage, count: int) -> None:
        children = self._workers[stage]
        self.notice(f"{stage}: {len(children)} → {count} workers")
        while len(children) > count:
            self._dismiss(children.pop())
        taken = {child.name for child in children}
        free = (n for n in range(1, 1 << 20) if f"{stage}-{n}" not in taken)
        while len(children) < count:
            number = next(free)
            children.append(self._worker_child(self.arrangement.post(stage, number - 1), number))

    def _dismiss(self, child: Child) -> None:
        child.terminate()
        if child.process is not None:
            self._leaving.append((child, time.monotonic() + GRACE_SECONDS))

    def _restart(self, name: str) -> None:
        for child in self._children():
            if child.stage and child.name == name:
                self.notice(f"restarting {name}")
                child.wanted, child.failures, child.start_at = True, 0, 0.0
                self._dismiss(child)

    # -- the orchestrator -----------------------------------------------------------------------

    def _converse(self) -> None:
        """Tell what runs, and do what the orchestrator passes on from clients."""
        now = time.monotonic()
        if self._dead or now - self._said_hello >= HELLO_SECONDS:
            self._said_hello = now
            if self._link is None:
                self._link = dealer(self._context, self._endpoints.workers, new_identity())
            views = tuple((self._forks if child is self._forks.child else child).view() for child in self._children())
            dead, stopped = tuple(self._dead), tuple(pid for pid in self._stopped if pid in self._dead)
            told = Processes(processes=views, exited_pids=dead, stopped_pids=stopped)
            if self._say(SupervisorHello(pid=os.getpid())) and self._say(told):
                self._stopped = [pid for pid in self._stopped if pid not in dead]
                self._dead.clear()
        while self._link is not None:
            try:
                message = wire.decode(receive(self._link), TO_SUPERVISOR).message
            except zmq.Again:
                return
            except TriptychError as error:
                log.error("the orchestrator sent something else: %s", error)
                continue
            match message:
                case SetScale(stage=stage, count=count):
                    self._scale(stage, count)
                case RestartProcess(name=name):
                    self._restart(name)
                case KillProcess(pid=pid, reason=reason):
                    for child in self._children():
                        if child.process is not None and child.process.pid == pid:
                            child.put_down(reason)
                case Beat(proven=pids):
                    self._answered = now
                    self._orchestrator.proven = self._orchestrator.ever_proven = True
                    self._noticed.clear()
                    for child in self._children():
                        if child.process is not None and child.process.pid in pids:
                            child.proven = child.ever_proven = True

    def _say(self, message: Message) -> bool:
        assert self._link is not None
        try:
            send(self._link, wire.encode(message))
        except zmq.ZMQError as error:
            if error.errno != errno.EAGAIN:
                raise
            return False
        return True


def raise_file_limit() -> None:
    """Let this process and its children have as many files and sockets open as the system allows them."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def where(post: Post) -> list[str]:
    """A worker's options that say where it works."""
    options = ["--device", post.device]
    if post.gpus and post.device == "cuda":
        options += ["--gpus", ",".join(map(str, post.gpus))]
    if post.leased:
        options += ["--lease-gpus", ",".join(map(str, post.gpus))]
    if post.memory:
        options += ["--max-memory", ",".join(f"{amount}B" for amount in post.memory)]
    if post.workspace:
        options += ["--workspace", f"{post.workspace}B"]
    if post.cut:
        options += ["--cut", ",".join(map(str, post.cut))]
    return [*options, "--jobs", str(post.jobs)] if post.jobs > 1 else options


def last_line(child: Child) -> str:
    return child.reason.partition(": ")[2].removeprefix("Error: ") or child.reason


def stack_dtype(config: StackConfig, gpus: bool) -> str:
    """One dtype for all stages, since what passes between them carries it: bfloat16 if any computes on a GPU."""
    if config.dtype != "auto":
        return config.dtype
    devices = [config.stage(stage).device for stage in STAGES]
    on_gpu = any(d.startswith("cuda") or (d == "auto" and gpus) for d in devices)
    on_mps = any(d == "mps" or (d == "auto" and sys.platform == "darwin") for d in devices)
    return "bfloat16" if on_gpu or on_mps else "float32"
