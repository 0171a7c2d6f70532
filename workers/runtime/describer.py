"""The process without weights: checks a model, says what it takes, and counts prompts' tokens for the orchestrator.

    python -m workers.runtime.describer MODEL [--revision R] [--controlnet MODEL]

checks a model alone and prints JSON: its description, or all that is wrong with it. Nothing that a model's folder holds
is read by the orchestrator itself: what a broken file does to a library ends this process, which comes back.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import zmq

from protocol import wire
from protocol.errors import ModelMissing, NotFound, TriptychError
from protocol.lora import LoraInfo, LoraRequest
from protocol.messages.common import Beat, Error, Heartbeat, Message, Welcome
from protocol.messages.describer import (
    MOST_LORAS,
    TO_DESCRIBER,
    CountTokens,
    DescriberHello,
    FindLora,
    FoundLora,
    KnownLoras,
    ListLoras,
    LookAt,
    Looked,
    TokenCounts,
)
from protocol.model import ModelDescription
from protocol.model_spec import ModelSpec
from protocol.recipe import CountTokens as Counter
from protocol.route import Route, Template
from protocol.sockets import dealer, new_identity, receive, send
from protocol.stages import STAGES, Stage
from protocol.worker_spec import DescriberSpec

if TYPE_CHECKING:
    from workers.models.lora_files import LoraFiles

log = logging.getLogger(__name__)

SHAPES = re.compile(  # how torch and Python say that values of a configuration don't go together
    r"must match the size|shapes cannot be multiplied|invalid for input of size|expected input\b.* to have"
    r"|must match except in dimension|shape mismatch|broadcastable|size of tensor"
    r"|unsupported operand type"
)
FEW = 4  # times the multiple of its sizes: a small picture
SILENCE_SECONDS = 4.0  # without an answer, after which it says hello again
BEAT_SECONDS = 0.5


class Describer:
    """The describer's conversation with the orchestrator.

    `count` gives the number of tokens of a text, `look` what jobs of a template begin with; `loras` finds LoRAs.
    """

    def __init__(
        self,
        endpoint: str,
        hello: DescriberHello,
        count: Counter,
        look: Callable[[Template], Route],
        loras: "LoraFiles | None" = None,
    ) -> None:
        self._endpoint, self._hello, self._count, self._look, self._loras = endpoint, hello, count, look, loras
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._heard = self._beaten = 0.0  # monotonic seconds
        self._stopping = False
        if loras:
            loras.beat = self.beat

    def stop(self, *_: object) -> None:
        self._stopping = True

    def run(self) -> None:
        """Run until told to stop."""
        self._connect()
        while not self._stopping:
            assert self._socket is not None
            if self._socket.poll(int(BEAT_SECONDS * 1000)):
                self._hear()
            elif time.monotonic() - self._heard > SILENCE_SECONDS:
                self._connect()
            else:
                self._say(Heartbeat(rss_bytes=0, gpu_bytes=0))
        assert self._socket is not None
        self._socket.close(linger=0)
        self._context.term()

    def _connect(self) -> None:
        if self._socket is not None:
            self._socket.close(linger=0)
        self._socket = dealer(self._context, self._endpoint, new_identity())
        self._heard = time.monotonic()
        self._say(self._hello)

    def _say(self, message: Message) -> None:
        """Send a message; a lost link is noticed by silence."""
        assert self._socket is not None
        if self._socket.poll(1000, zmq.POLLOUT):
            send(self._socket, wire.encode(message))

    def _hear(self) -> None:
        assert self._socket is not None
        try:
            message = wire.decode(receive(self._socket), TO_DESCRIBER).message
        except (zmq.Again, TriptychError) as error:
            log.error("the orchestrator sent something else: %s", error)
            return
        self._heard = time.monotonic()
        match message:
            case CountTokens(request=request, texts=texts):
                self._say(self.counts(request, texts))
            case LookAt(request=request, recipe=recipe, shapes=shapes):
                self._say(Looked(request=request, route=self._look(Template(recipe, shapes))))
            case FindLora(request=request, lora=lora):
                self._say(self.found(request, lora))
            case ListLoras(request=request):
                self._say(KnownLoras(request=request, loras=self.known_loras()))
            case Error(code="not_found"):
                self._connect()
            case Welcome() | Beat() | Error():
                pass

    def counts(self, request: int, texts: Sequence[str]) -> TokenCounts:
        try:
            return TokenCounts(request=request, counts=tuple(map(self._count, texts)))
        except Exception as error:
            log.exception("tokens could not be counted")
            return TokenCounts(request=request, reason=f"{type(error).__name__}: {error}"[:1000])

    def known_loras(self) -> tuple[LoraInfo, ...]:
        try:
            return self._loras.all()[:MOST_LORAS] if self._loras else ()
        except Exception:
            log.exception("LoRAs could not be listed")
            return ()

    def beat(self) -> None:
        """Say that it is alive, amid long work."""
        if time.monotonic() - self._beaten >= BEAT_SECONDS:
            self._beaten = time.monotonic()
            self._say(Heartbeat(rss_bytes=0, gpu_bytes=0))

    def found(self, request: int, asked: LoraRequest) -> FoundLora:
        try:
            if self._loras is None:
                raise NotFound("This stack takes no LoRAs.", "Leave --lora out.")
            lora, info = self._loras.find(asked)
            return FoundLora(request=request, lora=lora, bytes=info.bytes)
        except TriptychError as error:
            return FoundLora(request=request, reason=error.message[:1000], hint=error.hint[:1000])
        except Exception as error:
            log.exception("a LoRA could not be looked at")
            return FoundLora(request=request, reason=f"LoRA {asked.name!r} can't be read: {type(error).__name__}.")


def token_counter(source: Any) -> Counter:
    """Counts as the pipeline's longest tokenizer does, special tokens included; ModelMissing."""
    from workers.models.model_check import longest_tokenizer

    tokenizer = longest_tokenizer(source)
    if tokenizer is None:
        return lambda text: 0
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's
    return lambda text: len(tokenizer(text, truncation=False, add_special_tokens=True).input_ids)


def looker(source: Any, dtype: str) -> Callable[[Template], Route]:
    """Return a function that finds routes; where a pipeline can't be looked at, it knows none."""
    from workers.models.skeleton import quiet
    from workers.profile.route import Router

    try:
        with quiet():
            return Router(source, dtype).look
    except Exception as error:
        log.info("routes can't be found: %s", error)
        return lambda template: Route()


def examine(spec: ModelSpec, dtype: str, stages: Sequence[Stage] = ()) -> tuple[Any, ModelDescription]:
    """A model's source and description, once it is found whole; ModelMissing. Downloads what `stages` need of it."""
    from workers.models.description import describe
    from workers.models.model_check import check
    from workers.models.skeleton import quiet
    from workers.models.source import locate

    source = locate(spec, None)
    for stage in stages:
        locate(spec, stage)
    with quiet():
        check(source, stages or STAGES)
        description = describe(source)
        fits_together(source, dtype, description.size_multiple * FEW)
    return source, description


def fits_together(source: Any, dtype: str, small: int) -> None:
    """Run the model on shapes alone; ModelMissing where its parts' shapes don't go together.

    Models that can't be run so for another reason are taken: not all code works on the meta device. So are those that
    can't make what the pipeline makes by default, but something `small`, in pixels of its sides.
    """
    from workers.profile.measure import NO_SIZE, profile_for

    def why_not(**size: Any) -> str:
        """Return why it can't be run on shapes; empty if it can."""
        try:
            return profile_for(source, dtype, **NO_SIZE | size).guessed
        except Exception as error:
            return str(error)

    why = why_not()
    if why:
        log.info("not run on shapes: %s", why)
    if not SHAPES.search(why):
        return
    if not why_not(width=small, height=small):
        log.info("too small for pictures of its pipeline's default size")
        return
    raise ModelMissing(
        f"{source.model!r} can't be run: its configurations don't go together: {why.splitlines()[0]}.",
        "Download it again.",
    )


def serve(spec: DescriberSpec) -> None:
    """Be the describer of a stack, until told to stop; ModelMissing where the model is not whole."""
    source, description = examine(spec.model, spec.dtype, spec.stages)
    description = description.model_copy(
        update={
            "text_digest": on_device(description.text_digest, spec, "text"),
            "worker_digests": tuple(
                (stage, on_device(digest, spec, stage)) for stage, digest in description.worker_digests
            ),
        }
    )
    log.info("%s is whole: %s", spec.model.name, description.pipeline)
    hello = DescriberHello(name=spec.name, pid=os.getpid(), dtype=spec.dtype, speedups=spec.speedups, model=description)
    loras = lora_files(source, spec)
    describer = Describer(spec.endpoint, hello, token_counter(source), looker(source, spec.dtype), loras)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, describer.stop)
    describer.run()
    logging.shutdown()
    os._exit(0)


def on_device(digest: str, spec: DescriberSpec, stage: Stage) -> str:
    """Return a stage's digest with the device that it has in this stack; an empty one stays empty."""
    told = f"{digest} {dict(spec.devices).get(stage, '')}"
    return digest and hashlib.sha256(told.encode()).hexdigest()[:16]


def lora_files(source: Any, spec: DescriberSpec) -> "LoraFiles | None":
    """Return the LoRAs of a stack, once those that it names are here; ModelMissing."""
    from workers.models.lora_files import LoraFiles
    from workers.models.skeleton import build_skeleton, quiet
    from workers.models.source import LORAS

    if spec.loras is None:
        return None

    def skeleton() -> Any:
        with quiet():
            return build_skeleton(source)

    if spec.lora_folder and not Path(spec.lora_folder).is_dir():
        raise ModelMissing(f"There is no folder {spec.lora_folder!r} of LoRAs.", "Give another to --loras.")
    folders = [source.folder / LORAS, *([Path(spec.lora_folder)] if spec.lora_folder else [])]
    found = LoraFiles(skeleton, dict(spec.lora_aliases), folders, Path(spec.loras))
    found.fetch()
    return found


@click.command(help=__doc__.split("\n")[0])
@click.argument("model")
@click.option("--revision")
@click.option("--base")
@click.option("--controlnet")
@click.option("--refiner")
@click.option("--ip-adapter")
@click.option("--transformer")
def main(model: str, **parts: str | None) -> None:
    from workers.models.description import describe
    from workers.models.model_check import find_problems
    from workers.models.skeleton import quiet
    from workers.models.source import locate

    try:
        with quiet(), contextlib.redirect_stdout(sys.stderr):  # whatever a library prints
            source = locate(ModelSpec(name=model, **parts), None)
            problems = find_problems(source, STAGES)
            found: dict[str, Any] = {"problems": [str(problem) for problem in problems]}
            if not problems:
                found["model"] = describe(source).model_dump()
    except TriptychError as error:
        found = {"problems": [str(error)]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
