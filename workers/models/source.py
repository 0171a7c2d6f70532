"""The source of a model: its files, and which of them a stage needs.

A model is a folder in the diffusers layout, a hub repo id, a file of safetensors beside the configuration of another,
or `demo`, the one that ships with Triptych. Whatever it was, it becomes a local folder here, with only this stage's
weights downloaded.
"""

import contextlib
import hashlib
import json
import logging
import re
import shutil
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from protocol.errors import ModelMissing
from protocol.model_spec import DEMO, ModelSpec
from protocol.stages import SHARED_COMPONENTS, STAGES, TRAITS, Stage
from protocol.units import format_bytes
from workers.models.weight_files import Damaged, check_file, read_json

log = logging.getLogger(__name__)

LEAST_LEFT = 1_000_000_000  # bytes of a disk that a download leaves
DEMO_FOLDER = Path(__file__).parents[1] / "demo_model"
LORAS = "loras"  # name of a folder of LoRAs in a model's own, which is no part of it
CONTROLNET, IMAGE_ENCODER = "controlnet", "image_encoder"  # names of components
REFINER, REFINER_SCHEDULER = "unet_2", "scheduler_2"
REFINERS = "StableDiffusionXLImg2ImgPipeline"  # the pipeline that a refiner is saved as
DENOISERS, GGUF, PICKLES = ("transformer", "unet"), ".gguf", (".ckpt", ".pt", ".pth", ".bin")
TORCHAO, BITSANDBYTES = "torchao", "bitsandbytes"
INSTALL_QUANTIZE = 'Install it: pip install "triptych[quantize]".'
NOT_IN_FILES = ("safety_checker",)  # components that diffusers leaves out of a model that is one file
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
NAME = re.compile(r"\w+")  # of a component, and its folder
INDEX_FILES = ("model_index.json", "modular_model_index.json")
SKIP = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.msgpack", "*.onnx*", "*.fp16.*", "*.non_ema.*", "*.png", "*.jpg")
SAMPLE_BYTES = 65536


@dataclass(frozen=True, slots=True)
class Source:
    """`index` is model_index.json without its private entries: component name → (library, class)."""

    model: str
    folder: Path
    revision: str
    pipeline: str
    index: dict[str, tuple[str, str]]
    named: frozenset[str] = frozenset()  # components of the index, those that are null included
    ip_adapter: Path | None = None  # its weights
    blocks: str | None = None  # name of a modular pipeline's blocks, where the model says one
    added: Mapping[str, Path] = field(default_factory=dict)  # folders of components that lie beside the model's own
    single: Mapping[str, Path] = field(default_factory=dict)  # files of components whose weights are in one

    @property
    def index_file(self) -> Path:
        """The file that names the pipeline and its components."""
        return next(path for name in INDEX_FILES if (path := self.folder / name).exists())

    def folder_of(self, component: str) -> Path:
        """Return the folder of a component's files."""
        return self.added.get(component, self.folder / component)

    def components(self, stage: Stage) -> set[str]:
        """The components with weights, tokenizers or settings that a stage loads."""
        return {name for name in self.index if stage in stages_of(name)}

    def settings(self) -> dict[str, Any]:
        """Read the model's own triptych.json, with settings such as defaults for its jobs; ModelMissing."""
        path = self.folder / "triptych.json"
        if not path.exists():
            return {}
        with explained(self.model, self.folder):
            return read_json(path)


def quantization_method(source: Source, component: str) -> str:
    """Return by what a component's weights were quantized before they were saved, as it says; empty if they weren't."""
    if component in source.single:
        return ""  # whatever the configuration says of others
    try:
        config = json.loads((source.folder_of(component) / "config.json").read_text())
    except (OSError, ValueError):
        return ""  # which is for others to tell
    found = config.get("quantization_config") if isinstance(config, dict) else None
    return str(found.get("quant_method", "an unknown method")) if isinstance(found, dict) else ""


def stages_of(component: str) -> tuple[Stage, ...]:
    """Return the stages that load a component of a pipeline, by the names that diffusers uses throughout."""
    if component.startswith(SHARED_COMPONENTS):
        return STAGES
    return (next((stage for stage in STAGES if component.startswith(TRAITS[stage].components)), "denoise"),)


def locate(spec: ModelSpec, stage: Stage | None) -> Source:
    """Find or download what a stage needs, without a stage no weights; ModelMissing with what to do about it."""
    path = Path(spec.name).expanduser()
    if path.is_file():
        source = of_file(spec.name, path.resolve(), spec.base, stage)
    elif spec.base:
        raise ModelMissing(f"{spec.name!r} is no file, and needs no base.", "Leave --base out.")
    else:
        source = locate_model(spec.name, spec.revision, stage)
    if spec.transformer:
        source = with_transformer(source, spec.transformer, stage)
    if spec.controlnet:
        source = with_controlnet(source, spec.controlnet, stage)
    if spec.refiner:
        if spec.controlnet or spec.ip_adapter:
            raise ModelMissing("A refiner goes with no ControlNet and no IP-Adapter.", "Leave --refiner out, or those.")
        source = with_refiner(source, spec.refiner, stage)
    return with_ip_adapter(source, spec.ip_adapter, stage) if spec.ip_adapter else source


def of_file(given: str, path: Path, base: str | None, stage: Stage | None) -> Source:
    """Return the source of a file that holds a whole model, by the configuration of its base; ModelMissing.

    What the file does not hold, text encoders beside a denoiser say, is the base's own.
    """
    from workers.models.single_file import base_of, held_in

    suffix = path.suffix.lower()
    if suffix in PICKLES:
        raise ModelMissing(f"{given!r} is no safetensors file.", "Only those are taken: others hold programs.")
    if suffix == GGUF:
        raise ModelMissing(
            f"{given!r} holds a denoiser alone.", f"Name the model that it is for: --model MODEL --transformer {given}"
        )
    if suffix != ".safetensors":
        raise ModelMissing(f"{given!r} is no model.", "Give a folder, a hub id or a .safetensors file.")
    with explained(given, path.parent):
        base = base or base_of(path)
        small = locate_model(base, None, None)
        index = {name: entry for name, entry in small.index.items() if name not in NOT_IN_FILES}
        held = held_in(path, replace(small, model=given, index=index))
        source = locate_model(base, small.revision if "/" in base else None, stage, held) if stage else small
        revision = f"{small.revision}+{file_fingerprint(path)}"
    return replace(source, model=given, revision=revision, index=index, single=dict.fromkeys(held, path))


def locate_model(model: str, revision: str | None, stage: Stage | None, without: Collection[str] = ()) -> Source:
    """Find or download what a stage needs of a model itself, but for the weights of some components; ModelMissing."""
    if model == DEMO:
        return read(model, DEMO_FOLDER, None)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return read(model, folder.resolve(), None)
    if not REPO_ID.fullmatch(model):
        raise ModelMissing(
            f"There is no model {model!r}.",
            "Give a folder in the diffusers layout, a hub id such as black-forest-labs/FLUX.1-dev, or demo.",
        )
    snapshot = download(model, revision, stage, without)
    return read(model, snapshot, snapshot.name)


def with_transformer(source: Source, given: str, stage: Stage | None) -> Source:
    """Return the source with one file, or one on the hub, for its denoiser's weights; ModelMissing."""
    path = file_at(given)
    if path.suffix.lower() in PICKLES:
        raise ModelMissing(f"{given!r} is no safetensors or GGUF file.", "Only those are taken: others hold programs.")
    if not path.is_file() or path.suffix.lower() not in (".safetensors", GGUF):
        raise ModelMissing(
            f"There is no file {given!r} for a denoiser.",
            "Give a .safetensors or .gguf file, or one on the hub: city96/FLUX.1-dev-gguf/flux1-dev-Q4_K_S.gguf.",
        )
    name = next((name for name in DENOISERS if name in source.index), None)
    if name is None:
        raise ModelMissing(f"{source.model!r} has no denoiser that a file could stand for.", "Leave --transformer out.")
    with explained(given, path.parent):
        revision = file_fingerprint(path)
    return replace(source, revision=f"{source.revision}+{revision}", single={**source.single, name: path.resolve()})


def file_at(given: str, beside: Sequence[str] = (), skip: tuple[str, ...] = ()) -> Path:
    """Return the path of a file, or of OWNER/NAME/FILE on the hub, downloaded with what lies `beside` it; ModelMissing.

    It need not be there.
    """
    path = Path(given).expanduser()
    if path.exists() or len(path.parts) <= 2 or not REPO_ID.fullmatch(repo := "/".join(path.parts[:2])):
        return path
    file = PurePosixPath(*path.parts[2:])
    with hub_errors(repo, None):
        return snapshot(repo, None, [str(file), *(str(file.parent / part) for part in beside)], skip) / file


def with_controlnet(source: Source, given: str, stage: Stage | None) -> Source:
    """Return the source with a ControlNet beside it, from a folder or the hub; ModelMissing."""
    folder = Path(given).expanduser()
    if folder.is_dir():
        folder, revision = folder.resolve(), None
    elif REPO_ID.fullmatch(given) and not folder.exists():
        weights = ["diffusion_pytorch_model*.safetensors*"] if stage in stages_of(CONTROLNET) else []
        with hub_errors(given, None):
            folder = snapshot(given, None, ["config.json", *weights])
            if weights and lacks(folder):  # it has variants alone, such as fp16
                snapshot(given, folder.name, weights, skip=())
        revision = folder.name
    else:
        raise ModelMissing(
            f"There is no ControlNet {given!r}.",
            "Give a folder with its config.json and its weights, or a hub id such as xinsir/controlnet-union-sdxl-1.0.",
        )
    if not (folder / "config.json").exists():
        raise ModelMissing(f"{given!r} is no ControlNet: it has no config.json.", "Give the folder that holds it.")
    with explained(given, folder):
        name = read_json(folder / "config.json").get("_class_name")
        revision = revision or fingerprint(folder)
    if not isinstance(name, str) or "ControlNet" not in name:
        raise ModelMissing(f"{given!r} is no ControlNet, but {name or 'of no class'}.", "Give another to --controlnet.")
    return replace(
        source,
        revision=f"{source.revision}+{revision[:16]}",
        index={**source.index, CONTROLNET: ("diffusers", name)},
        named=source.named | {CONTROLNET},
        added={**source.added, CONTROLNET: folder},
    )


def with_refiner(source: Source, given: str, stage: Stage | None) -> Source:
    """Return the source with a refiner beside it, from a folder or the hub; ModelMissing."""
    found = locate_model(given, None, "denoise" if stage == "denoise" else None)
    if found.pipeline != REFINERS or not {"unet", "scheduler"} <= found.index.keys():
        raise ModelMissing(
            f"{given!r} is no refiner, but a {found.pipeline}.",
            "Give one that is saved as such: stabilityai/stable-diffusion-xl-refiner-1.0.",
        )
    names = {REFINER: "unet", REFINER_SCHEDULER: "scheduler"}
    return replace(
        source,
        revision=f"{source.revision}+{found.revision[:16]}",
        index={**source.index, **{name: found.index[own] for name, own in names.items()}},
        named=source.named | names.keys(),
        added={**source.added, **{name: found.folder / own for name, own in names.items()}},
    )


def with_ip_adapter(source: Source, given: str, stage: Stage | None) -> Source:
    """Return the source with an IP-Adapter beside it, and its image encoder where the model has none; ModelMissing."""
    beside = [f"{IMAGE_ENCODER}/*.json"]
    if stage in stages_of(IMAGE_ENCODER):
        beside.append(f"{IMAGE_ENCODER}/*.safetensors")
    path = file_at(given, beside, SKIP)
    if not path.is_file() or path.suffix != ".safetensors":
        raise ModelMissing(
            f"There is no IP-Adapter {given!r}.",
            "Give a file of safetensors, or one on the hub: h94/IP-Adapter/models/ip-adapter_sd15.safetensors.",
        )
    added, index = dict(source.added), dict(source.index)
    if IMAGE_ENCODER not in index:
        if not (path.parent / IMAGE_ENCODER / "config.json").exists():
            raise ModelMissing(
                f"{given!r} has no image encoder: there is no folder {IMAGE_ENCODER} beside it, and none in the model.",
                "Put the one that it was trained with there.",
            )
        added[IMAGE_ENCODER] = path.parent / IMAGE_ENCODER
        index[IMAGE_ENCODER] = ("transformers", "CLIPVisionModelWithProjection")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return replace(
        source, revision=f"{source.revision}+{digest}", index=index, named=source.named | {IMAGE_ENCODER}, added=added,
        ip_adapter=path,
    )  # fmt: skip


def read(model: str, folder: Path, revision: str | None) -> Source:
    """The source in a local folder; a folder without a commit gets a fingerprint of its files. ModelMissing."""
    paths = [folder / name for name in INDEX_FILES]
    path = next((path for path in paths if path.exists() or path.is_symlink()), None)
    if path is None:
        raise ModelMissing(
            f"{model!r} is not a model in the diffusers layout: it has no model_index.json.", hint(folder)
        )
    with explained(model, folder):
        raw = read_json(path)
    pipeline = raw.get("_class_name")
    entries = {name: value for name, value in raw.items() if not name.startswith("_") and is_component(value)}
    if not isinstance(pipeline, str):
        raise ModelMissing(
            f"{model!r} is not a model in the diffusers layout: its model_index.json names no pipeline and components.",
            "Save one there with pipeline.save_pretrained(FOLDER), or download it again.",
        )
    hints = {name: class_named(value) for name, value in entries.items()}
    index = {name: (str(hint[0]), str(hint[1])) for name, hint in hints.items() if hint != [None, None]}
    if odd := [name for name in index if not NAME.fullmatch(name)]:
        raise ModelMissing(f"{model!r} names a component {odd[0]!r}, which is no name of a folder.", "Rename it.")
    with explained(model, folder):
        blocks = raw.get("_blocks_class_name")
        return Source(
            model, folder, revision or fingerprint(folder), pipeline, index, frozenset(entries),
            blocks=blocks if isinstance(blocks, str) else None,
        )  # fmt: skip


def is_component(value: object) -> bool:
    """Return whether an entry of model_index.json is a component; other lists are settings of the pipeline."""
    match value:
        case [str(), str()] | [None, None] | [str() | None, str() | None, {}]:
            return True
    return False


def class_named(entry: list[Any]) -> list[Any]:
    """Return (library, class) of an entry; of a modular pipeline's, what it was saved as, or is to be."""
    match entry:
        case [None, None, {"pretrained_model_name_or_path": str(), "type_hint": [library, name]}]:
            return [library, name]
    return entry[:2]


def hint(folder: Path) -> str:
    """Return a hint for a folder that is no model: what was meant, maybe."""
    nested = sorted(path.parent for path in folder.glob("*/model_index.json"))
    if nested:
        return f"A folder in it is: --model {nested[0]}"
    if any(folder.glob("*.safetensors")):
        return "It holds single files; the diffusers layout has a folder for each component and a model_index.json."
    return "Save one there with pipeline.save_pretrained(FOLDER)."


@contextlib.contextmanager
def explained(model: str, folder: Path) -> Iterator[None]:
    """Raise a damaged file of a model's folder as an error for a person."""
    try:
        yield
    except Damaged as error:
        file = error.file.removeprefix(f"{folder.name}/")
        raise ModelMissing(f"{model!r} can't be run. {file} {error.fault}.", error.remedy) from error


def fingerprint(folder: Path) -> str:
    """Sixteen hex digits that change with any configuration, tensor name, shape or size, or sampled weight; Damaged."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors", ".model", ".txt")):
        if path.is_dir() or path.relative_to(folder).parts[0] == LORAS:
            continue
        if not path.is_file():
            check_file(path)  # which says what it is: waiting for what comes through a pipe would be for ever
        digest.update(f"{path.relative_to(folder)}:{path.stat().st_size}\n".encode())
        sample(digest, path)
    return digest.hexdigest()[:16]


def sample(digest: Any, path: Path) -> None:
    """Add a file to a digest: all of it, or of large weights their header and some parts."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if path.suffix not in (".safetensors", ".gguf") or size < 16 * SAMPLE_BYTES:
            digest.update(file.read())
            return
        header = struct.unpack("<Q", file.read(8))[0] if path.suffix == ".safetensors" else 0
        digest.update(file.read(min(header, size)))
        for part in range(8):
            file.seek(min(8 + header, size) + max(0, size - 8 - header - SAMPLE_BYTES) * part // 7)
            digest.update(file.read(SAMPLE_BYTES))


def file_fingerprint(path: Path) -> str:
    """Return what `fingerprint` does, of one file; Damaged."""
    digest = hashlib.sha256(f"{check_file(path)}\n".encode())
    sample(digest, path)
    return digest.hexdigest()[:16]


def lacks(folder: Path) -> bool:
    """Return whether there are no weights in a folder."""
    return not any(folder.glob("*.safetensors"))


def download(repo: str, revision: str | None, stage: Stage | None, without: Collection[str] = ()) -> Path:
    """This stage's files of a hub repo, in the Hugging Face cache; nothing if they are there already.

    Weights of the components `without` are left out.
    """
    small = [*INDEX_FILES, "triptych.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.jinja"]
    with hub_errors(repo, revision):
        base = snapshot(repo, revision, small)
        if stage is None:
            return base
        components = read(repo, base, base.name).components(stage) - {*without}
        weights = [f"{name}/*.safetensors" for name in components]
        snapshot(repo, base.name, [*small, *weights])
        # A component that has variants alone, such as fp16, comes with those.
        bare = [f"{n}/*.safetensors" for n in components if (base / n / "config.json").exists() and lacks(base / n)]
        if bare:
            snapshot(repo, base.name, bare, skip=())
        return base


def snapshot(repo: str, revision: str | None, patterns: list[str], skip: tuple[str, ...] = SKIP) -> Path:
    """Return the folder of a hub repo's files that fit some patterns, downloaded where they aren't there.

    What a download that was cut off has left is gone on with. ModelMissing where the disk has no room for weights.
    """
    from huggingface_hub import snapshot_download

    if any(pattern.endswith(".safetensors") for pattern in patterns):
        check_room(repo, revision, patterns, skip)
    return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=[*skip] or None))


def check_room(repo: str, revision: str | None, patterns: list[str], skip: tuple[str, ...]) -> None:
    """Raise ModelMissing where the cache's disk has too little room for what is yet to be downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        files = snapshot_download(
            repo, revision=revision, allow_patterns=patterns, ignore_patterns=[*skip] or None, dry_run=True
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
        return  # the download itself says what is wrong, or needs no network
    wanted = sum(file.file_size or 0 for file in files if file.will_download)
    cache = Path(HF_HUB_CACHE).expanduser()
    free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    if wanted > free - LEAST_LEFT:
        raise ModelMissing(
            f"{repo!r} takes {format_bytes(wanted)} more; the disk of {str(cache)!r} has {format_bytes(free)} free.",
            "Make room there, or set HF_HOME to a folder on another disk.",
        )
    if wanted:
        log.info("downloading %s of %s", format_bytes(wanted), repo)


@contextlib.contextmanager
def hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Raise what the hub's library raises as ModelMissing, for a person."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        hint = f"Accept its licence at its page on the hub, then: hf auth login. Or use an ungated one, such as {DEMO}."
        raise ModelMissing(f"{repo!r} is gated, and this account has no access.", hint) from error
    except RevisionNotFoundError as error:
        raise ModelMissing(f"{repo!r} has no revision {revision!r}.", "Leave --revision out for the newest.") from error
    except RepositoryNotFoundError as error:
        raise ModelMissing(
            f"The hub has no model {repo!r}, or it is private.", "Check the name, or: hf auth login."
        ) from error
    except HFValidationError as error:
        raise ModelMissing(f"There is no model {repo!r}.", "A hub id is OWNER/NAME.") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelMissing(
            f"{repo!r} is not in the Hugging Face cache and can't be downloaded.",
            f"With a network: triptych pull {repo}. HF_HUB_OFFLINE must not be set for that.",
        ) from error
