"""The agent of another host of a stack's: keeps the workers there that the stack wants, and tells of them.

As the supervisor of that host it starts them from a fork server, starts them again when they have ended, and ends with
them. What is to run the orchestrator says, whenever it changes and after each hello; the agent makes it so. The workers
themselves speak with the orchestrator, over links of their own with the same key.
"""

import contextlib
import json
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import psutil
import zmq

from orchestrator.gpu_driver import list_gpus, used_bytes
from orchestrator.log_files import LogTail
from orchestrator.planning.hardware import free_memory
from orchestrator.state_folder import StackFolder
from orchestrator.supervisor.child import UNUSABLE, Child
from orchestrator.supervisor.fork_server import new_fork_server
from orchestrator.supervisor.host_link import HostLink
from orchestrator.supervisor.process_keeper import Alarm, Lifeline, ProcessKeeper
from orchestrator.supervisor.supervisor import raise_file_limit
from orchestrator.supervisor.worker_specs import may_be_forked
from orchestrator.version import VERSION
from protocol.curve_keys import PeerKey
from protocol.errors import from_wire
from protocol.host import HostFacts, HostGpu, library_versions
from protocol.messages.common import Beat, Error, Message, Welcome
from protocol.messages.host import HostEnds, HostGoodbye, HostHello, HostLog, HostStatus, HostWorkers
from protocol.messages.supervisor import KillProcess, RestartProcess
from protocol.worker_spec import WorkerSpec

log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+@-]{0,400}")  # of a worker, and of its log
ENDED_WITH_STACK = 10  # exit code
STATUS_SECONDS = 1.0
LAST_LIFE_SECONDS = 15.0  # that processes of an agent that was killed may take to be gone
KNOCK_SECONDS = 0.2  # between two looks while nothing is known of the stack
LOGGED_AT_ONCE = 32_768  # bytes of a worker's log, each second


class HostAgent:
    """`folder` is its own on this host; `alone_seconds` may pass without the stack before its workers end.

    `notice` gets one line for a person whenever something happens that they may want to know.
    """

    def __init__(
        self,
        folder: StackFolder,
        key: PeerKey,
        key_file: Path,
        alone_seconds: float,
        notice: Callable[[str], None],
        ends_with_stack: bool = False,
    ) -> None:
        raise_file_limit()
        self._folder, self._key_file, self._notice = folder, key_file.resolve(), notice
        self._alone_seconds, self._ends_with_stack, self._done = alone_seconds, ends_with_stack, False
        self._wait_for_the_last_life()
        self._facts = facts_of_this_host()
        self._lifeline, self._alarm = Lifeline(), Alarm()
        forks = new_fork_server(folder, self._lifeline.read_end)
        forks.start_ahead()
        self._workers: dict[str, Child] = {}
        self._keeper = ProcessKeeper(forks, lambda: (forks.child, *self._workers.values()))
        self._link = HostLink(key)
        self._tails: dict[str, LogTail] = {}
        self._exited: list[int] = []  # process numbers that the orchestrator was not told of yet
        self._stopped: list[int] = []  # of them, those that stood still by a signal
        self._last_word = 0  # number of the last word about workers
        self._said: dict[str, str] = {}  # why workers ended last, by name: what lasts is said once
        self._told = 0.0  # monotonic seconds of the last status
        self._changed = False  # there is something to tell at once
        self._lock: TextIO | None = None
        self._after = folder.last_holder("supervisor")

    @property
    def _pids_file(self) -> Path:
        return self._folder.path / "agent.lock"

    def _wait_for_the_last_life(self) -> None:
        """Wait for processes of an agent that was killed, which end with it: they may hold GPU memory yet."""
        with contextlib.suppress(OSError, ValueError):
            pids, until = json.loads(self._pids_file.read_text()), time.monotonic() + LAST_LIFE_SECONDS
            while time.monotonic() < until and any(map(is_worker, pids)):
                time.sleep(KNOCK_SECONDS)

    def run(self) -> int:
        """Run until a signal, whose number it returns, or 0 at the stack's end. Raises why the stack refuses it."""
        with self._alarm.heed_signals(), contextlib.ExitStack() as stack:
            self._lock = stack.enter_context(self._folder.lock("supervisor"))
            try:
                while not (self._alarm.signal or self._done):
                    self._keeper.start_due(self._note_start)
                    self._wait()
                    self._hear()
                    self._stopped += self._keeper.put_down_stopped()
                    self._reap()
                    self._end_what_is_alone()
                    self._tell()
            finally:
                self._shut_down()
        return self._alarm.signal

    def _wait(self) -> None:
        left = STATUS_SECONDS / 2 if self._link.welcome else KNOCK_SECONDS
        if (due := self._keeper.next_due()) is not None:
            left = min(left, max(0.0, due - time.monotonic()))
        poller = zmq.Poller()
        poller.register(self._alarm.wake, zmq.POLLIN)
        poller.register(self._link.socket, zmq.POLLIN)
        forks = self._keeper.forks
        if forks.link is not None and not forks.ready:
            poller.register(forks.link, zmq.POLLIN)
        poller.poll(int(left * 1000) + 1)
        self._alarm.hush()

    # -- what the stack wants -------------------------------------------------------------------

    def _hear(self) -> None:
        if self._link.renew_if_silent():
            self._link.say(HostHello(facts=self._facts, pid=os.getpid(), after=self._after, pids=tuple(self._pids())))
        for message in self._link.hear():
            self._obey(message)

    def _obey(self, message: Message) -> None:
        match message:
            case Welcome():
                self._notice(f"the stack at {self._link.endpoint} knows this host")
            case HostWorkers(number=number, workers=specs):
                self._last_word = number
                self._keep({spec.name: self._here(spec) for spec in specs if NAME.fullmatch(spec.name)})
            case HostEnds():
                self._notice("the stack has ended")
                self._keep({})
                self._done = self._ends_with_stack
            case RestartProcess(name=name) if name in self._workers:
                self._notice(f"restarting {name}")
                self._keeper.restart(self._workers[name])
            case KillProcess(pid=pid, reason=reason):
                for child in self._workers.values():
                    if child.process is not None and child.process.pid == pid:
                        child.put_down(reason)
            case Beat(proven=pids):
                for child in self._workers.values():
                    if child.process is not None and child.process.pid in pids:
                        child.proven = child.ever_proven = True
                        self._said.pop(child.name, None)
            case Error(code="not_found"):
                self._link.begin_anew()
            case Error(code=code, message=reason, hint=hint):
                raise from_wire(code, reason, hint)

    def _here(self, spec: WorkerSpec) -> WorkerSpec:
        """Return a worker's spec with what this host alone knows: no path of another's is used."""
        return spec.model_copy(
            update={
                "endpoint": self._link.endpoint,
                "key": str(self._key_file),
                "cpu_lock": str(self._folder.cpu_lock),
                "loras": str(self._folder.loras.resolve()),
            }
        )

    def _keep(self, wanted: dict[str, WorkerSpec]) -> None:
        """Have these workers from now on, and no others; those that are as wanted go on undisturbed."""
        specs = {name: spec.model_dump_json() for name, spec in wanted.items()}
        for name, child in list(self._workers.items()):
            if child.spec != specs.get(name):
                del self._workers[name]
                self._tails.pop(name, None)
                self._keeper.dismiss(child)
        for name, spec in wanted.items():
            if name not in self._workers:
                self._workers[name] = self._child(name, spec)
                self._tails[name] = LogTail(self._folder.log(name))
        self._changed = True

    def _child(self, name: str, spec: WorkerSpec) -> Child:
        arguments, log_path = ["-m", "workers.runtime"], self._folder.log(name)
        forked = may_be_forked(spec)
        return Child(
            name, spec.stage, arguments, spec.model_dump_json(), log_path, self._lifeline.read_end, forked=forked
        )

    def _end_what_is_alone(self) -> None:
        """End all workers where the stack has said nothing for too long: it may be gone for good."""
        if self._workers and self._link.silent_for() > self._alone_seconds:
            self._notice(f"nothing was heard of the stack for {self._alone_seconds:g} s; the workers here end")
            self._keep({})

    # -- what is told ---------------------------------------------------------------------------

    def _note_start(self, child: Child) -> None:
        log.info("started %s, process %d", child.name, child.process.pid if child.process else 0)
        self._changed = True
        with contextlib.suppress(OSError):
            self._pids_file.write_text(json.dumps(list(self._pids())))

    def _reap(self) -> None:
        for child, pid, asked in self._keeper.reap():
            self._exited.append(pid)
            self._changed = True
            if asked:
                continue
            again = f"starting it again in {child.backoff():g} s" if child.wanted else "it stays down"
            if child.exit_code != UNUSABLE or child.reason != self._said.get(child.name):
                self._notice(f"{child.name} ended ({child.reason}); {again}")
            self._said[child.name] = child.reason

    def _tell(self) -> None:
        now = time.monotonic()
        if not self._link.welcome or not (self._changed or now - self._told >= STATUS_SECONDS):
            return
        exited = tuple(self._exited)
        status = HostStatus(
            processes=tuple(child.view() for child in self._workers.values()),
            exited_pids=exited,
            stopped_pids=tuple(pid for pid in self._stopped if pid in exited),
            used_bytes=tuple(used_bytes(gpu.index) or 0 for gpu in self._facts.gpus),
            heard=self._last_word,
        )
        if self._link.say(status):
            self._told, self._changed = now, False
            self._stopped = [pid for pid in self._stopped if pid not in exited]
            self._exited = self._exited[len(exited) :]
        for child in self._workers.values():
            child.rotate_log()
        for name, text in self._logged():
            self._link.say(HostLog(name=name, text=text))

    def _logged(self) -> Iterator[tuple[str, str]]:
        for name, tail in self._tails.items():
            if text := tail.more(LOGGED_AT_ONCE):
                yield name, text

    def _pids(self) -> Iterator[int]:
        for child in [*self._workers.values(), *(child for child, _ in self._keeper.leaving)]:
            if child.process is not None and child.process.poll() is None:
                yield child.process.pid

    def _shut_down(self) -> None:
        """End the workers, which hand back what they have, and say goodbye."""
        self._notice("stopping")
        leaving = [child for child, _ in self._keeper.leaving]
        self._keeper.end(([*self._workers.values(), *leaving], [self._keeper.forks.child]))
        self._link.say(HostGoodbye())
        self._keeper.forks.close()
        self._link.close()
        self._lifeline.close()
        self._alarm.close()


def is_worker(pid: object) -> bool:
    """Return whether a number is that of a process of Triptych's workers now."""
    try:
        return isinstance(pid, int) and any("workers.runtime" in word for word in psutil.Process(pid).cmdline())
    except psutil.Error:
        return False


def facts_of_this_host() -> HostFacts:
    gpus = [
        HostGpu(index=gpu.index, name=gpu.name, total_bytes=gpu.total_bytes, free_bytes=gpu.free_bytes, link=gpu.link)
        for gpu in list_gpus()
    ]
    return HostFacts(
        hostname=socket.gethostname(),
        version=VERSION,
        versions=library_versions(),
        memory_bytes=free_memory(),
        cores=os.cpu_count() or 1,
        gpus=tuple(gpus),
    )
