"""Starts the orchestrator and the workers, keeps them running, and stops them all.

Signals and deaths of children wake one loop. Children hold the read end of a pipe whose only writer is this process,
so they end with it even if it is killed.
"""

import contextlib
import logging
import os
import queue
import resource
import threading
import time
from collections.abc import Callable
from typing import TextIO

import zmq

from orchestrator.gpu_driver import list_gpus
from orchestrator.planning.calibration import measurements_in
from orchestrator.planning.stack_plan import PlannedModel, plan_models, plan_stack
from orchestrator.settings import StackConfig
from orchestrator.state_folder import StackFolder
from orchestrator.supervisor.child import UNUSABLE, Child
from orchestrator.supervisor.children import Children, settings_of
from orchestrator.supervisor.fork_server import new_fork_server
from orchestrator.supervisor.host_plans import HostPlans
from orchestrator.supervisor.http_process import HttpSocket
from orchestrator.supervisor.orchestrator_link import HELLO_SECONDS, OrchestratorLink
from orchestrator.supervisor.process_keeper import Alarm, Lifeline
from orchestrator.supervisor.ray_process import ready_for_ray
from protocol.errors import BadRequest, Conflict, TriptychError
from protocol.messages.common import Beat, Message
from protocol.messages.supervisor import (
    AddModel,
    EndHosts,
    HostJoined,
    KillProcess,
    ModelAdded,
    RemoveModel,
    RestartProcess,
    SetScale,
    WakeModel,
)
from protocol.model_spec import ModelSpec

log = logging.getLogger(__name__)
log.addHandler(logging.NullHandler())  # a person hears of what matters by notices

KNOCK_SECONDS = 0.1  # between two tries to reach an orchestrator that only comes up
DEAF_SECONDS = 10.0  # that the orchestrator may leave the supervisor without an answer
MOST_SAID = 1000  # characters of a reason
Notice = Callable[[str], None]


class Supervisor:
    """`notice` gets one line for a person whenever something happens that they may want to know."""

    def __init__(self, folder: StackFolder, config: StackConfig, notice: Notice) -> None:
        """Plan the stack: BadRequest, ModelMissing or DoesNotFit where it can't work."""
        self.folder, self.config, self.notice = folder, config, notice
        raise_file_limit()
        if not config.http and (config.http_certificate or config.http_private_key):
            raise BadRequest("A certificate is for HTTP, which is not to be served.", "Give --http HOST:PORT, too.")
        listening = HttpSocket(config) if config.http else None
        if config.ray:
            config = self.config = ready_for_ray(config, folder)
        self.http_url = listening.url if listening else ""
        self._lifeline = Lifeline()
        forks = new_fork_server(folder, self._lifeline.read_end)
        forks.start_ahead()
        try:
            self.models = plan_models(config, list_gpus(), measurements_in(folder))
        except BaseException:
            forks.end()
            self._lifeline.close()
            raise
        self._alarm = Alarm()
        self._done = False  # what it was for is done
        self._children = Children(folder, config, self.models, self._lifeline.read_end, forks, listening)
        self._keeper = self._children.keeper
        self._link = OrchestratorLink(self._children.endpoint)
        children = self._children
        self._hosts = HostPlans(
            folder, lambda: children.models, children.is_awake, children.prefix_of, self._alarm.ring
        )
        self._lock: TextIO | None = None
        self._coming: set[str] = set()  # names of models that are being planned for
        self._planned: queue.SimpleQueue[tuple[str, PlannedModel | TriptychError]] = queue.SimpleQueue()
        self._looked_down = 0.0  # monotonic seconds of the last look at the folder
        self._looked = 0.0  # monotonic seconds of the last look at what hangs
        self._answered = 0.0  # monotonic seconds of the orchestrator's last answer; 0: it has given none yet
        self._noticed: dict[str, str] = {}  # why children ended last, by name: what lasts is said once

    def run(self) -> int:
        """Run until a signal, whose number it returns, or `stop()`: 0. Raises what keeps a stage from ever starting."""
        with self._alarm.heed_signals(), contextlib.ExitStack() as stack:
            self._lock = stack.enter_context(self.folder.lock("supervisor"))
            try:
                while not (self._alarm.signal or self._done):
                    self._look_down(stack)
                    self._keeper.start_due(self._log_start)
                    self._wait()
                    self._end_the_hung()
                    self._reap()
                    self._converse()
                    self._take_planned()
                    self._refuse_hopeless()
            finally:
                self._shut_down()
        return self._alarm.signal

    def stop(self) -> None:
        """End `run`, from any thread."""
        self._done = True
        self._alarm.ring()

    def _look_down(self, stack: contextlib.ExitStack) -> None:
        """Look once a second at logs that have grown long, and at the lock, which may be removed with its folder."""
        now = time.monotonic()
        if now - self._looked_down < HELLO_SECONDS:
            return
        self._looked_down = now
        for child in self._children:
            child.rotate_log()
        if self._lock and not os.fstat(self._lock.fileno()).st_nlink:
            self.notice(f"the state folder {self.folder.path} was removed; it is made again")
            self.folder.create()
            self._lock = stack.enter_context(self.folder.lock("supervisor"))

    @staticmethod
    def _log_start(child: Child) -> None:
        log.info("started %s, process %d", child.name, child.process.pid if child.process else 0)

    def _wait(self) -> None:
        """Wait for a signal, a child's end, a message, or the next thing that is due."""
        left = HELLO_SECONDS if self._answered else KNOCK_SECONDS
        if (next_due := self._keeper.next_due()) is not None:
            left = min(left, max(0.0, next_due - time.monotonic()))
        poller = zmq.Poller()
        poller.register(self._alarm.wake, zmq.POLLIN)
        if self._link.socket is not None:
            poller.register(self._link.socket, zmq.POLLIN)
        forks = self._children.forks
        if forks.link is not None and not forks.ready:
            poller.register(forks.link, zmq.POLLIN)
        poller.poll(int(left * 1000) + 1)
        self._alarm.hush()

    # -- what hangs, and what has ended ---------------------------------------------------------

    def _end_the_hung(self) -> None:
        """Kill processes that stand still, to be replaced; their tasks go on elsewhere."""
        now, orchestrator = time.monotonic(), self._children.orchestrator
        if now - self._looked > DEAF_SECONDS / 2 and self._answered:
            self._answered = now  # it was this process that stood still
        self._looked = now
        self._children.pulse.still_for()
        if self._children.http:
            self._children.http.look()
        if self._children.ray:
            self._children.ray.look()
        for pid in self._keeper.put_down_stopped():
            self._link.stopped(pid)
        deaf = self._answered and now - self._answered > DEAF_SECONDS and orchestrator.state == "running"
        if deaf and self._children.pulse.still_for() > DEAF_SECONDS:  # else it is busy, and comes to us in time
            orchestrator.put_down(f"it gave no answer for {DEAF_SECONDS:g} s")

    def _reap(self) -> None:
        for child, pid, asked in self._keeper.reap():
            self._link.ended(pid)
            if not asked:
                self._tell_of_end(child, pid)
            if child is self._children.orchestrator:
                self._link.hello_again()
                self._answered = 0.0

    def _tell_of_end(self, child: Child, pid: int) -> None:
        log.warning("%s, process %d, ended: %s", child.name, pid, child.reason)
        again = f"starting it again in {child.backoff():g} s" if child.wanted else "it stays down"
        if child.exit_code != UNUSABLE or child.reason != self._noticed.get(child.name):
            self.notice(f"{child.name} ended ({child.reason}); {again}")
        self._noticed[child.name] = child.reason

    def _refuse_hopeless(self) -> None:
        """Raise why a stage can never start, where the settings don't work from the start.

        The describer is heard first: it says what is wrong with a model better than a worker that fails to load it.
        """
        children = self._children
        needed = [children.orchestrator, *children.doors, *children.describers]
        needed += [children.http.child] if children.http else []
        needed += [children.ray.child] if children.ray else []
        sound = {describer.model for describer in children.describers if describer.ever_proven}
        groups = [[child] for child in needed]
        groups += [team for (model, _), team in children.workers.items() if model in sound]
        for group in groups:
            hopeless = [child for child in group if not child.wanted and (child in needed or not child.ever_proven)]
            if not hopeless or len(hopeless) < len(group):
                continue
            child = hopeless[0]
            if child in children.describers and child.model != children.default and children.default in children.worked:
                self._say_no(child.model, why(child), lost=True)
                self.notice(f"{child.model} is removed: {child.reason}")
                children.remove(child.model)
                return
            if child in needed or (child.model == children.default and child.model not in children.worked):
                raise why(child)
            self.notice(f"{child.model} can't be run: {child.reason}")
            children.rest(child.model, str(why(child)))

    def _converse(self) -> None:
        """Tell what runs, and do what the orchestrator wants done."""
        self._link.tell(self._children.views(), self._children.resting)
        for message in self._link.hear():
            self._obey(message)
            self._link.tell(self._children.views(), self._children.resting)  # where that has changed which models rest
        for answer in self._hosts.answers():
            if answer.reason:
                self.notice(f"the host {answer.host} is refused: {answer.reason}")
            self._link.say(answer)

    def _obey(self, message: Message) -> None:
        match message:
            case SetScale(model=model, stage=stage, count=count) if self._children.knows(model):
                self.notice(f"{stage} of {model}: {count} workers from now on")
                self._children.scale(model, stage, count)
            case WakeModel(model=model, rest=True) if self._children.knows(model):
                if self._children.rest(model):
                    self.notice(f"{model} rests: its workers end until it is asked for")
            case WakeModel(model=model) if self._children.knows(model):
                if self._children.wake(model):
                    self.notice(f"{model} is asked for: its workers are started")
            case AddModel(model=model, spec=spec):
                self._add_model(model, spec)
            case RemoveModel(model=model) if self._children.knows(model) and model != self._children.default:
                self.notice(f"{model} is removed")
                self._children.remove(model)
            case HostJoined(host=host, facts=facts):
                self._hosts.joined(host, facts)
            case RestartProcess(name=name):
                if self._children.restart(name):
                    self.notice(f"restarting {name}")
            case KillProcess(pid=pid, reason=reason):
                for child in self._children.of_process(pid):
                    child.put_down(reason)
            case Beat(proven=pids):
                self._answered = time.monotonic()
                self._children.orchestrator.proven = self._children.orchestrator.ever_proven = True
                self._noticed.clear()
                self._children.prove(pids)

    def _add_model(self, name: str, spec: ModelSpec) -> None:
        """Plan for a model beside the loop; one that is here already is said to be."""
        known = self._children.spec_of(name)
        if known == spec:
            model = next(model for model in self._children.models if model.name == name)
            self._link.say(ModelAdded(model=name, settings=settings_of(model).model_dump_json()))
        elif known is not None:
            self._say_no(name, Conflict(f"There is another model {name!r} in this stack.", "Give it another name."))
        elif name not in self._coming:
            self._coming.add(name)
            threading.Thread(target=self._plan_model, args=(name, spec), daemon=True, name="plan").start()

    def _plan_model(self, name: str, spec: ModelSpec) -> None:
        found: PlannedModel | TriptychError
        try:
            alone = self.config.beside(name, spec)
            found = PlannedModel(name, alone, plan_stack(alone, list_gpus(), measurements_in(self.folder)))
        except TriptychError as error:
            found = error
        except Exception as error:
            log.exception("%s can't be planned for", name)
            found = TriptychError(f"{name} can't be planned for: {error}")
        self._planned.put((name, found))
        self._alarm.ring()

    def _take_planned(self) -> None:
        """Take in the models that were planned for meanwhile."""
        while not self._planned.empty():
            name, found = self._planned.get()
            self._coming.discard(name)
            try:
                if isinstance(found, TriptychError):
                    raise found
                settings = self._children.add(found)
            except TriptychError as error:
                self._say_no(name, error)
            else:
                self.notice(f"{name} is added: {found.config.model}")
                self._link.say(ModelAdded(model=name, settings=settings.model_dump_json()))

    def _say_no(self, name: str, error: TriptychError, lost: bool = False) -> None:
        reason, hint = error.message[:MOST_SAID], error.hint[:MOST_SAID]
        self._link.say(ModelAdded(model=name, code=error.code, reason=reason, hint=hint, lost=lost))

    def _shut_down(self) -> None:
        """Stop workers first, so that they hand back what they have; the orchestrator commits and goes last."""
        self.notice("stopping")
        self._link.say(EndHosts())
        children = self._children
        workers = [child for team in children.workers.values() for child in team]
        leaving = [child for child, _ in self._keeper.leaving]
        http = [children.http.child] if children.http else []
        ray = [children.ray.child] if children.ray else []
        self._keeper.end(
            (
                [*ray, *http, *workers, *leaving, *children.describers],
                [children.orchestrator, *children.doors, children.forks.child],
            )
        )
        children.forks.close()
        children.pulse.close()
        if children.http:
            children.http.close()
        if children.ray:
            children.ray.close()
        self._link.close()
        self.folder.withdraw()
        self._lifeline.close()


def why(child: Child) -> TriptychError:
    """Return the error, for a person, that keeps a process from ever working."""
    if child.report and child.report.code != "crash":
        return child.report.error()
    reason = f"{child.name} can't start: {child.reason}"
    hint = "Is there enough memory for it?" if child.exit_code < 0 else ""
    return TriptychError(reason.rstrip(".") + ".", hint)


def raise_file_limit() -> None:
    """Let this process and its children have as many files and sockets open as the system allows them."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
