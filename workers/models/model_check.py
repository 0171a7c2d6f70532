"""The check that a model is whole, by its configurations and its files' headers before any weights are read.

Loading by the libraries is what decides: transformers gets a checkpoint of shapes alone and says what it misses, and
what diffusers expects is its model's own list of tensors. A tensor that is missing would be filled at random, and a
tokenizer without its files would be an empty one, both in silence.
"""

import contextlib
import importlib.util
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from protocol.errors import ModelMissing, TriptychError
from protocol.stages import STAGES, Stage
from workers.errors import cause_of
from workers.models.single_file import check_single
from workers.models.skeleton import component_class, expected_components, on_meta, pipeline_class, quiet, text_config
from workers.models.source import BITSANDBYTES, INSTALL_QUANTIZE, TORCHAO, Source, quantization_method, stages_of
from workers.models.weight_files import DTYPES, Damaged, StoredTensor, headers_of, read_json, weight_files

UNSET_LENGTH = 10**12  # transformers' way of saying that a tokenizer knows no longest prompt
FEW_POSITIONS = 1024  # an encoder with so many at most has a table of them, which a longer prompt leaves
PART_OF_QUANTIZED: Mapping[str, re.Pattern[str]] = {  # names of the tensors that are saved for a weight
    TORCHAO: re.compile(r"\._weight_[a-z_]+$"),
    BITSANDBYTES: re.compile(
        r"\.(SCB|weight_format|weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+))$"
    ),
}
MOST_TOLD = 3  # tensors of a component that are named


@dataclass(frozen=True, slots=True)
class Problem:
    """A fault that keeps a model from being run, in words for a person; the file's path begins in its folder."""

    component: str
    file: str
    fault: str
    remedy: str

    @property
    def line(self) -> str:
        where = "" if not self.component or self.file.startswith(self.component) else f"{self.component}: "
        return f"{where}{self.file} {self.fault}."

    def __str__(self) -> str:
        return f"{self.line} {self.remedy}".strip()


def check(source: Source, stages: Sequence[Stage] = STAGES) -> None:
    """Raise ModelMissing with the first problem of what some stages need, and how many there are besides."""
    problems = find_problems(source, stages)
    if problems:
        more = f" ({len(problems) - 1} more: triptych doctor --model {source.model})" if len(problems) > 1 else ""
        raise ModelMissing(f"{source.model!r} can't be run. {problems[0].line}{more}", problems[0].remedy)


def find_problems(source: Source, stages: Sequence[Stage] = STAGES) -> list[Problem]:
    """All that is wrong with a model for some stages, in the order of its components' names."""
    found: list[Problem] = []
    try:
        cls = pipeline_class(source)
    except ModelMissing as error:
        return [Problem("", "model_index.json", f"can't be used: {error.message.rstrip('.')}", error.hint)]
    optional = set(getattr(cls, "_optional_components", ()))
    for name in sorted(expected_components(cls) - optional - set(source.named)):
        found.append(
            Problem(name, "model_index.json", f"names no {name}, which a {cls.__name__} needs", "Add it, as saved.")
        )
    for name in sorted(source.index):
        with noted(found, name):
            check_component(source, name, stages)
    return found


@contextlib.contextmanager
def noted(found: list[Problem], name: str) -> Iterator[None]:
    """Turn whatever is raised into a problem of a component; a library's panic, too, which is no Exception."""
    try:
        yield
    except Damaged as error:
        found.append(Problem(name, error.file, error.fault, error.remedy))
    except TriptychError as error:
        found.append(Problem(name, "model_index.json", f"can't be used: {error.message.rstrip('.')}", error.hint))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        found.append(Problem(name, f"{name}/", f"can't be read: {cause_of(error)}", "Download it again."))


def check_component(source: Source, name: str, stages: Sequence[Stage] = STAGES) -> None:
    """Raise Damaged for what is wrong with one. Weights are looked at where one of the stages loads them."""
    folder = source.folder_of(name)
    if not stages_of(name):
        return  # no stage loads it
    if not folder.is_dir():
        raise Damaged(f"{name}/", "is missing", "Download the model again.")
    cls = component_class(source, name)
    if issubclass(cls, PreTrainedTokenizerBase):
        check_tokenizer(source, name, cls)
    elif issubclass(cls, SchedulerMixin):
        read_json(folder / "scheduler_config.json")
        cls.from_pretrained(source.folder_of(name))
    elif issubclass(cls, ModelMixin | PreTrainedModel):
        config = read_json(folder / "config.json")
        if not set(stages_of(name)) & set(stages):
            return
        if name in source.single:
            model: Any = on_meta(source, name)
            check_single(source, name, cls, model.state_dict(), config)
            return
        files = weight_files(folder, source.index[name][0])
        tensors = headers_of(files)
        if quantization_method(source, name):
            compare_quantized(source, name, tensors, files.paths[0].name)
            return
        compare = compare_diffusers if issubclass(cls, ModelMixin) else compare_transformers
        compare(source, name, cls, tensors, files.paths[0].name)
    else:
        cls.from_pretrained(source.folder_of(name))


def check_tokenizer(source: Source, name: str, cls: Any) -> None:
    """Check that a tokenizer has a vocabulary, and knows how much its encoder can take."""
    folder = source.folder_of(name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / file).exists() or (folder / file).is_symlink():
            read_json(folder / file)
    tokenizer = cls.from_pretrained(source.folder_of(name))
    if len(tokenizer.get_vocab()) <= len(tokenizer.get_added_vocab()) + 1:
        files = sorted({*getattr(cls, "vocab_files_names", {}).values()} | {"tokenizer.json"})
        there = [file for file in files if (folder / file).exists()]
        fault = "hold no vocabulary" if there else "are missing, and with them its vocabulary"
        raise Damaged(", ".join(f"{name}/{file}" for file in there or files), fault, "Download it again.")
    encoder = source.folder_of(name.replace("tokenizer", "text_encoder")) / "config.json"
    positions = read_json(encoder).get("max_position_embeddings") if encoder.is_file() else None
    if isinstance(positions, int) and positions <= FEW_POSITIONS and tokenizer.model_max_length > UNSET_LENGTH:
        raise Damaged(
            f"{name}/tokenizer_config.json", "has no model_max_length",
            f'Its encoder takes {positions} tokens: "model_max_length": {positions}.',
        )  # fmt: skip


def longest_tokenizer(source: Source) -> Any:
    """The tokenizer that limits a prompt: the last one by name, T5's in FLUX.1; None if there is none."""
    names = sorted(name for name in source.index if name.startswith("tokenizer"))
    if not names:
        return None
    with quiet():
        return component_class(source, names[-1]).from_pretrained(source.folder_of(names[-1]))


def shapes_of(tensors: Mapping[str, StoredTensor], file: str) -> dict[str, torch.Tensor]:
    """A checkpoint of shapes alone."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise Damaged(file, f"holds {name} as {tensor.dtype}, which is not known here", "Update Triptych.")
    return {
        name: torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device="meta") for name, tensor in tensors.items()
    }


def compare_transformers(source: Source, name: str, cls: Any, tensors: Mapping[str, StoredTensor], file: str) -> None:
    """Compare by the library's own loading, with its renamings and exceptions, onto the meta device."""
    config = text_config(cls, source, name)
    _, report = cls.from_pretrained(
        None, config=config, state_dict=shapes_of(tensors, f"{name}/{file}"), output_loading_info=True,
        device_map="meta", ignore_mismatched_sizes=True,
    )  # fmt: skip
    judge(report, f"{name}/{file}")


def compare_diffusers(source: Source, name: str, cls: Any, tensors: Mapping[str, StoredTensor], file: str) -> None:
    """Compare by the model's own list of tensors, with deprecated names as it renames them."""
    model: Any = on_meta(source, name)
    stored = OrderedDict(shapes_of(tensors, f"{name}/{file}"))
    model._fix_state_dict_keys_on_load(stored)
    wanted = model.state_dict()
    ignored = cls._keys_to_ignore_on_load_unexpected or []
    judge(
        {
            "missing_keys": wanted.keys() - stored.keys(),
            "unexpected_keys": [
                key for key in stored.keys() - wanted.keys() if not any(re.search(part, key) for part in ignored)
            ],
            "mismatched_keys": [
                (key, tensor.shape, wanted[key].shape)
                for key, tensor in stored.items()
                if key in wanted and tensor.shape != wanted[key].shape
            ],
        },
        f"{name}/{file}",
    )


def compare_quantized(source: Source, name: str, tensors: Mapping[str, StoredTensor], file: str) -> None:
    """Compare what was saved quantized by the names of its tensors, each of which may be stored as several."""
    method = quantization_method(source, name)
    if method not in PART_OF_QUANTIZED:
        raise Damaged(
            f"{name}/config.json", f"says that its weights are quantized by {method}, which isn't taken",
            "Take one of torchao's or bitsandbytes', a GGUF file (--transformer), or the model itself with --quantize.",
        )  # fmt: skip
    if importlib.util.find_spec(method) is None:
        fault = f"says that its weights are quantized by {method}, which isn't here"
        raise Damaged(f"{name}/config.json", fault, INSTALL_QUANTIZE)
    if not issubclass(component_class(source, name), ModelMixin):
        return  # transformers has its own names for some tensors, and says what is missing as it loads them
    model: Any = on_meta(source, name)
    stored = {PART_OF_QUANTIZED[method].sub(".weight", tensor) for tensor in tensors}
    wanted = model.state_dict()
    tied = {*(getattr(model, "_tied_weights_keys", None) or ())}  # of which one is stored
    there = {id(wanted[key]) for key in stored & wanted.keys()}
    missing = {key for key, tensor in wanted.items() if key not in stored | tied and id(tensor) not in there}
    judge({"missing_keys": missing}, f"{name}/{file}")


def judge(report: Mapping[str, Any], file: str) -> None:
    """Raise Damaged for what a loading report tells: tensors missing, of another shape, or of no use."""
    remedy = "Its config.json or its files are another model's, or incomplete: download it again."
    if missing := sorted(report.get("missing_keys", ())):
        raise Damaged(file, f"lacks {some(missing, str)}", remedy)
    if mismatched := sorted(report.get("mismatched_keys", ()), key=str):
        raise Damaged(file, f"has another shape than its config.json wants: {some(mismatched, shapes)}", remedy)
    if unexpected := sorted(report.get("unexpected_keys", ())):
        raise Damaged(file, f"holds what its model has no use for: {some(unexpected, str)}", remedy)
    if errors := report.get("error_msgs"):
        raise Damaged(file, f"can't be loaded: {errors[0]}", remedy)


def some(items: list[Any], word: Callable[[Any], str]) -> str:
    more = f" and {len(items) - MOST_TOLD} more" if len(items) > MOST_TOLD else ""
    return ", ".join(map(word, items[:MOST_TOLD])) + more


def shapes(entry: Any) -> str:
    """(tensor, its shape in the file, its shape in the model), as both libraries tell it."""
    if not isinstance(entry, tuple):
        return str(entry)
    name, stored, wanted = entry
    return f"{name} {list(stored)} instead of {list(wanted)}"
