"""What clients ask, and the answers."""

import logging
import os
import time

from orchestrator.engine import Engine
from orchestrator.version import VERSION
from protocol.errors import BadRequest, NotFound, QueueFull, TriptychError
from protocol.jobs import ProcessView, Stage
from protocol.messages import (
    Cancel,
    Done,
    Error,
    FetchPictures,
    GetJobs,
    GetStack,
    GetWorkers,
    Jobs,
    Message,
    Pictures,
    Question,
    Restart,
    RestartStage,
    Retry,
    Scale,
    SetScale,
    Stack,
    Submit,
    Watch,
    Workers,
)

log = logging.getLogger(__name__)

MAX_PARKED = 1000  # submissions that may wait for the first worker to say what the model is


class Desk:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.supervisor: bytes | None = None  # identity at the workers' socket
        self.processes: tuple[ProcessView, ...] = ()
        self._parked: dict[tuple[bytes, int], Submit] = {}  # by client and question
        self._started = time.time()

    def answer(self, client: bytes, question: Message) -> None:
        """Put the answer, or the reason why there is none, into the outbox."""
        assert isinstance(question, Question)
        try:
            self._answer(client, question)
        except TriptychError as error:
            self._reply(
                client, Error(request=question.request, code=error.code, message=error.message, hint=error.hint)
            )

    def unpark(self) -> None:
        """The model is known now: take the submissions that waited for it."""
        parked, self._parked = self._parked, {}
        for (client, _), submit in parked.items():
            self.answer(client, submit)

    def _reply(self, client: bytes, message: Message) -> None:
        self.engine.outbox.to_client(client, message)

    def _answer(self, client: bytes, question: Question) -> None:
        engine, number = self.engine, question.request
        match question:
            case Submit():
                self._submit(client, question)
            case Watch(jobs=ids):
                jobs = [engine.known(job_id) for job_id in ids]
                self._watch(client, [job.id for job in jobs if not job.ended])
                self._reply(client, Jobs(request=number, jobs=tuple(job.view() for job in jobs)))
                for job in jobs:
                    self._reply(client, engine.event(job))
            case GetJobs(jobs=ids, states=states, limit=limit):
                found = (engine.known(job_id) for job_id in ids) if ids else engine.store.newest(states, limit)
                live = (engine.jobs.get(job.id, job) for job in found)
                self._reply(client, Jobs(request=number, jobs=tuple(job.view() for job in live)))
            case FetchPictures(job=job_id):
                self._pictures(client, number, job_id)
            case Cancel(jobs=ids):
                for job in [engine.known(job_id) for job_id in ids]:
                    if not job.ended:
                        engine.cancel(job)
                self._reply(client, Jobs(request=number, jobs=tuple(engine.known(i).view() for i in ids)))
            case Retry(jobs=ids):
                jobs = [engine.retry(job) for job in [engine.known(job_id) for job_id in ids]]
                self._reply(client, Jobs(request=number, jobs=tuple(job.view() for job in jobs)))
            case GetWorkers():
                views = tuple(worker.view() for worker in engine.fleet)
                self._reply(client, Workers(request=number, workers=views, processes=self.processes))
            case GetStack():
                self._reply(client, self._stack(number))
            case Restart(stage=stage):
                self._tell_supervisor(RestartStage(stage=stage), stage)
                self._reply(client, Done(request=number))
            case Scale(stage=stage, count=count):
                self._tell_supervisor(SetScale(stage=stage, count=count), stage)
                self._reply(client, Done(request=number))
            case _:
                raise BadRequest(f"A message of kind {question.kind!r} is not a question.")

    def _submit(self, client: bytes, submit: Submit) -> None:
        if self.engine.model is None:
            if len(self._parked) >= MAX_PARKED:
                raise QueueFull("Too many submissions wait for the first worker to load the model.", "Try again later.")
            self._parked[client, submit.request] = submit
            return
        jobs = self.engine.accept(submit.jobs)
        self._reply(client, Jobs(request=submit.request, jobs=tuple(job.view() for job in jobs)))
        if submit.watch:
            self._watch(client, [job.id for job in jobs if not job.ended])
            for job in jobs:
                self._reply(client, self.engine.event(job))

    def _watch(self, client: bytes, ids: list[str]) -> None:
        for job_id in ids:
            self.engine.watchers.add(client, job_id)

    def _pictures(self, client: bytes, number: int, job_id: str) -> None:
        job = self.engine.known(job_id)
        tensors = self.engine.store.get("pictures", job_id) if job.pictures else None
        if tensors is None:
            reason = (
                f"Job {job_id} is {job.state}." if job.state != "done" else f"The pictures of job {job_id} are gone."
            )
            hint = "Wait for it." if not job.ended else "Submit it again with the same seed for the same picture."
            raise NotFound(reason, hint)
        self.engine.outbox.to_client(client, Pictures(request=number, job=job.view()), tensors)

    def _stack(self, number: int) -> Stack:
        engine = self.engine
        counts = tuple((state, count) for state, count in engine.counts.items() if count)
        return Stack(
            request=number, version=VERSION, pid=os.getpid(), started=self._started, model=engine.model, counts=counts,
            speedups=engine.speedups,
            queue_limit=engine.limits.queue,
        )  # fmt: skip

    def _tell_supervisor(self, message: RestartStage | SetScale, stage: Stage) -> None:
        if self.supervisor is None:
            raise NotFound(
                "This stack runs without a supervisor.",
                f"Start workers by hand: triptych worker {stage} --connect ENDPOINT.",
            )
        self.engine.outbox.to_worker(self.supervisor, message)
