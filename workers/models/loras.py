"""LoRA adapters of a stage's models: loaded by diffusers and peft, never fused, and active for a job at a time.

A file is loaded once, into host memory; copies of the weights are on the device for the jobs that want them, and stay
there as long as there is room. What a job without LoRAs computes has the bits of a model that never had any: a file
that would change anything but adapters is refused before it is loaded.
"""

import contextlib
import copy
import hashlib
import logging
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from protocol.errors import BadRequest
from protocol.lora import Lora
from protocol.units import format_bytes
from workers.errors import StageError, WeightsLost, cause_of
from workers.models.lora_fetch import LoraFolder
from workers.weights.adapters import adapter_parameters, is_of_adapter
from workers.weights.residency import Residency

log = logging.getLogger(__name__)

IGNORED = re.compile(r"[Uu]nexpected keys|[Uu]nsupported keys|filter out|will be ignored|missing keys|not compatible")
# The last parts of a tensor's name, as trainers give them; none is a weight of a model itself.
OF_LORA = re.compile(r"(^|[._])(lora|lokr)[_.]|\.alpha$")
MOST_BYTES = 4 << 30  # of adapters in this process's memory
MOST_RANK = 4096
TAKEN = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora", "use_dora", "lora_bias")
LEFT_OUT = (  # of a file's own configuration: what says nothing, or what only training heeds
    "peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping",
    "init_lora_weights", "lora_dropout", "megatron_core", "runtime_config", "qalora_group_size", "ensure_weight_tying",
)  # fmt: skip


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
        self.files = LoraFolder()
        self._own = {name: module for name, module in own.items() if name in loadable}
        self._weights = {id(own[name]): residency.adapters for name, residency in residencies.items() if name in own}
        self._loaded: dict[str, frozenset[str]] = {}  # by digest, the least recently used first: components
        self._bytes: dict[str, int] = {}

    @contextlib.contextmanager
    def job(self, loras: Sequence[Lora]) -> Iterator[None]:
        """Let a job's adapters be active, in their order; StageError where one can't be had."""
        if not loras and not self._loaded:
            yield
            return
        if loras and self._refusal and self._own:
            raise StageError(f"a model {self._refusal} takes no LoRAs")
        for lora in loras:
            self._load(lora, {lora.digest for lora in loras})
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

    def _load(self, lora: Lora, needed: set[str]) -> None:
        """Load an adapter into host memory, unless it is there; those of `needed` digests stay."""
        if lora.digest in self._loaded:
            self._loaded[lora.digest] = self._loaded.pop(lora.digest)
            return
        path, name, start = self._file(lora), adapter_name(lora.digest), time.perf_counter()
        size = path.stat().st_size
        self._forget(MOST_BYTES - size, needed)
        taken: list[str] = []
        try:
            found = load_adapter(self._pipeline, self._own, path, name, self._making_room(size))
            for component in found:
                if weights := self._weights.get(id(self._own[component])):
                    weights.take_in(name)
                    taken.append(component)
        except BadRequest as error:
            raise StageError(f"LoRA {lora.name!r}: {error.message}") from error
        except BaseException:
            for component in taken:
                self._weights[id(self._own[component])].forget(name)
            for module in self._own.values():
                remove_adapter(module, name)
            raise
        self._loaded[lora.digest], self._bytes[lora.digest] = frozenset(found), size
        log.info("LoRA %s, %s, loaded in %.2f s", lora.name, format_bytes(size), time.perf_counter() - start)

    def _making_room(self, size: int) -> Callable[[torch.nn.Module], None]:
        def make_room(module: torch.nn.Module) -> None:
            if weights := self._weights.get(id(module)):
                weights.make_room(size)

        return make_room

    def _file(self, lora: Lora) -> Path:
        path = self.files.path(lora.digest)
        if path is None:
            raise StageError(f"the file of LoRA {lora.name!r} is not on this worker's host")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != lora.digest:
                raise StageError(f"the file of LoRA {lora.name!r} has changed; submit the job again")
        return path

    def _forget(self, most: int, needed: set[str]) -> None:
        """Let go of the least recently used adapters beyond so many bytes."""
        for digest in [digest for digest in self._loaded if digest not in needed]:
            if sum(self._bytes.values()) <= most:
                return
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
    path: Path | Mapping[str, torch.Tensor],
    name: str,
    make_room: Callable[[torch.nn.Module], None] = lambda module: None,
    metadata: Mapping[str, Any] | None = None,
) -> list[str]:
    """Load a LoRA's file into the models that are here, and return those that it is for, by their components.

    With tensors in place of a path, `metadata` is what its file says of its configuration.

    Raises:
        BadRequest: it is not for this pipeline, or a part of it would be left out; nothing is left of it.
        WeightsLost: it has changed more than adapters, which is not undone.
    """
    before = {component: parameters_of(module) for component, module in own.items()}
    try:
        return _load_adapter(pipeline, own, path, name, make_room, metadata)
    except BaseException:
        for module in own.values():
            remove_adapter(module, name)
        raise
    finally:
        if any(parameters_of(module) != before[component] for component, module in own.items()):
            raise WeightsLost("a LoRA has changed the model's own weights")


def parameters_of(module: torch.nn.Module) -> dict[int | str, torch.Size]:
    """Return a model's own parameters, by their identity: adapters come and go around them.

    Quantized ones are made anew with each move to a GPU and back, so they are known by their names.
    """
    own = [(key, p) for key, p in module.named_parameters() if not is_of_adapter(key)]
    return {id(p) if type(p.data) is torch.Tensor else key.replace(".base_layer", ""): p.shape for key, p in own}


def _load_adapter(
    pipeline: DiffusionPipeline,
    own: Mapping[str, torch.nn.Module],
    path: Path | Mapping[str, torch.Tensor],
    name: str,
    make_room: Callable[[torch.nn.Module], None],
    metadata: Mapping[str, Any] | None,
) -> list[str]:
    cls = type(pipeline).__name__
    if not hasattr(pipeline, "load_lora_weights"):
        raise BadRequest(f"a {cls} takes none")
    found: dict[str, int] = {}  # components: tensors that are for them

    def only_own(original: Callable[..., None]) -> Callable[..., None]:
        def load(state_dict: Mapping[str, Any], *args: Any, **given: Any) -> None:
            check_keys(state_dict, pipeline.components, cls)
            module = next((value for value in (*args, *given.values()) if isinstance(value, torch.nn.Module)), None)
            component = next((key for key, part in pipeline.components.items() if part is module), "")
            count = sum(key.startswith(f"{component}.") and not key.endswith("alpha") for key in state_dict)
            if component not in own or module is None or not count:
                return
            make_room(module)
            said = given.get("metadata") if metadata is None else metadata
            config = {"metadata": checked_metadata(said)} if said else {}
            original(state_dict, *args, **given | config | {"_pipeline": None})
            found[component] = count

        return load

    loader = copy.copy(pipeline)
    for attribute in dir(type(pipeline)):
        if attribute.startswith("load_lora_into_"):
            loader.__dict__[attribute] = only_own(getattr(pipeline, attribute))
    loader.__dict__["_load_norm_into_transformer"] = refuse_norms
    loader.__dict__["_maybe_expand_transformer_param_shape_or_error_"] = lambda *_, **__: False
    loader.__dict__["_maybe_expand_lora_state_dict"] = lambda transformer, lora_state_dict: lora_state_dict
    given: Any = str(path) if isinstance(path, Path) else dict(path)
    with overheard() as said, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what is meant
        try:
            loader.load_lora_weights(given, adapter_name=name, use_safetensors=True)
        except (torch.OutOfMemoryError, NotImplementedError):  # which says nothing of the file
            raise
        except (ValueError, KeyError, RuntimeError, TypeError, AttributeError, IndexError) as error:
            raise BadRequest(why_not(error, cls)) from error
    for component, count in found.items():
        there = adapter_parameters(own[component], name)
        if len(there) != count:
            raise BadRequest(
                f"{min(len(there), count)} of its {count} tensors for {component} have a place in this model"
            )
    if ignored := next((line for line in said if IGNORED.search(line)), ""):
        raise BadRequest(f"a part of it would be left out: {ignored.splitlines()[0][:300]}")
    return list(found)


def check_keys(state_dict: Mapping[str, Any], components: Mapping[str, Any], cls: str) -> None:
    """Check the names of a LoRA's tensors, as diffusers has them: each is of an adapter, of one of the components."""
    for key in state_dict:
        if key.partition(".")[0] not in components:
            count = sum(other.partition(".")[0] not in components for other in state_dict)
            raise BadRequest(f"{count} of its tensors are for no part of a {cls}")
        if not OF_LORA.search(key):
            raise BadRequest(f"it holds {key}, which is a weight of the model's own")
        if "lokr" in key and re.search(r"to_(added_)?qkv", key):
            raise BadRequest("it is a LoKr of fused layers, which are not taken")


def checked_metadata(said: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a file says of its adapters' configuration, by component, as far as it is taken; BadRequest.

    It becomes peft's LoraConfig, which could do more than to add adapters.
    """
    found: dict[str, Any] = {}
    for key, value in said.items():
        field = key.rpartition(".")[2]
        if field in LEFT_OUT or value in (None, False, {}, [], "none"):
            continue
        if field not in TAKEN or not right(field, value):
            raise BadRequest(f"its configuration asks for {field}, which is not taken")
        found[key] = value
    return found


def right(field: str, value: Any) -> bool:
    """Return whether a field of a LoRA's configuration has a value of its kind."""
    match field, value:
        case "r", int():
            return 0 < value <= MOST_RANK
        case "lora_alpha", int() | float():
            return True
        case "rank_pattern", dict():
            return all(isinstance(rank, int) and 0 < rank <= MOST_RANK for rank in value.values())
        case "alpha_pattern", dict():
            return all(isinstance(alpha, int | float) for alpha in value.values())
        case "target_modules", list() | tuple():
            return all(isinstance(name, str) for name in value)
        case "use_rslora" | "use_dora" | "lora_bias", bool():
            return True
    return False


def refuse_norms(*_: object, **__: object) -> None:
    """Stand in for what would overwrite a denoiser's norms."""
    raise BadRequest("it changes the model's own norms, as control LoRAs do")


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
