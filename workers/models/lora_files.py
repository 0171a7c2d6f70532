"""The files of LoRAs that a stack knows by name: what their headers say, and whether they are for its model.

Longer than other files: each of its parts is short, and they are read together.
"""

import difflib
import hashlib
import json
import logging
import math
import os
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download, list_repo_files
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file

from protocol.errors import BadRequest, ModelMissing, NotFound
from protocol.lora import LORA_NAME, MAX_LORA_BYTES, Lora, LoraInfo, LoraRequest
from protocol.stages import TEXT_COMPONENTS
from protocol.units import format_bytes
from workers.errors import WeightsLost, cause_of
from workers.models.loras import load_adapter, remove_adapter
from workers.models.source import stages_of
from workers.models.weight_files import DTYPES, Damaged, StoredTensor, header_of

log = logging.getLogger(__name__)

FileKey = tuple[str, int, int]  # a file's path, size and time of change
HASHED_BYTES = 32 << 20  # between two beats
MOST_HEADER_BYTES = 4 << 20  # of a LoRA's file: they have some thousand tensors
FEW_VALUES = 16  # of a tensor that is read to check a LoRA, such as alpha
OF_LORA = re.compile(r"lora|lokr_|loha_|hada_|\.alpha$|dora_scale", re.IGNORECASE)
MOST_TRIGGERS = 12
WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL"}  # of texts that a UNet attends to
LAYERS = {  # of other models, by what names of their layers hold
    "single_transformer_blocks": "FLUX.1 or FLUX.2", "single_blocks": "FLUX.1 or FLUX.2",
    "double_blocks": "FLUX.1 or FLUX.2", "joint_blocks": "Stable Diffusion 3", "noise_refiner": "Z-Image",
    "img_mlp": "Qwen-Image", "txt_mlp": "Qwen-Image",
}  # fmt: skip


class LoraFiles:
    """The LoRAs that an administrator has named, and those that clients have sent; files by digest are in `shelf`."""

    def __init__(
        self,
        skeleton: Callable[[], DiffusionPipeline],
        aliases: Mapping[str, str],
        folders: Sequence[Path],
        shelf: Path,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """`skeleton` makes the pipeline with its models on the meta device; `beat` is called now and then."""
        self._skeleton, self._aliases, self._folders, self._shelf = skeleton, dict(aliases), folders, shelf
        self.beat = beat
        self._pipeline: DiffusionPipeline | None = None
        self._digests: dict[FileKey, str] = {}
        self._described: dict[FileKey, LoraInfo | None] = {}
        self._fits: dict[str, tuple[str, ...] | str] = {}  # by digest: components, or why it is not for the model

    def fetch(self) -> None:
        """Download what aliases name on the hub and is not here yet; ModelMissing, BadRequest."""
        for name, where in self._aliases.items():
            if LORA_NAME.fullmatch(name) is None:
                raise BadRequest(f"The LoRA's alias {name!r} is no name.", "Use letters, digits, dots, - and _.")
            self._aliases[name] = str(local_file(name, where))

    def paths(self) -> dict[str, Path]:
        """Return the files by their names; an alias goes before a file of a folder, a later folder before others."""
        found: dict[str, Path] = {}
        for folder in self._folders:
            for path in sorted(folder.rglob("*.safetensors"), reverse=True):
                if LORA_NAME.fullmatch(path.stem):
                    found[path.stem] = path
        return found | {name: Path(path) for name, path in self._aliases.items()}

    def all(self) -> tuple[LoraInfo, ...]:
        """Describe all that have a name, by their headers; those that can't be read are left out."""
        found = (self._known(name, path) for name, path in sorted(self.paths().items()))
        return tuple(info for info in found if info)

    def _known(self, name: str, path: Path) -> LoraInfo | None:
        try:
            key = file_key(path)
            if key not in self._described:
                self.beat()
                self._described[key] = None
                self._described[key] = describe_lora(name, path)
            info = self._described[key]
            return info and info.model_copy(update={"name": name})
        except Exception as error:  # whatever lies in a folder of LoRAs
            log.info("%s is left out: %s", path, cause_of(error))
            return None

    def find(self, asked: LoraRequest) -> tuple[Lora, LoraInfo]:
        """Find a LoRA, and check that all of it is for the model; NotFound, BadRequest."""
        path = self._path(asked)
        info = describe_lora(asked.name, path)
        digest = asked.digest or self._digest(path)
        if digest not in self._fits:
            self._fits[digest] = self._check(digest, path)
        fits = self._fits[digest]
        if isinstance(fits, str):
            base = f"; it is for {info.base}" if info.base else ""
            raise BadRequest(f"LoRA {asked.name!r} is not for this model: {fits}{base}.", "See: triptych loras")
        self._put_on_shelf(digest, path)
        encoders = any(name.startswith(TEXT_COMPONENTS) for name in fits)
        lora = Lora(name=asked.name, digest=digest, weight=asked.weight, encoders=encoders)
        return lora, info.model_copy(update={"components": fits})

    def _put_on_shelf(self, digest: str, path: Path) -> None:
        """Let a link there lead to the file whose digest was made just now; what a client sent stays."""
        place = self._shelf / f"{digest}.safetensors"
        if place == path or (place.is_file() and not place.is_symlink()):
            return
        if not place.is_symlink() or place.resolve() != path.resolve():
            self._shelf.mkdir(parents=True, exist_ok=True, mode=0o700)
            place.unlink(missing_ok=True)
            place.symlink_to(path.resolve())

    def _path(self, asked: LoraRequest) -> Path:
        known = self.paths()
        if asked.digest:
            path = self._shelf / f"{asked.digest}.safetensors"
            if path.is_file() and (not path.is_symlink() or self._digest(path) == asked.digest):
                return path
            if asked.name in known and self._digest(known[asked.name]) == asked.digest:
                return known[asked.name]
            raise NotFound(f"The file of LoRA {asked.name!r} is not here.", "Give it: --lora FILE.safetensors")
        if asked.name in known:
            return known[asked.name]
        close = difflib.get_close_matches(asked.name, known, 1)
        hint = (
            f"Did you mean {close[0]!r}?" if close else "See: triptych loras. Or give a file: --lora FILE.safetensors"
        )
        raise NotFound(f"There is no LoRA {asked.name!r} in this stack.", hint)

    def _digest(self, path: Path) -> str:
        key = file_key(path)
        if key not in self._digests:
            found = hashlib.sha256()
            with path.open("rb") as file:
                while part := file.read(HASHED_BYTES):
                    found.update(part)
                    self.beat()
            self._digests[key] = found.hexdigest()
        return self._digests[key]

    def _check(self, digest: str, path: Path) -> tuple[str, ...] | str:
        """Return the components that it changes, or why it is not for the model."""
        if self._pipeline is None:
            try:
                self._pipeline = self._skeleton()
            except Exception as error:
                raise BadRequest(
                    f"LoRAs can't be checked for this pipeline: {cause_of(error)}.", "Leave --lora out."
                ) from error
        own = {name: part for name, part in self._pipeline.components.items() if hasattr(part, "parameters")}
        tensors, metadata = shapes_of_file(path)
        name = f"check_{digest[:16]}"
        try:
            try:
                found = load_adapter(self._pipeline, own, tensors, name, metadata=metadata)
            except NotImplementedError:  # not all libraries take shapes
                found = load_adapter(self._pipeline, own, load_file(path), name, metadata=metadata)
        except BadRequest as error:
            return error.message
        except WeightsLost as error:
            self._pipeline = None  # another one is made
            return str(error)
        for part in own.values():
            remove_adapter(part, name)
        if not found:
            return "it changes nothing of it"
        if beyond := [component for component in found if stages_of(component) == ("vae",)]:
            return f"it changes {beyond[0]}"
        return tuple(found)


def file_key(path: Path) -> FileKey:
    """Return what changes when a file does."""
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns


def shapes_of_file(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return a file's tensors, large ones as shapes alone, and its adapters' own configuration."""
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(path, "pt") as file:
        for key, stored in header_of(path).items():
            small = math.prod(stored.shape) <= FEW_VALUES
            dtype = DTYPES.get(stored.dtype)
            if dtype is None:
                raise BadRequest(f"it holds {key} as {stored.dtype}, which is not known here")
            tensors[key] = file.get_tensor(key) if small else torch.empty(stored.shape, dtype=dtype, device="meta")
    said = metadata_of(path).get("lora_adapter_metadata")
    try:
        found = json.loads(said) if isinstance(said, str) else {}
    except (ValueError, RecursionError) as error:
        raise BadRequest("its configuration is not valid JSON") from error
    return tensors, found if isinstance(found, dict) else {}


def describe_lora(name: str, path: Path) -> LoraInfo:
    """Describe a LoRA by its file's header; BadRequest for what is none, or too large."""
    try:
        size = path.stat().st_size
        if size > MAX_LORA_BYTES:
            raise BadRequest(f"LoRA {name!r} has {format_bytes(size)}.", f"At most {format_bytes(MAX_LORA_BYTES)} fit.")
        if (header := header_bytes(path)) > MOST_HEADER_BYTES:
            raise BadRequest(f"LoRA {name!r} has a header of {format_bytes(header)}.", "Save it anew, with less in it.")
        tensors = header_of(path)
        said = metadata_of(path)
    except Damaged as error:
        raise BadRequest(f"LoRA {name!r}: {error.file} {error.fault}.", error.remedy) from error
    except OSError as error:
        raise BadRequest(f"LoRA {name!r} can't be read: {error.strerror}.") from error
    if not any(OF_LORA.search(key) for key in tensors):
        raise BadRequest(f"LoRA {name!r} holds no adapter, but {len(tensors)} other tensors.")
    base, words = plain(base_of(said, tensors)), plain(triggers_of(said))
    return LoraInfo(name=name, bytes=size, rank=rank_of(tensors), base=base[:200], triggers=words[:300])


def plain(text: str) -> str:
    """Return a text without what can't travel as UTF-8."""
    return text.encode("utf-8", "replace").decode()


def header_bytes(path: Path) -> int:
    with path.open("rb") as file:
        begin = file.read(8)
    return int(struct.unpack("<Q", begin)[0]) if len(begin) == 8 else 0


def metadata_of(path: Path) -> dict[str, Any]:
    """Return a safetensors file's own words, of which the header was checked."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        found = json.loads(file.read(length)).get("__metadata__") or {}
    return found if isinstance(found, dict) else {}


def rank_of(tensors: Mapping[str, StoredTensor]) -> int:
    """Return the largest rank of an adapter's layers."""
    downs = (tensor.shape for key, tensor in tensors.items() if re.search(r"lora_A|lora_down|lora\.down", key))
    return max((shape[0] for shape in downs if shape), default=0)


def base_of(said: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> str:
    """Return the model that a LoRA was made for, by its own word, or by its layers; empty if neither tells."""
    for key in ("modelspec.architecture", "ss_base_model_version", "base_model", "ss_sd_model_name"):
        if (word := str(said.get(key) or "")) and word.lower() not in ("none", "unknown"):
            return word[:200]
    for part, model in LAYERS.items():
        if any(part in key for key in tensors):
            return model
    for key, tensor in tensors.items():
        if re.search(r"attn2[._]to_k.*(lora_A|down)", key) and len(tensor.shape) >= 2:
            return WIDTHS.get(tensor.shape[1], "")
    return ""


def triggers_of(said: Mapping[str, Any]) -> str:
    """Return the words that a LoRA was trained with, by its own word: the most frequent tags of kohya's trainer."""
    for key in ("modelspec.trigger_phrase", "trigger", "trigger_words", "instance_prompt"):
        if word := str(said.get(key) or ""):
            return " ".join(word.split())[:1000]
    try:
        folders = json.loads(str(said.get("ss_tag_frequency") or "{}"))
        counts: dict[str, int] = {}
        for tags in folders.values():
            for tag, count in tags.items():
                counts[tag.strip()] = counts.get(tag.strip(), 0) + int(count)
    except (ValueError, AttributeError, TypeError, OverflowError, RecursionError):
        return ""
    return ", ".join(sorted(counts, key=lambda tag: -counts[tag])[:MOST_TRIGGERS])[:1000]


def local_file(name: str, where: str) -> Path:
    """Return the file of an alias: a path, or OWNER/NAME[:FILE] on the hub, downloaded once; ModelMissing."""
    path = Path(where).expanduser()
    if path.is_file():
        return path.absolute()
    repo, _, file = where.partition(":")
    is_path = where.startswith(("/", ".", "~")) or (not file and where.endswith(".safetensors"))
    if is_path or not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ModelMissing(f"LoRA {name!r}: there is no file {where!r}.", "Give a .safetensors file, or OWNER/NAME.")
    try:
        return Path(hf_hub_download(repo, file or only_file(name, repo)))
    except LocalEntryNotFoundError as error:
        raise ModelMissing(f"LoRA {name!r}: {where!r} is not here, and the hub can't be reached.") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelMissing(f"LoRA {name!r}: {where!r} can't be downloaded: {str(error).splitlines()[0]}") from error


def only_file(name: str, repo: str) -> str:
    """Return the name of the one safetensors file of a repository, from the cache where the hub can't be reached."""
    try:
        found = [file for file in list_repo_files(repo) if file.endswith(".safetensors")]
    except (HfHubHTTPError, OSError) as error:
        cached = Path(os.environ.get("HF_HUB_CACHE", Path.home() / ".cache/huggingface/hub"))
        parts = cached.glob(f"models--{repo.replace('/', '--')}/snapshots/*/*.safetensors")
        found = sorted({path.name for path in parts})
        if not found:
            raise ModelMissing(f"LoRA {name!r}: {repo!r} is not here, and the hub can't be reached.") from error
    if len(found) != 1:
        raise ModelMissing(
            f"LoRA {name!r}: {repo!r} has {len(found)} safetensors files.", f"Name one: {repo}:FILE.safetensors"
        )
    return found[0]
