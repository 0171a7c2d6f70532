"""Clients' questions and the answers to them."""

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from orchestrator.dispatch.admission import NotLookedAt
from orchestrator.dispatch.describer_link import DescriberLinks
from orchestrator.dispatch.engine import Engine
from orchestrator.job import LiveJob
from orchestrator.principal import KeyHolder, LocalUser, Principal, job_id_of
from orchestrator.server.host_links import HOST, HostLinks
from orchestrator.server.housekeeping import MOST_FORGOTTEN
from orchestrator.server.lora_uploads import LoraUploads
from orchestrator.server.model_rests import ModelRests
from orchestrator.server.rolling_restarts import RollingRestarts
from orchestrator.server.supervisor_link import SupervisorLink
from orchestrator.settings import ModelSettings
from orchestrator.version import VERSION
from protocol import wire
from protocol.errors import BadRequest, Conflict, Forbidden, NotFound, QueueFull, StateUnusable, TriptychError
from protocol.lora import LORA_PART_BYTES
from protocol.messages.client import (
    FROM_CLIENT,
    AddModel,
    Cancel,
    Collected,
    CollectGarbage,
    Done,
    Drain,
    FetchPictures,
    GetHosts,
    GetJobs,
    GetLoras,
    GetMetrics,
    GetModels,
    GetPreview,
    GetStack,
    GetWorkers,
    Hosts,
    Jobs,
    LoadModel,
    LoraHere,
    Loras,
    Metrics,
    Models,
    OfferLora,
    Pictures,
    PlaceOnHost,
    Preview,
    PutLora,
    Question,
    RemoveModel,
    Restart,
    Retry,
    Scale,
    Stack,
    Submit,
    Watch,
    Workers,
)
from protocol.messages.common import Error, Message
from protocol.messages.supervisor import ModelAdded
from protocol.pictures import check_picture
from protocol.tensors import Buffer, Tensor
from protocol.views import GpuView, ModelView, WorkerView

log = logging.getLogger(__name__)

MAX_PARKED = 1000  # submissions that may wait for the describer
MOST_OF_A_KEY, PARKED_BYTES = 100, 64 << 20  # of one key's, and of the pictures beside them
MOST_WATCHED = 5000  # jobs by one connection of a key's


ADMINISTRATION = (
    GetMetrics, GetHosts, PlaceOnHost, Restart, Scale, Drain, CollectGarbage, LoadModel, AddModel, RemoveModel,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Peer:
    """A client: its socket's identity, and on whose behalf it asks."""

    identity: bytes
    principal: Principal

    @property
    def local(self) -> bool:
        return isinstance(self.principal, LocalUser)

    def may_see(self, job: LiveJob) -> bool:
        return self.local or job.owner == self.principal


def acting_for(owner: str, peer: Peer) -> Peer:
    """Return the peer as which a question is answered: this machine's user may ask on behalf of a key; Forbidden."""
    if not owner:
        return peer
    if not peer.local:
        raise Forbidden("A client's key acts for nobody else.", "Ask with the key of whoever it is for.")
    return Peer(peer.identity, KeyHolder(owner))


def error_message(error: TriptychError, request: int = 0) -> Error:
    """An error as it travels."""
    return Error(request=request, code=error.code, message=error.message, hint=error.hint, item=error.item)


class ClientRequests:
    def __init__(
        self,
        engine: Engine,
        describers: DescriberLinks,
        supervisor: SupervisorLink,
        hosts: HostLinks,
        restarts: RollingRestarts,
        uploads: LoraUploads,
        rests: ModelRests,
    ) -> None:
        self.engine, self._describers, self._supervisor = engine, describers, supervisor
        self._uploads, self._rests, self._hosts, self._restarts = uploads, rests, hosts, restarts
        # By client and question, until they can be judged.
        self._parked: dict[tuple[Peer, int], tuple[Submit | GetLoras, tuple[Tensor, ...], float]] = {}
        self._adding: dict[str, set[tuple[Peer, int]]] = {}  # by the names of models that are being added
        self._started = time.time()

    def handle(self, client: bytes, principal: Principal, frames: list[Buffer]) -> None:
        """Answer what a client has sent; whatever it is, the others go on."""
        try:
            envelope = wire.decode(frames, FROM_CLIENT)
            self.answer(Peer(client, principal), envelope.message, envelope.tensors)
        except StateUnusable:
            raise
        except TriptychError as error:
            self._reply(client, error_message(error, wire.number_in(frames)))
        except Exception:
            log.exception("a client's question could not be answered")
            failed = Error(
                request=wire.number_in(frames), code="error", message="The orchestrator failed at this question."
            )
            self._reply(client, failed)

    def refuse(self, client: bytes, frames: list[Buffer]) -> None:
        """Say of a question that it is let go, since too many of its key's wait."""
        with contextlib.suppress(TriptychError):
            question = wire.decode(frames, FROM_CLIENT).message
            error = QueueFull(
                "Too many questions of this key's wait to be answered.", "Ask again later, and less often."
            )
            self._reply(client, error_message(error, getattr(question, "request", 0)))

    def answer(self, peer: Peer, question: Message, tensors: tuple[Tensor, ...] = ()) -> None:
        """Put the answer, or the reason why there is none, into the outbox."""
        assert isinstance(question, Question)
        with self._told(peer, question):
            peer = acting_for(question.owner, peer)
            if isinstance(question, Submit):
                for tensor in tensors:
                    check_picture(tensor)
                self._submit(peer, question, tensors)
            elif isinstance(question, PutLora):
                self._put_lora(peer, question, tensors)
            elif isinstance(question, GetLoras):
                self._list_loras(peer, question)
            else:
                self._answer(peer, question)

    @contextlib.contextmanager
    def _told(self, peer: Peer, question: Question) -> Iterator[None]:
        """Answer a question with the reason why it can't be answered."""
        try:
            yield
        except StateUnusable:
            raise
        except TriptychError as error:
            self._reply(peer.identity, error_message(error, question.request))

    def unpark(self) -> None:
        """Take the submissions that waited for more to be known of the model or of prompts, if they can be judged."""
        self._tell_added()
        parked, self._parked = self._parked, {}
        for (peer, _), (question, tensors, since) in parked.items():
            with self._told(peer, question):
                if isinstance(question, Submit):
                    self._submit(peer, question, tensors, since)
                else:
                    self._list_loras(peer, question)

    def forget(self, client: bytes) -> None:
        """Let go of the submissions of a client that is gone."""
        for key in [key for key in self._parked if key[0].identity == client]:
            del self._parked[key]

    def _reply(self, client: bytes, message: Message) -> None:
        self.engine.outbox.to_client(client, message)

    def _answer(self, peer: Peer, question: Question) -> None:
        engine, number, client = self.engine, question.request, peer.identity
        if isinstance(question, ADMINISTRATION) and not peer.local:
            raise Forbidden(f"A client's key is not for {question.kind!r}.", "Do it on the stack's own host.")
        match question:
            case Watch(jobs=ids):
                jobs = [self._own(peer, job_id) for job_id in ids]
                self._watch(peer, [job for job in jobs if not job.ended])
                self._reply(client, Jobs(request=number, jobs=tuple(job.view(peer.principal) for job in jobs)))
                for job in jobs:
                    self._reply(client, engine.event(job, job.id_for(peer.principal)))
            case GetJobs(jobs=ids, states=states, limit=limit, before=before):
                newest = engine.store.newest(states, limit, None if peer.local else peer.principal, before)
                found = (self._own(peer, i) for i in ids) if ids else newest
                live = (engine.job_queue.jobs.get(job.id, job) for job in found)
                self._reply(client, Jobs(request=number, jobs=tuple(job.view(peer.principal) for job in live)))
            case FetchPictures(job=job_id, part=part):
                self._pictures(peer, number, self._own(peer, job_id), part)
            case GetPreview(job=job_id):
                self._reply(client, self._preview(number, self._own(peer, job_id)))
            case Cancel(jobs=ids):
                jobs = [self._own(peer, job_id) for job_id in ids]
                for job in jobs:
                    if not job.ended:
                        engine.cancel(job)
                now = (engine.job_queue.known(job.id) for job in jobs)
                self._reply(client, Jobs(request=number, jobs=tuple(job.view(peer.principal) for job in now)))
            case Retry(jobs=ids):
                asked = [(self._own(peer, job_id), job_id) for job_id in ids]
                jobs = [engine.retry(job, job_id) for job, job_id in asked]
                self._reply(client, Jobs(request=number, jobs=tuple(job.view(peer.principal) for job in jobs)))
            case GetWorkers():
                views = tuple(self._seen_by(peer, worker.view()) for worker in engine.fleet)
                drained = tuple(sorted(engine.drained))
                processes = (*self._supervisor.processes, *self._hosts.processes) if peer.local else ()
                self._reply(
                    client,
                    Workers(request=number, workers=views, processes=processes, drained=drained, gpus=self._gpus()),
                )
            case Drain(stage=stage, on=on):
                engine.drain(stage, on)
                self._reply(client, Done(request=number))
            case GetHosts():
                self._reply(client, Hosts(request=number, hosts=self._hosts.views()))
            case PlaceOnHost(host=host, placing=placing):
                self._hosts.place(host, placing)
                self._reply(client, Done(request=number))
            case CollectGarbage(older=older):
                self._reply(client, self._collect(number, older))
            case GetMetrics():
                self._reply(client, Metrics(request=number, metrics=engine.counters.metrics()))
            case GetStack():
                self._reply(client, self._stack(number))
            case OfferLora(digest=digest, bytes=size):
                here = self._uploads.offer(peer.principal, digest, size, self._needed_loras)
                self._reply(client, LoraHere(request=number, bytes=here))
            case Restart(stage=stage):
                self._supervisor.check(stage)
                self._restarts.stage(stage)
                self._reply(client, Done(request=number))
            case AddModel(model=name, spec=spec):
                self._supervisor.check()
                self._adding.setdefault(name, set()).add((peer, number))
                self._supervisor.add_model(name, spec)
            case RemoveModel(model=name):
                self._supervisor.check()
                self._remove_model(name)
                self._reply(client, Done(request=number))
            case GetModels():
                self._reply(client, Models(request=number, models=self._models(peer)))
            case LoadModel(model=model, load=load):
                self._supervisor.check()
                (self._rests.load if load else self._rests.unload)(engine.catalogue.name(model))
                self._reply(client, Done(request=number))
            case Scale(model=model, stage=stage, count=count):
                self._supervisor.check(stage)
                name = engine.catalogue.name(model)
                most = engine.catalogue.models[name].fixed.get(stage)
                if most is not None and count > most:
                    raise BadRequest(
                        f"The memory of {stage} workers is planned in advance, for {most} of them.",
                        f"Start the stack with --workers {stage}={count}, which plans for that.",
                    )
                self._supervisor.scale(name, stage, count)
                self._reply(client, Done(request=number))
            case _:
                raise BadRequest(f"A message of kind {question.kind!r} is not a question.")

    def _own(self, peer: Peer, job_id: str) -> LiveJob:
        """A job that the peer may see; to others it is as if there were none."""
        job_queue = self.engine.job_queue
        job = job_queue.find(job_id_of(peer.principal, job_id)) or job_queue.find(job_id)
        if job is None or not peer.may_see(job):
            raise NotFound(f"There is no job {job_id!r}.", "'triptych jobs' lists those that there are.")
        return job

    def _seen_by(self, peer: Peer, view: WorkerView) -> WorkerView:
        """Return a worker's view, without its job where that is another principal's."""
        job = self.engine.job_queue.jobs.get(view.job) if view.job else None
        if peer.local:
            return view
        return view.model_copy(update={"job": job.own_id if job and peer.may_see(job) else None})

    def _submit(self, peer: Peer, submit: Submit, tensors: tuple[Tensor, ...], since: float | None = None) -> None:
        """Accept or judge jobs, which have waited `since` then to be judged (None: they are new)."""
        since = time.monotonic() if since is None else since
        self._uploads.check(peer.principal, [lora for request in submit.jobs for lora in request.loras])
        if not self._describers.ready_for(submit.jobs, peer.principal, since):
            self._park(peer, submit, tensors, since)
            return
        try:
            self._judge_or_accept(peer, submit, {tensor.name: tensor for tensor in tensors})
        except NotLookedAt as missing:
            self._describers.look_at(missing.templates, peer.principal)
            self._park(peer, submit, tensors, since)

    def _list_loras(self, peer: Peer, question: GetLoras) -> None:
        if (link := self._describers.of(question.model)).list_loras(peer.principal):
            known = link.loras_listed
            self._reply(peer.identity, Loras(request=question.request, loras=known))
        else:
            self._park(peer, question, (), 0.0)

    def _put_lora(self, peer: Peer, question: PutLora, tensors: tuple[Tensor, ...]) -> None:
        if len(tensors) != 1 or tensors[0].dtype != "uint8" or tensors[0].nbytes > LORA_PART_BYTES:
            raise BadRequest(
                "A part of a LoRA is one tensor of bytes beside the question.", "Send it in smaller parts."
            )
        (part,) = tensors
        have = self._uploads.put(peer.principal, question.digest, question.offset, part.data)
        self._reply(peer.identity, LoraHere(request=question.request, bytes=have))

    def _needed_loras(self) -> set[str]:
        """Return the digests of the LoRAs that unfinished jobs name, and submissions that wait."""
        found = {lora.digest for job in self.engine.job_queue.jobs.values() for lora in job.recipe.loras}
        waiting = [question for question, _, _ in self._parked.values() if isinstance(question, Submit)]
        found |= {lora.digest for submit in waiting for job in submit.jobs for lora in job.loras if lora.digest}
        return found

    def _park(self, peer: Peer, submit: Submit | GetLoras, tensors: tuple[Tensor, ...], since: float) -> None:
        asked = peer, submit.request  # perhaps again, in place of what it has asked before
        others = {key: kept for key, (_, kept, _) in self._parked.items() if key != asked}
        own = [kept for (other, _), kept in others.items() if other.principal == peer.principal]
        held = sum(tensor.nbytes for kept in own for tensor in kept)
        of_a_key = not peer.local and (len(own) >= MOST_OF_A_KEY or held >= PARKED_BYTES)
        if len(others) >= MAX_PARKED or of_a_key:
            raise QueueFull("Too many submissions wait for the model to be looked at.", "Try again later.")
        self._parked[asked] = submit, tensors, since

    def _judge_or_accept(self, peer: Peer, submit: Submit, pictures: Mapping[str, Tensor]) -> None:
        client = peer.identity
        if submit.judge:
            self.engine.admission.judge(submit.jobs, peer.principal, pictures, submit.earlier)
            self._reply(client, Done(request=submit.request))
            return
        jobs = self.engine.accept(submit.jobs, peer.principal, pictures)
        self._reply(client, Jobs(request=submit.request, jobs=tuple(job.view(peer.principal) for job in jobs)))
        if submit.watch:
            self._watch(peer, [job for job in jobs if not job.ended])
            for job in jobs:
                self._reply(client, self.engine.event(job, job.id_for(peer.principal)))

    def _watch(self, peer: Peer, jobs: list[LiveJob]) -> None:
        subscriptions = self.engine.subscriptions
        if not peer.local and len(jobs) + subscriptions.count(peer.identity) > MOST_WATCHED:
            raise QueueFull(f"A connection may watch at most {MOST_WATCHED} jobs.", "Wait for some of them to end.")
        for job in jobs:
            subscriptions.add(peer.identity, job.id, job.id_for(peer.principal))

    def _pictures(self, peer: Peer, number: int, job: LiveJob, part: int) -> None:
        job_id, artifacts = job.id_for(peer.principal), self.engine.store.artifacts
        parts = len(artifacts.parts("pictures", job.id)) + 1
        if job.pictures and part >= parts:
            raise NotFound(f"The pictures of job {job_id} have {parts} parts; there is no part {part}.")
        tensors = artifacts.get_part("pictures", job.id, part) if job.pictures else None
        if tensors is not None:
            answer = Pictures(request=number, job=job.view(peer.principal), parts=parts)
            self.engine.outbox.to_client(peer.identity, answer, tensors)
        elif job.pictures:
            self.engine.make_again(job)
            raise Conflict(
                f"The pictures of job {job_id} were damaged on disk; they are being made again, bit for bit.",
                f"Wait for them: triptych wait {job_id}",
            )
        elif job.state == "done":
            raise NotFound(
                f"The pictures of job {job_id} are gone: only the newest are kept (--keep-pictures).",
                "Submit it again with the same seed for the same picture.",
            )
        else:
            raise NotFound(f"Job {job_id} is {job.state}.", "" if job.ended else "Wait for it.")

    def _preview(self, number: int, job: LiveJob) -> Preview:
        if job.ended:
            return Preview(request=number, step=job.step, steps=job.recipe.steps)
        looked = self.engine.previews.look(job)
        return Preview(request=number, step=looked.step, steps=job.recipe.steps, file=looked.file)

    def _collect(self, number: int, older: float) -> Collected:
        held = sum(self.engine.store.artifacts.bytes_of.values())
        gone = self.engine.forget_old(time.time() - older, MOST_FORGOTTEN)
        if len(gone) < MOST_FORGOTTEN:  # all are gone
            self.engine.store.reclaim()
        return Collected(
            request=number, jobs=len(gone), bytes=held - sum(self.engine.store.artifacts.bytes_of.values())
        )

    def model_added(self, added: ModelAdded) -> None:
        """Take in a model that the supervisor has planned for, or why it couldn't: those who wanted it are told."""
        catalogue = self.engine.catalogue
        if added.settings:
            catalogue.add(ModelSettings.model_validate_json(added.settings))
            self._describers.add(added.model)
            self._tell_added()
            return
        if added.lost and added.model in catalogue.models and added.model != catalogue.default_name:
            catalogue.remove(added.model)
            self._describers.remove(added.model)
        for peer, number in self._adding.pop(added.model, ()):
            self._reply(peer.identity, Error(request=number, code=added.code, message=added.reason, hint=added.hint))

    def _tell_added(self) -> None:
        """Answer those who have added models that are whole, as their describers say."""
        for name in {entry.name for entry in self.engine.catalogue.entries} & self._adding.keys():
            for peer, number in self._adding.pop(name):
                self._reply(peer.identity, Done(request=number))

    def _remove_model(self, name: str) -> None:
        """Forget a model that has no unfinished jobs; NotFound, BadRequest, Conflict."""
        catalogue = self.engine.catalogue
        if name not in catalogue.models:
            raise NotFound(f"There is no model {name!r} in this stack.", f"Its models: {', '.join(catalogue.models)}.")
        if name == catalogue.default_name:
            raise BadRequest(f"{name} is the stack's default model.", "It ends with the stack.")
        if not catalogue.is_known(name):
            raise Conflict(f"{name} is yet being looked at.", "Try again once 'triptych models' lists it.")
        names = [name, *catalogue.with_choices(name)]
        for each in names:
            if catalogue.is_known(each):
                self._rests.check_unused(each)
        for each in names:
            catalogue.remove(each)
            self._describers.remove(each)
            self._supervisor.remove_model(each)

    def _models(self, peer: Peer) -> tuple[ModelView, ...]:
        default = self.engine.catalogue.known
        entries = sorted(self.engine.catalogue.entries, key=lambda entry: (entry != default, entry.name))
        return tuple(
            ModelView(
                name=entry.name, model=entry.description.model, revision=entry.description.revision,
                pipeline=entry.description.pipeline, dtype=entry.dtype, speedups=entry.speedups,
                video=entry.description.video is not None, description=entry.description, default=entry == default,
                resting=self._rests.rests(entry),
                reason=self._rests.reason(entry.name) if peer.local else "",
                jobs=self.engine.job_queue.by_model[entry.key],
            )
            for entry in entries
        )  # fmt: skip

    def _gpus(self) -> tuple[GpuView, ...]:
        accounts = self.engine.leasing.ledger.accounts
        return tuple(
            GpuView(
                host=gpu.host, index=gpu.number, name=account.name, budget=account.budget + account.kept,
                kept=account.kept, foreign=account.foreign, used=account.used(),
            )
            for gpu, account in sorted(accounts.items(), key=lambda item: (item[0].host != HOST, *item[0]))
        )  # fmt: skip

    def _stack(self, number: int) -> Stack:
        engine, entry = self.engine, self.engine.catalogue.known
        counts = tuple((state, count) for state, count in engine.job_queue.counts.items() if count)
        return Stack(
            request=number, version=VERSION, pid=os.getpid(), started=self._started, counts=counts,
            model=entry.description if entry else None, speedups=entry.speedups if entry else (),
            queue_limit=engine.settings.queue_limit,
            waiting_seconds=engine.job_queue.waiting_seconds(engine.drained),
        )  # fmt: skip
