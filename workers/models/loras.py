"""LoRA adapters of a stage's models: loaded by diffusers and peft, never fused, and active for a job at a time.

A file is loaded once, into host memory; copies of the weights are on the device for the jobs that want them, and stay
there as long as there is room. What a job without LoRAs computes has the bits of a model that never had any.
"""

import contextlib
import copy
import hashlib
import logging
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from protocol.errors import BadRequest
from protocol.lora import Lora
from protocol.tensors import Buffer
from protocol.units import format_bytes
from workers.errors import StageError, cause_of
from workers.weights.residency import Residency

log = logging.getLogger(__name__)

IGNORED = re.compile(r"[Uu]nexpected keys|[Uu]nsupported keys|filter out|will be ignored|missing keys|not compatible")
MOST_BYTES = 4 << 30  # of adapters in this process's memory


class LoraAdapters:
    """The adapters of the `own` models of a pipeline, by their components."""

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        own: Mapping[str, torch.nn.Module],
        residencies: Mapping[str, Residency],
        refusal: str = "",
    ) -> None:
        """`refusal`: why none can be taken, empty if they can."""
        loadable = getattr(pipeline, "_lora_loadable_modules", ())
        self._pipeline, self._refusal = pipeline, refusal
        self.folder: Path | None = None  # where files lie, by their digests
        self._own = {name: module for name, module in own.items() if name in loadable}
        self._weights = {id(own[name]): residency.adapters for name, residency in residencies.items() if name in own}
        self._loaded: dict[str, frozenset[str]] = {}  # by digest, the least recently used first: components
        self._bytes: dict[str, int] = {}
        self._kept: tempfile.TemporaryDirectory[str] | None = None

    @contextlib.contextmanager
    def job(self, loras: Sequence[Lora]) -> Iterator[None]:
        """Let a job's adapters be active, in their order; StageError where one can't be had."""
        if not loras and not self._loaded:
            yield
            return
        if loras and self._refusal and self._own:
            raise StageError(f"a model {self._refusal} takes no LoRAs")
        for lora in loras:
            self._load(lora)
        with contextlib.ExitStack() as stack:
            for name, module in self._own.items():
                mine = [lora for lora in loras if name in self._loaded[lora.digest]]
                stack.enter_context(self._active(module, mine))
            yield

    @contextlib.contextmanager
    def _active(self, module: torch.nn.Module, loras: Sequence[Lora]) -> Iterator[None]:
        from diffusers.utils.peft_utils import set_adapter_layers, set_weights_and_activate_adapters

        names = [adapter_name(lora.digest) for lora in loras]
        weights = self._weights.get(id(module))
        if not adapters_in(module):
            yield
            return
        with weights.active(names) if weights else contextlib.nullcontext():
            set_adapter_layers(module, enabled=bool(loras))
            if loras:
                set_weights_and_activate_adapters(module, names, [lora.weight for lora in loras])
            yield

    def _load(self, lora: Lora) -> None:
        """Load an adapter into host memory, unless it is there."""
        if lora.digest in self._loaded:
            self._loaded[lora.digest] = self._loaded.pop(lora.digest)
            return
        path = self._file(lora)
        start = time.perf_counter()
        size = path.stat().st_size
        self._forget(MOST_BYTES - size)
        self._bytes[lora.digest] = size
        try:
            found = load_adapter(self._pipeline, self._own, path, adapter_name(lora.digest), self._making_room(size))
        except BadRequest as error:
            raise StageError(f"LoRA {lora.name!r}: {error.message}") from error
        self._loaded[lora.digest] = frozenset(found)
        for component in found:
            if weights := self._weights.get(id(self._own[component])):
                weights.take_in(adapter_name(lora.digest))
        log.info("LoRA %s, %s, loaded in %.2f s", lora.name, format_bytes(size), time.perf_counter() - start)

    def keep_file(self, digest: str, parts: Sequence[Buffer]) -> None:
        """Keep a LoRA's file, which came in parts from a stack on another host, for this process's life."""
        if self.folder is None:
            self._kept = tempfile.TemporaryDirectory(prefix="triptych-loras-")
            self.folder = Path(self._kept.name)
        if re.fullmatch(r"[0-9a-f]{64}", digest):
            (self.folder / f"{digest}.safetensors").write_bytes(b"".join(parts))

    def _making_room(self, size: int) -> Callable[[torch.nn.Module], None]:
        def make_room(module: torch.nn.Module) -> None:
            if weights := self._weights.get(id(module)):
                weights.make_room(size)

        return make_room

    def _file(self, lora: Lora) -> Path:
        path = self.folder / f"{lora.digest}.safetensors" if self.folder else None
        if path is None or not path.exists():
            raise StageError(f"the file of LoRA {lora.name!r} is not on this worker's host")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != lora.digest:
                raise StageError(f"the file of LoRA {lora.name!r} has changed; submit the job again")
        return path

    def _forget(self, most: int) -> None:
        """Let go of the least recently used adapters beyond so many bytes."""
        while self._loaded and sum(self._bytes.values()) > most:
            digest = next(iter(self._loaded))
            name = adapter_name(digest)
            for component in self._loaded.pop(digest):
                module = self._own[component]
                if weights := self._weights.get(id(module)):
                    weights.forget(name)
                remove_adapter(module, name)
            del self._bytes[digest]


def adapter_name(digest: str) -> str:
    """Return peft's name of an adapter."""
    return f"lora_{digest[:32]}"


def adapters_in(module: torch.nn.Module) -> set[str]:
    """Return the names of a module's adapters."""
    return set(getattr(module, "peft_config", None) or ())


def remove_adapter(module: Any, name: str) -> None:
    """Remove an adapter, or what was loaded of it; the layers that peft has put around others stay, and do nothing."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.delete_adapter(name)
    if adapters_in(module):
        module.peft_config.pop(name, None)


def load_adapter(
    pipeline: DiffusionPipeline,
    own: Mapping[str, torch.nn.Module],
    path: Path,
    name: str,
    make_room: Callable[[torch.nn.Module], None] = lambda module: None,
) -> list[str]:
    """Load a LoRA's file into the models that are here, and return those that it is for, by their components.

    Raises:
        BadRequest: it is not for this pipeline, or a part of it would be left out; nothing is left of it.
    """
    try:
        return _load_adapter(pipeline, own, path, name, make_room)
    except BaseException:
        for module in own.values():
            remove_adapter(module, name)
        raise


def _load_adapter(
    pipeline: DiffusionPipeline,
    own: Mapping[str, torch.nn.Module],
    path: Path,
    name: str,
    make_room: Callable[[torch.nn.Module], None],
) -> list[str]:
    if not hasattr(pipeline, "load_lora_weights"):
        raise BadRequest(f"a {type(pipeline).__name__} takes none")
    found: dict[str, int] = {}  # components: tensors that are for them
    seen: dict[str, Any] = {}  # the file's tensors as diffusers names them

    def only_own(original: Callable[..., None]) -> Callable[..., None]:
        def load(state_dict: Mapping[str, Any], *args: Any, **given: Any) -> None:
            module = next((value for value in (*args, *given.values()) if isinstance(value, torch.nn.Module)), None)
            component = next((key for key, part in pipeline.components.items() if part is module), "")
            seen.update(state_dict)
            count = sum(key.startswith(f"{component}.") and not key.endswith("alpha") for key in state_dict)
            if component not in own or module is None or not count:
                return
            make_room(module)
            original(state_dict, *args, **given | {"_pipeline": None})
            found[component] = count

        return load

    loader = copy.copy(pipeline)
    for attribute in dir(type(pipeline)):
        if attribute.startswith("load_lora_into_"):
            loader.__dict__[attribute] = only_own(getattr(pipeline, attribute))
    with overheard() as said, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what is meant
        try:
            loader.load_lora_weights(str(path), adapter_name=name, use_safetensors=True)
        except (ValueError, KeyError, RuntimeError, TypeError, AttributeError, OSError) as error:
            raise BadRequest(why_not(error, type(pipeline).__name__)) from error
    for component, count in found.items():
        there = sum(f".{name}." in f"{key}." for key, _ in own[component].named_parameters())
        if there < count:
            raise BadRequest(f"only {there} of its {count} tensors for {component} have a place in this model")
    strangers = [key for key in seen if key.partition(".")[0] not in pipeline.components]
    if strangers:
        raise BadRequest(f"{len(strangers)} of its tensors are for no part of a {type(pipeline).__name__}")
    if ignored := next((line for line in said if IGNORED.search(line)), ""):
        raise BadRequest(f"a part of it would be left out: {ignored.splitlines()[0][:300]}")
    return list(found)


def why_not(error: Exception, pipeline: str) -> str:
    """Say in a line why a file can't be loaded."""
    if "size mismatch" in str(error):
        return f"its layers have other sizes than those of this {pipeline}"
    if "not found in the base model" in str(error) or "No modules were targeted" in str(error):
        return f"it changes no layer of a {pipeline}"
    return f"it can't be loaded into a {pipeline}: {cause_of(error)}"


@contextlib.contextmanager
def overheard() -> Iterator[list[str]]:
    """Gather what diffusers says of a file meanwhile."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, listener = logging.getLogger("diffusers"), Listener(logging.WARNING)
    level = logger.level
    logger.addHandler(listener)
    logger.setLevel(logging.WARNING)
    others = [handler for handler in logger.handlers if handler is not listener]
    for handler in others:
        logger.removeHandler(handler)
    try:
        yield said
    finally:
        logger.setLevel(level)
        logger.removeHandler(listener)
        for handler in others:
            logger.addHandler(handler)
